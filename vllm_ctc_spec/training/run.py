"""One training run, from prompts or a dataset to a finished drafter."""

import json
from collections.abc import Sequence

import torch

from vllm_ctc_spec.config import DrafterConfig
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import anchor_positions
from vllm_ctc_spec.training.checkpoint import RunPaths, publish
from vllm_ctc_spec.training.data import read_prompts
from vllm_ctc_spec.training.features import in_process
from vllm_ctc_spec.training.generate import make_labels
from vllm_ctc_spec.training.loop import TORCH_DTYPES, Trainer
from vllm_ctc_spec.training.metrics import read_log
from vllm_ctc_spec.training.settings import TrainConfig, TrainingError
from vllm_ctc_spec.training.target import Target
from vllm_ctc_spec.training.workers import ALONE, Workers


def drafter_shape(config: TrainConfig, target: Target) -> DrafterConfig:
    """The drafter that these settings describe for this target (DrafterConfigError)."""
    shape = {name: getattr(config, name) for name in (
        "target", "num_frames", "num_labels", "num_layers", "markov_rank", "lattice", "transition_rank", "tree_nodes",
    )}  # fmt: skip
    if config.aux_layers:
        shape["aux_hidden_state_layer_ids"] = config.aux_layers
    return DrafterConfig.for_target(target.model.config, **shape)


def train(config: TrainConfig, paths: RunPaths, overwrite: bool, workers: Workers = ALONE) -> str:
    """Run or continue `config`; returns the report to print. Nothing is written before everything is checked."""
    paths.check(config, overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Target.load(config.target, device, TORCH_DTYPES[config.dtype])
    drafter_config = drafter_shape(config, target)
    prompts = read_prompts(config.data, target, config.max_new_tokens, config.held_out)
    print(prompts.report())
    paths.start(config, overwrite)
    examples, held_out = make_labels(config, target, prompts, paths.labels, overwrite)
    if not any(anchor_positions(example) for example in examples):
        raise TrainingError(
            f"The responses of {config.target} are one token long, so there is nothing to draft; "
            "use prompts that it answers at length."
        )
    features = in_process(target, drafter_config.aux_hidden_state_layer_ids)
    trainer = Trainer(config, drafter_config, features, target.embedding, target.head, workers)
    trainer.run(examples, held_out, paths)
    trainer.drafter.load_state_dict(trainer.progress.best_weights)
    acceptance = trainer.acceptance(held_out)
    publish(trainer.drafter, config, paths)
    return report(trainer, acceptance, paths)


def infeasible_share(log: Sequence[dict]) -> float:
    return sum(e["infeasible_labels_total"] for e in log) / max(1, sum(e["labels_total"] for e in log))


def report(trainer: Trainer, acceptance: Acceptance, paths: RunPaths) -> str:
    config = trainer.config
    drafts = f"trees of {config.tree_nodes} nodes" if config.tree_nodes else f"chains of {config.num_labels} labels"
    speculative = {"method": "ctc", "model": str(paths.output)}
    return "\n".join([
        f"{paths.output}: best of {config.steps} steps is {trainer.progress.best_step}; "
        f"{infeasible_share(read_log(paths.work)):.2%} of the labels did not fit {config.num_frames} frames.",
        f"Held-out greedy acceptance length with {drafts}: {acceptance}.",
        f"Serve it: vllm serve {config.target} --speculative-config '{json.dumps(speculative)}'",
    ])  # fmt: skip
