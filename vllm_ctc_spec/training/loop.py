"""The training loop: the drafter and the step that changes it, in one process or several."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import Batch, anchor_positions, epochs, in_labels, sample_batch
from vllm_ctc_spec.training.checkpoint import Progress, RunPaths
from vllm_ctc_spec.training.config import DTYPES, TrainConfig
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.forecast import Pace
from vllm_ctc_spec.training.hidden_states import HiddenStates
from vllm_ctc_spec.training.loss import LOSSES
from vllm_ctc_spec.training.measure import measure_chain, measure_trees
from vllm_ctc_spec.training.metrics import LogFollower, MetricsLog, StepBar
from vllm_ctc_spec.training.muon import Muon
from vllm_ctc_spec.training.vocabulary import label_scores
from vllm_ctc_spec.training.workers import SINGLE_PROCESS, Workers

TORCH_DTYPES = {name: getattr(torch, of_torch) for name, of_torch in DTYPES.items()}
FINAL_LR_SHARE = 0.02


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, over a tenth of a short run, then a cosine to a fiftieth."""
    warmup = min(config.warmup, config.steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
    return config.lr * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def make_optimizers(drafter: CTCDrafter, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices that act on hidden states and AdamW for the rest: norms, queries,
    blank, transitions and label-conditional head."""
    bodies = ("layers", "fc", "specformer")
    matrices = [p for name, p in drafter.named_parameters() if p.ndim == 2 and name.startswith(bodies)]
    chosen = set(map(id, matrices)) if config.optimizer == "muon" else set()
    others = [p for p in drafter.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if chosen:
        optimizers.append(Muon(matrices, lr=config.lr, weight_decay=0.05))
    return optimizers


class TrainingStep(nn.Module):
    """Drafter and loss as one module. Its forward is all that takes part in a gradient."""

    def __init__(self, drafter: CTCDrafter, config: TrainConfig):
        super().__init__()
        self.drafter = drafter
        self.config = config

    def forward(self, hidden_states: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [B, S, A * H]; returns the sum of the anchors' losses, the number of labels that counted, and
        the number of labels that, with all labels before them, are in the draft vocabulary."""
        drafter = self.drafter
        # Beside a target in fp16 too, which has no range for gradients.
        dtype = torch.float32 if self.config.dtype == "fp32" else torch.bfloat16
        kept = batch.valid[..., 0]
        with torch.autocast(hidden_states.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            hidden = drafter.forward_hidden(hidden_states, batch.anchors, batch.positions)[kept]
            hidden = hidden.float()  # [N, 1 + T, H]
        lattice = drafter.lattice(hidden)
        anchors, labels, valid = in_labels(
            drafter.vocabulary, batch.anchors[kept], batch.labels[kept], batch.valid[kept]
        )
        scores = label_scores(
            hidden[:, 1:],
            drafter.draft_head,
            anchors,
            labels,
            drafter.markov_tables,
            exclude_repeats=lattice.blank_odds is not None,
            dtype=dtype,
        )
        result = LOSSES[self.config.loss](lattice, scores, labels, valid, self.config.position_decay)
        return result.loss.sum(), result.counted.sum(), valid.sum()


class Trainer:
    """embedding, head: the target's, `[V, H]`; token_ids: the labels of a draft vocabulary, increasing."""

    def __init__(
        self,
        config: TrainConfig,
        drafter_config: DrafterConfig,
        hidden_states: HiddenStates,
        embedding: Tensor,
        head: Tensor,
        workers: Workers = SINGLE_PROCESS,
        token_ids: Sequence[int] | None = None,
    ):
        torch.manual_seed(config.seed)
        self.config, self.hidden_states, self.workers = config, hidden_states, workers
        labels = None if token_ids is None else torch.tensor(token_ids)
        self.drafter = CTCDrafter(drafter_config, embedding.float(), head.float(), labels)
        self.drafter.spread_labels(config.blank_share)
        self.drafter.to(embedding.device)
        if config.init:
            self.drafter.start_from(config.init)
        self.module = workers.wrap(TrainingStep(self.drafter, config), self.drafter.all_layers)
        self.progress = Progress(self.drafter, make_optimizers(self.drafter, config))

    @property
    def device(self) -> torch.device:
        return self.drafter.target_head.device

    def backward(self, examples: Sequence[Example], batch: Batch) -> tuple[float, int, int]:
        """Gradients of the mean loss over the batch's anchors; the sums of `TrainingStep.forward`."""
        workers, num_anchors = self.workers, int(batch.valid[..., 0].sum())
        mine = list(workers.rows(len(examples)))
        per_part = -(-len(mine) // self.config.accumulate)
        parts = [mine[start : start + per_part] for start in range(0, len(mine), per_part)]
        loss_sum, counted, inside = 0.0, 0, 0
        for rows in parts:
            part = batch.rows(rows).to(self.device)
            hidden_states = self.hidden_states([examples[row] for row in rows], part.token_ids)
            averaging = contextlib.nullcontext() if rows is parts[-1] else workers.without_averaging(self.module)
            with averaging:
                loss, labels, in_vocabulary = self.module(hidden_states, part)
                # DDP and FSDP average the processes' gradients; the mean over the whole batch is wanted.
                (loss * (workers.size / num_anchors)).backward()
            loss_sum, counted, inside = loss_sum + loss.item(), counted + int(labels), inside + int(in_vocabulary)
        loss_sum, counted, inside = workers.total([loss_sum, counted, inside], self.device)
        return loss_sum, int(counted), int(inside)

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """One update from the examples of all processes; returns the step's metrics."""
        config, started = self.config, time.perf_counter()
        seed = config.seed * 1_000_003 + self.progress.step
        batch = sample_batch(examples, config.anchors, self.drafter.config.num_labels, seed)
        loss_sum, counted, inside = self.backward(examples, batch)
        norm = float(torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), config.clip))
        if not math.isfinite(norm):
            raise TrainingError(
                f"The gradient is {norm} at step {self.progress.step + 1}; "
                "start again with --overwrite and a lower --lr."
            )
        lr = learning_rate(self.progress.step, config)
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
            "anchors_total": int(batch.valid[..., 0].sum()),
            "labels_total": valid_total,
            "outside_labels_total": valid_total - inside,
            "infeasible_labels_total": inside - counted,
            "gradient_norm": norm,
            "lr": lr,
            "seconds": round(time.perf_counter() - started, 4),
        }

    def drafter_of(self, weights: dict[str, Tensor]) -> CTCDrafter:
        """A whole drafter with these weights, in this process alone: the trained one may be spread over several. It
        takes the room that the gradients leave during a measurement."""
        mine = self.drafter
        token_ids = None if mine.vocabulary is None else mine.vocabulary.token_ids
        with torch.device("meta"):
            drafter = CTCDrafter(mine.config, mine.target_embedding, mine.target_head, token_ids)
        drafter.load_state_dict({name: weight.to(self.device) for name, weight in weights.items()}, assign=True)
        return drafter

    def acceptance(self, drafter: CTCDrafter, held_out: Sequence[Example]) -> Acceptance:
        """Of the drafts that will be served, greedy chains or trees, by conversation."""
        size = self.config.tree_nodes
        if size:
            measured = measure_trees(drafter, self.hidden_states, held_out, [size])[size]
        else:
            measured = measure_chain(drafter, self.hidden_states, held_out)
        return measured.grouped([example.conversation for example in held_out if anchor_positions(example)])

    @torch.no_grad()
    def losses(self, drafter: CTCDrafter, examples: Sequence[Example]) -> tuple[list[float], list[int]]:
        """For each conversation the sum of the losses at random anchors, as in training, and the number of these."""
        step = TrainingStep(drafter, self.config)
        sums: dict[Hashable, float] = defaultdict(float)
        numbers: dict[Hashable, int] = defaultdict(int)
        for row, example in enumerate(examples):
            if anchor_positions(example):
                batch = sample_batch([example], self.config.anchors, drafter.config.num_labels, row).to(self.device)
                loss, _, _ = step(self.hidden_states([example], batch.token_ids), batch)
                sums[example.conversation] += loss.item()
                numbers[example.conversation] += int(batch.valid[..., 0].sum())
        return list(sums.values()), list(numbers.values())

    def run(self, examples: list[Example], held_out: list[Example], paths: RunPaths) -> None:
        """Train to the last step, continuing from the last checkpoint in the work folder. Only the main process writes
        files, shows a bar and measures."""
        config, progress, is_main = self.config, self.progress, self.workers.is_main
        progress.restore(paths.work, self.workers, self.device)
        batches = epochs(examples, config.batch_size, config.seed, progress.step)
        earlier = [entry for entry in LogFollower(paths.work).earlier if entry["step"] <= progress.step]
        with (
            MetricsLog(paths.work, progress.step) if is_main else contextlib.nullcontext() as log,
            StepBar(config.steps, progress.step, Pace(config, earlier), disable=not is_main) as bar,
        ):
            while progress.step < config.steps:
                entry = self.step(next(batches))
                last = progress.step == config.steps
                if last or progress.step % config.eval_every == 0:
                    self._measure(held_out, entry)
                if is_main:
                    log.write(entry)
                bar.show(entry)
                if last or progress.step % config.save_every == 0:
                    progress.save(paths.work, self.workers)

    def _measure(self, held_out: Sequence[Example], entry: dict[str, float]) -> None:
        """Keep the weights if they are the best so far."""
        weights, started = self.workers.weights(self.drafter), time.perf_counter()
        if self.workers.is_main:
            acceptance = self.acceptance(self.drafter_of(weights), held_out)
            entry["held_out_tokens_total"] = sum(acceptance.tokens)
            entry["held_out_steps_total"] = sum(acceptance.steps)
            if math.isfinite(acceptance.half_width):
                entry["held_out_half_width"] = acceptance.half_width
            entry["measurement_seconds"] = round(time.perf_counter() - started, 4)
            self.progress.keep_if_best(acceptance, weights)
        self.workers.wait()
