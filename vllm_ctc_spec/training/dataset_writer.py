"""Writing a dataset: the target's responses and hidden states, shard by shard, each whole or not at all."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.conversations import Answer, Conversation
from vllm_ctc_spec.training.data_config import SETTINGS_NAME
from vllm_ctc_spec.training.dataset import (
    LAYERS_NAME,
    LOG_NAME,
    RESPONSES_SUFFIX,
    STATES_NAME,
    STATES_SUFFIX,
    Shard,
    read_shard,
    recorded_settings,
    stored_layers,
    target_fingerprint,
)
from vllm_ctc_spec.training.files import differing_settings, new_file
from vllm_ctc_spec.training.prompts import Prompts

PARTS = ("held-out", "train")
SHARD_PROMPTS = 128  # rows that are answered and written together: a kill can lose so many

Answers = list[list[Answer]]
"""Of each conversation of a shard."""
Advance = Callable[[int], object]
"""Called with the number of prompts that have just been answered, before their shard is whole."""
Respond = Callable[[Sequence[Shard], Advance], Iterable[tuple[Shard, Answers]]]
"""Generates shards, in any order, and yields each as soon as it is complete."""
ComputeStates = Callable[[Sequence[Shard], Advance], Iterable[tuple[Shard, Tensor]]]
"""The same for hidden states: `[tokens of the shard's examples, A * H]`."""


def plan_shards(prompts: Prompts, temperature: float) -> list[Shard]:
    """Like lengths together, for little padding. Held-out responses are greedy: they measure greedy acceptance."""
    shards = []
    for part, rows, shard_temperature in (("held-out", prompts.held_out, 0.0), ("train", prompts.train, temperature)):
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].prompts[-1]))
        for index, start in enumerate(range(0, len(order), SHARD_PROMPTS)):
            chosen = order[start : start + SHARD_PROMPTS]
            shards.append(Shard(part, index, chosen, [rows[row] for row in chosen], shard_temperature))
    return shards


def dataset_settings(
    target: str, prompts: Prompts, max_new_tokens: int, temperature: float, seed: int, dtype: str
) -> dict[str, Any]:
    """Everything that decides the responses, to be recorded with them."""
    return {
        "prompts": _digest(prompts),
        "train_prompts": len(prompts.train),
        "held_out": len(prompts.held_out),
        "shard_prompts": SHARD_PROMPTS,
        "target_weights": target_fingerprint(target),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed if temperature else None,
        "chat_template_kwargs": prompts.chat_template_kwargs,
        "regenerate": prompts.regenerate or None,
        "dtype": dtype,
    }


def _digest(prompts: Prompts) -> str:
    """Rows of one prompt count by its token ids, as they always have."""

    def content(conversation: Conversation) -> Any:
        (first, *later) = conversation.prompts
        alone = not later and conversation.regenerate is None
        return first if alone else dataclasses.asdict(conversation)

    parts = [[content(conversation) for conversation in part] for part in (prompts.train, prompts.held_out)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Refuse a folder that holds something else or, without `overwrite`, a dataset of other settings.

    Writes nothing; returns whether the folder's content is to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; give a folder for the dataset.")
    # A kill while the settings were written leaves a temporary file and the log. An engine that fails leaves the log.
    if not folder.exists() or all(path.suffix == ".tmp" or path.name == LOG_NAME for path in folder.iterdir()):
        return False
    if recorded_settings(folder) is None:
        raise TrainingError(f"{folder} holds something that is not a dataset; use another folder.")
    differing = differing_settings(folder / SETTINGS_NAME, settings)
    if differing and not overwrite:
        raise TrainingError(
            f"The responses in {folder} were generated with other settings ({', '.join(differing)}); "
            "use --overwrite or another folder."
        )
    return bool(differing)


def write_responses(
    folder: Path, settings: dict[str, Any], shards: Sequence[Shard], respond: Respond, overwrite: bool
) -> None:
    """Generate the shards that the folder lacks. The folder does not change before the first one is complete."""
    replace = check_folder(folder, settings, overwrite)
    missing = [shard for shard in shards if replace or not _is_whole(shard.path(folder), len(shard.rows))]
    for shard, answers in _with_progress("responses", shards, missing, respond):
        if replace or not (folder / SETTINGS_NAME).is_file():
            _claim(folder, settings)
            replace = False
        shard.path(folder, STATES_SUFFIX).unlink(missing_ok=True)  # states of responses that are gone
        lines = [json.dumps(_line(of_row)) + "\n" for _, of_row in zip(shard.rows, answers, strict=True)]
        with new_file(shard.path(folder)) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def _line(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of one row."""
    turns = [dataclasses.asdict(answer) for answer in answers]
    if len(answers) == answers[0].turn == 1:
        del turns[0]["turn"]
        return turns[0]
    return {"turns": turns}


def _is_whole(path: Path, num_rows: int) -> bool:
    """Whether the shard has all of its lines; a damaged disk may have cut it."""
    return path.is_file() and path.read_bytes().count(b"\n") == num_rows


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Forget a dataset of other settings, then record these: a kill in between leaves an empty dataset."""
    for part in PARTS:
        for suffix in (RESPONSES_SUFFIX, STATES_SUFFIX):
            for stale in folder.glob(f"{part}-*{suffix}"):
                stale.unlink()
    with new_file(folder / SETTINGS_NAME) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_states(folder: Path, shards: Sequence[Shard], layer_ids: tuple[int, ...], compute: ComputeStates) -> None:
    """Add the hidden states after these layers to the shards that lack them."""
    missing = _without_states(folder, shards, layer_ids)
    for shard, states in _with_progress("hidden states", shards, missing, compute):
        with new_file(shard.path(folder, STATES_SUFFIX)) as temporary:
            save_file({STATES_NAME: states.bfloat16()}, temporary, {LAYERS_NAME: json.dumps(layer_ids)})


def _without_states(folder: Path, shards: Sequence[Shard], layer_ids: tuple[int, ...]) -> list[Shard]:
    return [shard for shard in shards if stored_layers(shard.path(folder, STATES_SUFFIX)) != layer_ids]


def check_room(folder: Path, shards: Sequence[Shard], layer_ids: tuple[int, ...], hidden_size: int) -> str:
    """A sentence on the bytes that `write_states` will add; TrainingError if the disk has no room for them."""
    missing = _without_states(folder, shards, layer_ids)
    tokens = sum(len(example) for shard in missing for example in read_shard(shard.path(folder)))
    size = tokens * len(layer_ids) * hidden_size * 2  # bfloat16
    replaced = [path for shard in missing if (path := shard.path(folder, STATES_SUFFIX)).is_file()]
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in replaced)
    what = f"hidden states of {tokens} tokens after {len(layer_ids)} layers take {size / 1e9:.2f} GB"
    if size > free:
        raise TrainingError(
            f"The {what}, and {folder} has room for {free / 1e9:.2f} GB: use fewer --aux-layers, fewer prompts or "
            "another disk, or leave --hidden-states out and let the target run beside the training."
        )
    return f"The {what}; there is room for {free / 1e9:.2f} GB."


def _with_progress(
    label: str,
    shards: Sequence[Shard],
    missing: Sequence[Shard],
    produce: Callable[[Sequence[Shard], Advance], Iterable[tuple[Shard, Any]]],
) -> Iterator[tuple[Shard, Any]]:
    """The results of `produce` for the missing shards. It is not even called when nothing is missing."""
    total, left = (sum(shard.num_answers for shard in some) for some in (shards, missing))
    whole = total - left
    with tqdm(total=total, initial=whole, desc=label, unit="prompt") as bar:
        for shard, content in produce(missing, bar.update) if missing else ():
            yield shard, content
            whole += shard.num_answers
            bar.update(max(0, whole - bar.n))  # answers that the bar was not told of before
