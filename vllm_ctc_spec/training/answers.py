"""The target's own answers by vLLM's offline engine, written as a dataset, and its hidden states beside them."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vllm_ctc_spec.drafter.config import default_aux_layer_ids
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import LOG_NAME, Shard, read_examples
from vllm_ctc_spec.training.dataset_writer import (
    PARTS,
    Advance,
    Answers,
    check_folder,
    check_room,
    dataset_settings,
    plan_shards,
    write_responses,
    write_states,
)
from vllm_ctc_spec.training.engine import Engine, EngineConfig, engine_dtype, log_is_chosen
from vllm_ctc_spec.training.extract_hidden_states import HANDOVER_PREFIX, HANDOVER_SUFFIX, compute_states
from vllm_ctc_spec.training.prompts import PromptBuilder, Prompts, read_prompts
from vllm_ctc_spec.training.target import TargetText

CONVERSATION_ENDED = "their conversations had no more room, or were refused by the target's chat template"

Generate = Callable[[EngineConfig, Sequence[Shard], Advance], Iterable[tuple[Shard, Answers]]]
"""Answers shards with an engine like this, in any order, and yields each as soon as it is answered."""


def generate_here(config: EngineConfig, shards: Sequence[Shard], advance: Advance) -> Iterator[tuple[Shard, Answers]]:
    with contextlib.closing(Engine(config)) as engine:
        for shard in shards:
            yield shard, engine.responses(shard, advance)


def answer(
    config: DataConfig, text: TargetText, prompts: Prompts, overwrite: bool, generate: Generate = generate_here
) -> list[Shard]:
    """Write or continue the responses of a dataset; returns its shards."""
    dtype = engine_dtype(config.dtype, text.config)
    settings = dataset_settings(config.target, prompts, config.max_new_tokens, config.temperature, config.seed, dtype)
    check_folder(config.output, settings, overwrite)
    for leftover in config.output.glob(f"{HANDOVER_PREFIX}*{HANDOVER_SUFFIX}"):  # of a run that was killed
        shutil.rmtree(leftover)
    shards = plan_shards(prompts, config.temperature)
    write_responses(
        config.output, settings, shards, functools.partial(generate, _engine_config(config, text, prompts)), overwrite
    )
    return shards


def make_dataset(config: DataConfig, overwrite: bool, generate: Generate = generate_here) -> str:
    """Write or continue the dataset; returns the report to print."""
    text = TargetText.load(config.target)
    layer_ids = config.aux_layers or default_aux_layer_ids(text.num_layers)
    if not all(1 <= layer <= text.num_layers for layer in layer_ids):
        raise TrainingError(
            f"--aux-layers must be between 1 and {text.num_layers}, the target's layers, not {list(layer_ids)}."
        )
    prompts = read_prompts(config.prompts, prompt_builder(config, text), config.held_out, config.regenerate)
    print(prompts.report())
    shards = answer(config, text, prompts, overwrite, generate)
    if config.hidden_states:
        print(check_room(config.output, shards, layer_ids, text.config.get_text_config().hidden_size))
        compute = functools.partial(
            compute_states, _engine_config(config, text, prompts), config.output, layer_ids=layer_ids
        )
        write_states(config.output, shards, layer_ids, compute)
    return f"{config.output}: {_answered(config.output, prompts)}"


def prompt_builder(config: DataConfig, text: TargetText) -> PromptBuilder:
    return PromptBuilder(text, text.max_length, config.max_new_tokens, config.chat_template_kwargs)


def _answered(folder: Path, prompts: Prompts) -> str:
    """A sentence on the responses of a whole dataset."""
    asked = {part: sum(c.num_answers for c in rows) for part, rows in zip(PARTS, (prompts.held_out, prompts.train))}
    counts = {part: len(read_examples(folder, part)) for part in PARTS} if prompts.regenerate else asked
    ended = sum(asked.values()) - sum(counts.values())
    behind = f"; {ended} later turns left out: {CONVERSATION_ENDED}" if ended else ""
    return f"{counts['train']} responses for training, {counts['held-out']} held out{behind}."


def _engine_config(config: DataConfig, text: TargetText, prompts: Prompts) -> EngineConfig:
    longest = prompt_builder(config, text).longest(prompts.train + prompts.held_out)
    return EngineConfig(
        target=config.target,
        dtype=engine_dtype(config.dtype, text.config),
        max_length=text.max_length,
        # A cache for the target's own maximum may need more memory than there is.
        max_model_len=min(text.max_length, longest + config.max_new_tokens),
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        tensor_parallel_size=config.tensor_parallel_size,
        log=None if log_is_chosen() else str(config.output / LOG_NAME),
        chat_template_kwargs=config.chat_template_kwargs,
    )
