"""A dataset: the target's own responses, and optionally its hidden states, in shards that a rerun continues.

    settings.json                what generated the responses; other settings are refused
    train-00000.jsonl            one {"prompt": [ids], "response": [ids]} a line
    train-00000.safetensors      hidden_states [tokens of the shard, in order, A * H] bfloat16 (optional)
    held-out-00000.jsonl         greedy responses, which measure acceptance

Every file appears whole or not at all, so that a killed run is continued by making the missing ones.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import DTYPES
from vllm_ctc_spec.training.files import differing_settings, new_file
from vllm_ctc_spec.training.prompts import Prompts
from vllm_ctc_spec.training.target import loading

SETTINGS_NAME = "settings.json"
LOG_NAME = "vllm.log"  # of the engines that generate
PARTS = ("held-out", "train")
SHARD_PROMPTS = 128  # generated and written together: what a kill can lose
RESPONSES_SUFFIX, STATES_SUFFIX = ".jsonl", ".safetensors"
STATES_NAME = "hidden_states"
LAYERS_NAME = "aux_hidden_state_layer_ids"


@dataclasses.dataclass(frozen=True)
class StoredStates:
    """Where an example's hidden states lie: rows `start ..` of a shard's file."""

    path: Path
    start: int


@dataclasses.dataclass(frozen=True)
class Example:
    """Token ids of one prompt and of the target's response, its end token included."""

    prompt: list[int]
    response: list[int]
    states: StoredStates | None = dataclasses.field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Prompts whose responses are generated and written together."""

    part: str
    index: int
    rows: list[int]  # of the prompts, in their part: the same however prompts are shared out among shards
    prompts: list[list[int]]
    temperature: float

    def path(self, folder: Path, suffix: str = RESPONSES_SUFFIX) -> Path:
        return folder / f"{self.part}-{self.index:05d}{suffix}"


Responses = list[list[int]]
Advance = Callable[[int], object]
"""Called with the number of prompts that have just been answered, before their shard is whole."""
Respond = Callable[[Sequence[Shard], Advance], Iterable[tuple[Shard, Responses]]]
"""Generates shards, in any order, each as soon as it is there; one response per prompt."""
ComputeStates = Callable[[Sequence[Shard], Advance], Iterable[tuple[Shard, Tensor]]]
"""The same for hidden states: `[tokens of the shard's examples, A * H]`."""


def plan_shards(prompts: Prompts, temperature: float) -> list[Shard]:
    """Like lengths together, for little padding. Held-out responses are greedy: they measure greedy acceptance."""
    shards = []
    for part, rows, shard_temperature in (("held-out", prompts.held_out, 0.0), ("train", prompts.train, temperature)):
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for index, start in enumerate(range(0, len(order), SHARD_PROMPTS)):
            chosen = order[start : start + SHARD_PROMPTS]
            shards.append(Shard(part, index, chosen, [rows[row] for row in chosen], shard_temperature))
    return shards


def dataset_settings(
    target: str, prompts: Prompts, max_new_tokens: int, temperature: float, seed: int, dtype: str
) -> dict[str, Any]:
    """What decides the responses, to be recorded with them."""
    return {
        "prompts": hashlib.sha256(json.dumps([prompts.train, prompts.held_out]).encode()).hexdigest()[:16],
        "train_prompts": len(prompts.train),
        "held_out": len(prompts.held_out),
        "shard_prompts": SHARD_PROMPTS,
        "target_weights": target_fingerprint(target),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed if temperature else None,
        "chat_template_kwargs": prompts.chat_template_kwargs,
        "dtype": dtype,
    }


def responses_dtype(folder: Path) -> str:
    """Of the target as it said what is in this dataset; "" where that is unknown."""
    return (_recorded_settings(folder) or {}).get("dtype", "")


def check_dtype(folder: Path, dtype: str) -> None:
    """Say so if the target runs in another dtype than the one in which it said what is in this dataset."""
    recorded = responses_dtype(folder)
    if recorded and recorded != DTYPES[dtype]:
        print(
            f"The target said the responses in {folder} in {recorded} and runs in {DTYPES[dtype]} here, in which it "
            "would say some of them otherwise."
        )


def target_fingerprint(folder: str) -> str:
    """Tells a target retrained in the same folder: the first values of every parameter in its files."""
    digest = hashlib.sha256()
    paths = sorted(Path(folder).glob("*.safetensors"))
    with loading(folder):
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    values = file.get_slice(name)
                    first = values[:1] if values.get_shape() else file.get_tensor(name)
                    digest.update(name.encode() + first.flatten()[:64].float().numpy().tobytes())
        for path in () if paths else sorted(Path(folder).glob("*.bin")):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def check_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Refuse a folder that holds something else or, without `overwrite`, a dataset of other settings.

    Writes nothing; returns whether what is there is to be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; give a folder for the dataset.")
    # A kill while the settings were written leaves a temporary file and the log, an engine that fails the log alone.
    if not folder.exists() or all(path.suffix == ".tmp" or path.name == LOG_NAME for path in folder.iterdir()):
        return False
    if _recorded_settings(folder) is None:
        raise TrainingError(f"{folder} holds something that is not a dataset; use another folder.")
    differing = differing_settings(folder / SETTINGS_NAME, settings)
    if differing and not overwrite:
        raise TrainingError(
            f"The responses in {folder} were generated with other settings ({', '.join(differing)}); "
            "use --overwrite or another folder."
        )
    return bool(differing)


def _recorded_settings(folder: Path) -> dict[str, Any] | None:
    """None unless this folder is a dataset."""
    try:
        recorded = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) and {"prompts", "target_weights"} <= recorded.keys() else None


def write_responses(
    folder: Path, settings: dict[str, Any], shards: Sequence[Shard], respond: Respond, overwrite: bool
) -> None:
    """Generate the shards that the folder lacks, in which nothing changes before the first one is there."""
    replace = check_folder(folder, settings, overwrite)
    missing = [shard for shard in shards if replace or not _is_whole(shard.path(folder), len(shard.prompts))]
    for shard, responses in _with_progress("responses", shards, missing, respond):
        if replace or not (folder / SETTINGS_NAME).is_file():
            _claim(folder, settings)
            replace = False
        shard.path(folder, STATES_SUFFIX).unlink(missing_ok=True)  # those of responses that are gone
        rows = [{"prompt": p, "response": r} for p, r in zip(shard.prompts, responses, strict=True)]
        with new_file(shard.path(folder)) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
    return [shard for shard in shards if _stored_layers(shard.path(folder, STATES_SUFFIX)) != layer_ids]


def check_room(folder: Path, shards: Sequence[Shard], layer_ids: tuple[int, ...], hidden_size: int) -> str:
    """What `write_states` will add, for the user to read; TrainingError if the disk has no room for it."""
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
    """What `produce` makes of the missing shards; it is not even called when nothing is missing."""
    total, left = (sum(len(shard.prompts) for shard in some) for some in (shards, missing))
    whole = total - left
    with tqdm(total=total, initial=whole, desc=label, unit="prompt") as bar:
        for shard, content in produce(missing, bar.update) if missing else ():
            yield shard, content
            whole += len(shard.prompts)
            bar.update(max(0, whole - bar.n))  # what the bar was not told of before


def read_shard(path: Path) -> list[Example]:
    """Examples of one shard; they know where their hidden states lie, if they were stored."""
    states = path.with_suffix(STATES_SUFFIX)
    stored, start, examples = states.is_file(), 0, []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            where = StoredStates(states, start) if stored else None
            examples.append(Example(**json.loads(line), states=where))
            start += len(examples[-1])
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it and run `vllm-ctc data` again.") from error
    return examples


def read_examples(folder: Path, part: str) -> list[Example]:
    return [e for path in sorted(folder.glob(f"{part}-*{RESPONSES_SUFFIX}")) for e in read_shard(path)]


def open_dataset(
    folder: Path, fingerprint: str, layer_ids: tuple[int, ...] | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of a complete dataset of the target with this `target_fingerprint`.

    With `layer_ids`, the hidden states after these layers must be stored too.
    """
    settings = _recorded_settings(folder)
    if settings is None:
        raise TrainingError(f"{folder} is not a dataset: write one with `vllm-ctc data`, or give a file of prompts.")
    if settings["target_weights"] != fingerprint:
        raise TrainingError(
            f"The dataset {folder} holds the responses of another target (weights {settings['target_weights']}, not "
            f"{fingerprint}); generate this target's with `vllm-ctc data`."
        )
    train, held_out = (read_examples(folder, part) for part in ("train", "held-out"))
    if (len(train), len(held_out)) != (settings["train_prompts"], settings["held_out"]):
        raise TrainingError(
            f"The dataset {folder} is incomplete ({len(train) + len(held_out)} responses of "
            f"{settings['train_prompts'] + settings['held_out']}); the `vllm-ctc data` that started it continues it."
        )
    if layer_ids is not None:
        _check_stored_layers(train + held_out, layer_ids)
    return train, held_out


def _stored_layers(path: Path) -> tuple[int, ...] | None:
    """Layers whose hidden states are in this file; None without a file, or with a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return tuple(json.loads(file.metadata()[LAYERS_NAME]))
    except (FileNotFoundError, SafetensorError):
        return None


def _check_stored_layers(examples: Sequence[Example], layer_ids: tuple[int, ...]) -> None:
    for path in {example.states and example.states.path for example in examples}:
        stored = path and _stored_layers(path)
        if not set(layer_ids) <= set(stored or ()):
            raise TrainingError(
                f"{path.parent if path else 'The dataset'} holds hidden states after "
                f"{f'layers {list(stored)}' if stored else 'no layers'}, not after {list(layer_ids)}; "
                "repeat `vllm-ctc data` with --hidden-states and --aux-layers, or let the target run beside the "
                "training."
            )


def stored_states(examples: Sequence[Example], layer_ids: tuple[int, ...]) -> Tensor:
    """Auxiliary hidden states `[B, S, A * H]` fp32, padded with zeros on the right, from files mapped into memory."""
    rows = []
    for example in examples:
        with safe_open(example.states.path, "pt") as file:
            stored = json.loads(file.metadata()[LAYERS_NAME])
            start = example.states.start
            states = file.get_slice(STATES_NAME)[start : start + len(example)].unflatten(1, (len(stored), -1))
            rows.append(states[:, [stored.index(layer) for layer in layer_ids]].flatten(1))
    return pad_sequence(rows, batch_first=True).float()
