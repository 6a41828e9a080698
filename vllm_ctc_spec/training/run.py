"""One training run, from prompts or a dataset to a finished drafter."""

import dataclasses
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.acceptance import ratio
from vllm_ctc_spec.training.advice import Estimate, Evidence, Measurement, advise
from vllm_ctc_spec.training.answers import Generate, answer, generate_here, prompt_builder
from vllm_ctc_spec.training.batches import anchor_positions, epochs
from vllm_ctc_spec.training.card import card_text
from vllm_ctc_spec.training.checkpoint import RunPaths, publish
from vllm_ctc_spec.training.config import DTYPES, TrainConfig
from vllm_ctc_spec.training.data_config import DataConfig, is_dataset
from vllm_ctc_spec.training.dataset import (
    Example,
    check_dtype,
    open_dataset,
    recorded_settings,
    responses_dtype,
    target_fingerprint,
)
from vllm_ctc_spec.training.draft_tokens import choose_tokens
from vllm_ctc_spec.training.forecast import Forecast
from vllm_ctc_spec.training.hidden_states import in_process, stored
from vllm_ctc_spec.training.loop import TORCH_DTYPES, Trainer
from vllm_ctc_spec.training.memory import explain_out_of_memory
from vllm_ctc_spec.training.metrics import read_log
from vllm_ctc_spec.training.prompts import read_prompts
from vllm_ctc_spec.training.target import Target, TargetTables, TargetText
from vllm_ctc_spec.training.workers import SINGLE_PROCESS, Workers

OOM_REMEDIES = (
    "the same run goes on in less memory with more parts of a step (--accumulate); --dtype bf16, fewer --anchors, a "
    "smaller --batch-size, or --features stored, which needs no target beside the drafter, start another (--overwrite)"
)

TRAINED_FOR_EACH = 4  # sequences that were learned from for each held-out one, to compare their losses


def drafter_shape(config: TrainConfig, target: PreTrainedConfig) -> DrafterConfig:
    """The drafter that these settings describe for this target (DrafterConfigError)."""
    shape = {name: getattr(config, name) for name in (
        "target", "architecture", "frame_attention", "positional_rank", "num_frames", "num_labels", "num_layers",
        "markov_rank", "lattice", "transition_rank", "tree_nodes",
    )}  # fmt: skip
    if isinstance(config.draft_vocab_size, int):
        shape["draft_vocab_size"] = config.draft_vocab_size
    if config.aux_layers:
        shape["aux_hidden_state_layer_ids"] = config.aux_layers
    if target.architectures:  # of the whole model; the language model's own configuration does not name it
        shape["target_architecture"] = target.architectures[0]
    return DrafterConfig.for_target(target.get_text_config(), **shape)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that is checked and generated once for a run, before its processes work."""

    config: TrainConfig
    paths: RunPaths
    drafter_config: DrafterConfig
    examples: list[Example]
    held_out: list[Example]
    token_ids: list[int] | None = None  # of the draft vocabulary, increasing; None: the target's
    temperature: float = 0.0  # of the training responses; held-out ones are greedy


def load_target(config: TrainConfig, device: torch.device) -> Target | TargetTables:
    """As much of the target as the run needs."""
    kind = TargetTables if config.features == "stored" else Target
    return kind.load(config.target, device, TORCH_DTYPES[config.dtype])


def prepare(config: TrainConfig, paths: RunPaths, overwrite: bool, generate: Generate = generate_here) -> Prepared:
    """Check everything, then let the target answer prompts; nothing of the run itself is written.

    generate: answers shards of a file of prompts, by vLLM by default.
    """
    paths.check(config, overwrite)
    text = TargetText.load(config.target)
    if config.features == "target":
        text.refuse_quantised(
            config.target, "let it run the target: --features stored on what `vllm-ctc data --hidden-states` wrote"
        )
        text.check_layers(config.target)
    drafter_config = drafter_shape(config, text.config)
    folder = Path(config.data)
    if not is_dataset(folder):
        folder = paths.labels
        answer_prompts(config, text, folder, overwrite, generate)
    layer_ids = drafter_config.aux_hidden_state_layer_ids if config.features == "stored" else None
    examples, held_out = open_dataset(folder, target_fingerprint(config.target), layer_ids)
    if config.features == "target":
        check_dtype(folder, config.dtype)
    if not any(anchor_positions(example) for example in examples):
        raise TrainingError(
            f"The responses of {config.target} are one token long, so there is nothing to draft; "
            "use prompts that it answers at length."
        )
    token_ids, sentence = choose_tokens(config.draft_vocab_size, drafter_config.vocab_size, examples)
    print(sentence, Forecast.of(config, examples), sep="\n")
    drafter_config = dataclasses.replace(drafter_config, target_dtype=responses_dtype(folder))
    if token_ids is not None:
        drafter_config = dataclasses.replace(drafter_config, draft_vocab_size=len(token_ids))
    temperature = (recorded_settings(folder) or {}).get("temperature", 0.0)
    return Prepared(config, paths, drafter_config, examples, held_out, token_ids, temperature)


def answer_prompts(config: TrainConfig, text: TargetText, folder: Path, overwrite: bool, generate: Generate) -> None:
    """A dataset of the target's answers to the run's file of prompts, as `vllm-ctc data` writes it."""
    if config.features == "stored":
        raise TrainingError(
            f"--features stored needs hidden states, and {config.data} is no dataset: write one with "
            "`vllm-ctc data --hidden-states`."
        )
    shared = ("target", "max_new_tokens", "temperature", "seed", "held_out", "regenerate", "chat_template_kwargs")
    asked = DataConfig(
        prompts=config.data, output=folder, dtype=DTYPES[config.dtype],
        **{name: getattr(config, name) for name in shared},
    )  # fmt: skip
    prompts = read_prompts(config.data, prompt_builder(asked, text), config.held_out, config.regenerate)
    print(prompts.report())
    answer(asked, text, prompts, overwrite, generate)


def run_worker(prepared: Prepared, target: Target | TargetTables, workers: Workers = SINGLE_PROCESS) -> str | None:
    """One process's part of the run, on the target's device. The main process publishes and returns the report."""
    config, drafter_config, paths = prepared.config, prepared.drafter_config, prepared.paths
    layer_ids = drafter_config.aux_hidden_state_layer_ids
    hidden_states = stored(layer_ids) if config.features == "stored" else in_process(target, layer_ids)
    trainer = Trainer(config, drafter_config, hidden_states, target.embedding, target.head, workers, prepared.token_ids)
    trainer.run(prepared.examples, prepared.held_out, paths)
    if not workers.is_main:
        return None
    drafter = trainer.drafter_of(trainer.progress.best_weights)
    card = card_text(config, drafter, len(prepared.examples), prepared.temperature, trainer.progress.best)
    publish(drafter, config, paths, card)
    return f"{report(trainer, paths)}\n{advise(evidence_of(trainer, drafter, prepared))}"


def evidence_of(trainer: Trainer, drafter: CTCDrafter, prepared: Prepared) -> Evidence:
    """What the run knows about itself. Losses on held-out responses, which are greedy, compare with those on trained
    responses if these are greedy too."""
    config, examples = trainer.config, prepared.examples
    measurements = [Measurement(*each) for each in trainer.progress.measurements]
    passes = config.steps * config.batch_size / sum(bool(anchor_positions(example)) for example in examples)
    if prepared.temperature:
        return Evidence(passes, None, None, measurements)
    read = examples_read(examples, config)
    chosen = random.Random(config.seed).sample(read, min(len(read), TRAINED_FOR_EACH * len(prepared.held_out)))
    losses = (Estimate(*ratio(*trainer.losses(drafter, each))) for each in (chosen, prepared.held_out))
    return Evidence(passes, *losses, measurements)


def examples_read(examples: Sequence[Example], config: TrainConfig) -> list[Example]:
    """Different ones: all, or those of a run that was shorter than a pass. Two passes hold a whole one."""
    num_batches = min(config.steps, 2 * -(-len(examples) // config.batch_size))
    batches = epochs(examples, config.batch_size, config.seed, config.steps - num_batches)
    return list({id(each): each for batch in itertools.islice(batches, num_batches) for each in batch}.values())


def train(config: TrainConfig, paths: RunPaths, overwrite: bool, generate: Generate = generate_here) -> str:
    """Run or continue `config` in this process; returns the report to print. generate: as in `prepare`."""
    with explain_out_of_memory(OOM_REMEDIES):
        prepared = prepare(config, paths, overwrite, generate)
        target = load_target(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        paths.start(config, overwrite)
        return run_worker(prepared, target)


def share_of_labels(log: Sequence[dict], name: str) -> float:
    """Share of the labels that the count `name` makes; runs of an earlier version did not log it."""
    return sum(e.get(name, 0) for e in log) / max(1, sum(e["labels_total"] for e in log))


def report(trainer: Trainer, paths: RunPaths) -> str:
    config = trainer.config
    drafts = f"trees of {config.tree_nodes} nodes" if config.tree_nodes else f"chains of {config.num_labels} labels"
    speculative, log = {"method": "ctc", "model": str(paths.output)}, read_log(paths.work)
    return "\n".join([
        f"{paths.output}: best of {config.steps} steps is {trainer.progress.best_step}; "
        f"{share_of_labels(log, 'infeasible_labels_total'):.2%} of the labels did not fit {config.num_frames} frames, "
        f"{share_of_labels(log, 'outside_labels_total'):.2%} stood at or behind a token that is no label.",
        f"Held-out greedy acceptance length with {drafts}: {trainer.progress.best}.",
        f"Serve it: vllm serve {config.target} --speculative-config '{json.dumps(speculative)}'",
    ])  # fmt: skip
