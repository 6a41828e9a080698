"""A dataset: the target's own responses, and optionally its hidden states, in shards that a rerun continues.

    settings.json                what generated the responses; other settings are refused
    train-00000.jsonl            one {"prompt": [ids], "response": [ids]} a line; or several, one for each turn of a
                                 conversation, as {"turns": [{"turn": 1, "prompt": [ids], "response": [ids]}, ...]}
    train-00000.safetensors      hidden_states [tokens of the shard, in order, A * H] bfloat16 (optional)
    held-out-00000.jsonl         greedy responses, which measure acceptance

Every file appears whole or not at all, so that a killed run is continued by making the missing ones.
"""

import dataclasses
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_ctc_spec.drafter.weights import weights_fingerprint
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.config import DTYPES
from vllm_ctc_spec.training.conversations import Conversation
from vllm_ctc_spec.training.data_config import SETTINGS_NAME
from vllm_ctc_spec.training.target import loading

LOG_NAME = "vllm.log"  # of the engines that generate
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
    turn: int = 1  # user messages in the prompt
    states: StoredStates | None = dataclasses.field(default=None, compare=False, repr=False)
    # The same in all turns of one.
    conversation: Hashable = dataclasses.field(default_factory=object, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Conversations whose responses are generated and written together."""

    part: str
    index: int
    rows: list[int]  # in their part: the same however conversations are shared out among shards
    conversations: list[Conversation]
    temperature: float

    @property
    def num_answers(self) -> int:
        return sum(conversation.num_answers for conversation in self.conversations)

    def path(self, folder: Path, suffix: str = RESPONSES_SUFFIX) -> Path:
        return folder / f"{self.part}-{self.index:05d}{suffix}"


def responses_dtype(folder: Path) -> str:
    """The target's dtype while it answered for this dataset; "" where that is unknown."""
    return (recorded_settings(folder) or {}).get("dtype", "")


def check_dtype(folder: Path, dtype: str) -> None:
    """Say so if the target now runs in another dtype than while it answered for this dataset."""
    recorded = responses_dtype(folder)
    if recorded and recorded != DTYPES[dtype]:
        print(
            f"The target said the responses in {folder} in {recorded} and runs in {DTYPES[dtype]} here, in which it "
            "would say some of them otherwise."
        )


def target_fingerprint(folder: str) -> str:
    """Tells a target retrained in the same folder."""
    with loading(folder):
        return weights_fingerprint(folder)


def recorded_settings(folder: Path) -> dict[str, Any] | None:
    """None unless this folder is a dataset."""
    try:
        recorded = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) and {"prompts", "target_weights"} <= recorded.keys() else None


def read_shard(path: Path) -> list[Example]:
    """Examples of one shard; they know where their hidden states lie, if they were stored."""
    states = path.with_suffix(STATES_SUFFIX)
    stored, start, examples = states.is_file(), 0, []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            fields = json.loads(line)
            for turn in fields.get("turns", [fields]):
                where = StoredStates(states, start) if stored else None
                examples.append(Example(**turn, states=where, conversation=(path.name, number)))
                start += len(examples[-1])
    except (OSError, ValueError, TypeError, AttributeError) as error:
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
    settings = recorded_settings(folder)
    if settings is None:
        raise TrainingError(f"{folder} is not a dataset: write one with `vllm-ctc data`, or give a file of prompts.")
    if settings["target_weights"] != fingerprint:
        raise TrainingError(
            f"The dataset {folder} holds the responses of another target (weights {settings['target_weights']}, not "
            f"{fingerprint}); generate this target's with `vllm-ctc data`."
        )
    train, held_out = (read_examples(folder, part) for part in ("train", "held-out"))
    rows, expected = num_conversations(train + held_out), settings["train_prompts"] + settings["held_out"]
    if rows != expected:
        raise TrainingError(
            f"The dataset {folder} is incomplete (responses to {rows} rows of {expected}); the `vllm-ctc data` that "
            "started it continues it."
        )
    if layer_ids is not None:
        _check_stored_layers(train + held_out, layer_ids)
    return train, held_out


def num_conversations(examples: Sequence[Example]) -> int:
    """Rows of the file that these examples are turns of."""
    return len({example.conversation for example in examples})


def stored_layers(path: Path) -> tuple[int, ...] | None:
    """Layers whose hidden states are in this file; None if the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            return tuple(json.loads(file.metadata()[LAYERS_NAME]))
    except (FileNotFoundError, SafetensorError):
        return None


def _check_stored_layers(examples: Sequence[Example], layer_ids: tuple[int, ...]) -> None:
    for path in {example.states and example.states.path for example in examples}:
        stored = path and stored_layers(path)
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
