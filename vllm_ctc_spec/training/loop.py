"""One training run, from prompts to a finished drafter, in one process on a CPU or a GPU."""

import json
import math
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from vllm_ctc_spec.config import DrafterConfig
from vllm_ctc_spec.drafter import CTCDrafter, Frames
from vllm_ctc_spec.training.acceptance import CHAINS, Acceptance, measure_acceptance
from vllm_ctc_spec.training.batches import Batch, anchor_positions, epochs, sample_batch
from vllm_ctc_spec.training.checkpoint import LOG_NAME, Progress, RunPaths, publish
from vllm_ctc_spec.training.data import read_prompts
from vllm_ctc_spec.training.generate import Example, make_labels
from vllm_ctc_spec.training.loss import LOSSES, previous_labels
from vllm_ctc_spec.training.settings import TrainConfig, TrainingError
from vllm_ctc_spec.training.target import AuxHiddenStates, Target

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ANCHORS_AT_ONCE = 64  # anchors whose frames over the vocabulary exist at the same time
CLIP_NORM = 1.0
FINAL_LR_SHARE = 0.02


def learning_rate(step: int, steps: int, lr: float) -> float:
    """Linear warm-up, then a cosine to a fiftieth."""
    warmup = max(1, min(50, steps // 10))
    if step < warmup:
        return lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def make_optimizers(drafter: CTCDrafter, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices that act on hidden states, AdamW for norms, queries, blank and label-conditional head."""
    matrices = [p for name, p in drafter.named_parameters() if p.ndim == 2 and name.startswith(("layers", "fc"))]
    chosen = set(map(id, matrices))
    others = [p for p in drafter.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Trainer:
    """The drafter, the target that teaches it, and the step that changes it."""

    def __init__(self, config: TrainConfig, drafter_config: DrafterConfig, target: Target):
        torch.manual_seed(config.seed)
        self.config = config
        self.drafter = CTCDrafter(drafter_config, target.embedding.float(), target.head.float()).to(target.model.device)
        self.aux_hidden_states = AuxHiddenStates(target, drafter_config.aux_hidden_state_layer_ids)
        self.progress = Progress(self.drafter, make_optimizers(self.drafter, config.lr))

    def backward(self, batch: Batch) -> tuple[float, int, int]:
        """Gradients of the mean loss over anchors; returns the loss's sum, the anchors and the labels that counted.

        Head and loss run over a few anchors at a time, each part backward at once: `[M, T, V]` of a whole batch is
        many GB for a large vocabulary, and on a CPU a part stays in the cache.
        """
        drafter, config = self.drafter, self.config
        aux = self.aux_hidden_states(batch.token_ids).to(drafter.fc.weight.dtype)
        with torch.autocast(aux.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            hidden = drafter.hidden_frames(aux, batch.anchors, batch.positions)[batch.valid[..., 0]]  # [N, T, H]
        anchors, labels, valid = (x[batch.valid[..., 0]] for x in (batch.anchors, batch.labels, batch.valid))
        leaf = hidden.detach().requires_grad_()
        loss_sum, labels_total = 0.0, 0
        for part in torch.arange(len(leaf), device=aux.device).split(ANCHORS_AT_ONCE):
            with torch.autocast(aux.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                frames = drafter.frames(leaf[part])
                bias = None
                if drafter.markov_head is not None:
                    bias = drafter.markov_head(previous_labels(anchors[part], labels[part])).float()
            frames = Frames(frames.logits.float(), frames.blank_odds.float())
            result = LOSSES[config.loss](frames, labels[part], valid[part], bias)
            total = result.loss.sum()
            (total / len(leaf)).backward()
            loss_sum += total.item()
            labels_total += int(result.counted.sum())
        hidden.backward(leaf.grad)
        return loss_sum, len(leaf), labels_total

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """One update; the metrics are sums and totals, so that any stretch of the log can be averaged."""
        config, started = self.config, time.perf_counter()
        seed = config.seed * 1_000_003 + self.progress.step
        batch = sample_batch(examples, config.anchors, self.drafter.config.num_labels, seed)
        loss_sum, anchors_total, labels_total = self.backward(batch.to(self.drafter.target_head.device))
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), CLIP_NORM)
        if not math.isfinite(norm):
            raise TrainingError(
                f"The gradient is {norm} at step {self.progress.step + 1}; "
                "start again with --overwrite and a lower --lr."
            )
        lr = learning_rate(self.progress.step, config.steps, config.lr)
        for optimizer in self.progress.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        valid_total = int(batch.valid.sum())
        return {
            "step": self.progress.step,
            "loss_sum": loss_sum,
            "anchors_total": anchors_total,
            "labels_total": valid_total,
            "infeasible_labels_total": valid_total - labels_total,
            "lr": lr,
            "seconds": round(time.perf_counter() - started, 4),
        }

    def acceptance(self, held_out: Sequence[Example]) -> Acceptance:
        return measure_acceptance(self.drafter, self.aux_hidden_states, held_out, CHAINS[self.config.loss])

    def run(self, examples: list[Example], held_out: list[Example], paths: RunPaths) -> None:
        """Train to the last step, continuing from the checkpoint in the work folder."""
        config, progress = self.config, self.progress
        progress.restore(paths.work)
        batches = epochs(examples, config.batch_size, config.seed, progress.step)
        with (
            (paths.work / LOG_NAME).open("a", encoding="utf-8") as log,
            tqdm(total=config.steps, initial=progress.step, desc="drafter", unit="step") as bar,
        ):
            while progress.step < config.steps:
                entry = self.step(next(batches))
                last = progress.step == config.steps
                if last or progress.step % config.eval_every == 0:
                    acceptance = self.acceptance(held_out)
                    entry["held_out_tokens_total"] = sum(acceptance.tokens)
                    entry["held_out_steps_total"] = sum(acceptance.steps)
                    progress.keep_if_best(acceptance.length)
                    bar.write(f"step {progress.step}: held-out acceptance length {acceptance}")
                log.write(json.dumps(entry) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{entry['loss_sum'] / max(1, entry['anchors_total']):.3f}", refresh=False)
                bar.update()
                if last or progress.step % config.save_every == 0:
                    progress.save(paths.work)


def infeasible_share(work_log: Sequence[dict]) -> float:
    return sum(e["infeasible_labels_total"] for e in work_log) / max(1, sum(e["labels_total"] for e in work_log))


def train(config: TrainConfig, paths: RunPaths, overwrite: bool) -> str:
    """Run or continue `config`; returns the report to print. Nothing is written before everything is checked."""
    paths.check(config, overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Target.load(config.target, device, TORCH_DTYPES[config.dtype])
    drafter_config = DrafterConfig.for_target(
        target.model.config,
        target=config.target,
        num_frames=config.num_frames,
        num_labels=config.num_labels,
        num_layers=config.num_layers,
        markov_rank=config.markov_rank,
    )
    prompts = read_prompts(config.data, target, config.max_new_tokens, config.held_out)
    print(prompts.report())
    paths.start(config, overwrite)
    examples, held_out = make_labels(config, target, prompts, paths.labels, overwrite)
    if not any(anchor_positions(example) for example in examples):
        raise TrainingError(
            f"The responses of {config.target} are one token long, so there is nothing to draft; "
            "use prompts that it answers at length."
        )
    trainer = Trainer(config, drafter_config, target)
    trainer.run(examples, held_out, paths)
    trainer.drafter.load_state_dict(trainer.progress.best_weights)
    acceptance = trainer.acceptance(held_out)
    publish(trainer.drafter, config, paths)
    return report(trainer, acceptance, paths)


def report(trainer: Trainer, acceptance: Acceptance, paths: RunPaths) -> str:
    config = trainer.config
    log = [json.loads(line) for line in (paths.work / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    lines = [
        f"{paths.output}: best of {config.steps} steps is {trainer.progress.best_step}; "
        f"{infeasible_share(log):.2%} of the labels did not fit {config.num_frames} frames.",
        f"Held-out greedy acceptance length with {config.num_labels} labels: {acceptance}.",
    ]
    if config.loss == "ce":
        lines.append("A drafter trained with --loss ce has no blanks: it is for comparison, not for serving.")
    else:
        speculative = {"method": "ctc", "model": str(paths.output), "num_speculative_tokens": config.num_labels}
        lines.append(f"Serve it: vllm serve {config.target} --speculative-config '{json.dumps(speculative)}'")
    return "\n".join(lines)
