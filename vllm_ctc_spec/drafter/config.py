"""Drafter configuration: one dataclass, its speculators-format file, and what it refuses.

A CTC drafter is a folder with `config.json` and `model.safetensors`. The file follows the speculators format
that vLLM reads (`vllm/transformers_utils/configs/speculators`): no `model_type`, `speculators_model_type`
"ctc", a `transformer_layer_config` for the Attention Draft Module's layers and a `speculators_config` with the
default budget and the target (the "verifier"). Every field is checked when it is read: one sentence refuses an
unknown or contradictory field, and none is ignored.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ctc_spec.errors import DrafterConfigError, shown
from vllm_ctc_spec.kernels.limits import MAX_NODES

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
DRAFTER_SUBFOLDER = "ctc_drafter"
"""A target's folder may carry its drafter under this name; `{"method": "ctc"}` alone then finds it."""

ARCHITECTURE = "CTCDraftModel"
SPECULATORS_TYPE = "ctc"
MAX_CONFIG_BYTES = 2**20  # a real one has two thousand
MAX_LAYERS = 64
MAX_SIZE = 2**20  # of one dimension of a weight: no vocabulary or layer is larger, and no product of three overflows
MAX_FRAMES = 64
ARCHITECTURES = ("adm", "specformer")
"""How frames come about. "adm", the Attention Draft Module: each is a query of its own to the context. "specformer":
the anchor alone attends to the context, and all frames are made from its state."""
FRAME_ATTENTION = ("bidirectional", "causal")
LATTICES = ("ctc", "transitions", "slots")
"""How frames spell labels. "ctc": a blank, and repeats merge. "transitions": learned probabilities of the step from the
frame of one label to the frame of the next. "slots": frame k is label k, as in parallel drafters without alignments."""
NUM_AUX_LAYERS = 5


LIMITS = {
    "hidden_size": (1, MAX_SIZE),
    "vocab_size": (1, MAX_SIZE),
    "draft_vocab_size": (1, MAX_SIZE),
    "target_num_layers": (1, MAX_SIZE),
    "num_frames": (1, MAX_FRAMES),
    "num_labels": (1, MAX_FRAMES),
    "positional_rank": (0, MAX_SIZE),
    "transition_rank": (0, MAX_SIZE),
    "markov_rank": (0, MAX_SIZE),
    "tree_nodes": (0, MAX_NODES),
    "num_layers": (1, MAX_LAYERS),
    "num_attention_heads": (1, MAX_SIZE),
    "num_key_value_heads": (1, MAX_SIZE),
    "head_dim": (1, MAX_SIZE),
    "intermediate_size": (1, MAX_SIZE),
    "max_position_embeddings": (1, 2**31 - 1),
}
CHOICES = {"architecture": ARCHITECTURES, "frame_attention": FRAME_ATTENTION, "lattice": LATTICES}
FLOAT_LIMITS = {"rms_norm_eps": (1e-30, 1), "rope_theta": (1, 1e12)}


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Shape of one drafter and of the target that it was trained for.

    Hidden size and vocabulary are the target's own: embedding and head are shared with it and not saved. Frames hold
    `draft_vocab_size` labels, all of the target's tokens (0) or the frequent ones (`vocabulary.py`).
    `aux_hidden_state_layer_ids` counts layers of the target already run (1 = after the first layer), as
    `eagle_aux_hidden_state_layer_ids` does in vLLM.
    """

    hidden_size: int
    vocab_size: int
    target_num_layers: int
    aux_hidden_state_layer_ids: tuple[int, ...]
    draft_vocab_size: int = 0
    architecture: str = "adm"  # one of ARCHITECTURES
    frame_attention: str = "bidirectional"  # one of FRAME_ATTENTION; "causal" in a SpecFormer only
    positional_rank: int = 0  # of a SpecFormer's map from a state to T frames, 0 = whole: T * H * H weights
    num_frames: int = 12  # T
    num_labels: int = 8  # U, the label horizon of training and the default number of speculative tokens
    lattice: str = "ctc"  # one of LATTICES
    transition_rank: int = 0  # of the learned transitions' queries and keys, 0 in the other lattices
    markov_rank: int = 0  # rank of the label-conditional head, 0 = none
    tree_nodes: int = 0  # the tree that this drafter is served with by default, 0 = a chain of num_labels
    num_layers: int = 1  # in which frames attend to each other; a SpecFormer has one before them, for the context
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    target: str = ""
    target_architecture: str = "LlamaForCausalLM"
    target_dtype: str = ""  # the target's while it answered the training prompts, such as "bfloat16"; "": unknown

    def __post_init__(self) -> None:
        if self.intermediate_size == 0:
            object.__setattr__(self, "intermediate_size", self.hidden_size * 8 // 3)
        if self.draft_vocab_size == 0:
            object.__setattr__(self, "draft_vocab_size", self.vocab_size)
        for name, (smallest, largest) in LIMITS.items():
            _check_integer(name, getattr(self, name), smallest, largest)
        for name, (lowest, highest) in FLOAT_LIMITS.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not lowest <= value <= highest:
                raise DrafterConfigError(
                    f"CTC drafter: {name} must be a number from {lowest:g} to {highest:g}, not {shown(value)}."
                )
        for name in ("target", "target_architecture", "target_dtype"):
            if type(getattr(self, name)) is not str:
                raise DrafterConfigError(f"CTC drafter: {name} must be a string, not {shown(getattr(self, name))}.")
        if self.draft_vocab_size > self.vocab_size:
            raise DrafterConfigError(
                f"CTC drafter: draft_vocab_size is {self.draft_vocab_size}, but the target has {self.vocab_size} "
                "tokens; give at most as many."
            )
        if self.num_labels > self.num_frames:
            raise DrafterConfigError(
                f"CTC drafter: num_labels is {self.num_labels}, but {self.num_frames} frames hold 1 to "
                f"{self.num_frames} labels; lower num_labels or raise num_frames."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise DrafterConfigError(
                    f"CTC drafter: {name} must be one of {', '.join(known)}, not {shown(getattr(self, name))}."
                )
        if self.architecture != "specformer" and (self.frame_attention == "causal" or self.positional_rank):
            raise DrafterConfigError(
                f"CTC drafter: frame_attention {self.frame_attention!r} and positional_rank {self.positional_rank} are "
                "a SpecFormer's; leave them out, or set architecture to 'specformer'."
            )
        if (self.transition_rank > 0) != (self.lattice == "transitions"):
            raise DrafterConfigError(
                f"CTC drafter: transition_rank is {self.transition_rank}, but it must be more than 0 with lattice "
                "'transitions' and 0 with the others."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise DrafterConfigError(
                f"CTC drafter: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads; make one divide the other."
            )
        if self.head_dim % 2:
            raise DrafterConfigError(
                f"CTC drafter: head_dim must be even, not {self.head_dim}, because rotary embeddings turn pairs."
            )
        self._check_layer_ids()

    def _check_layer_ids(self) -> None:
        ids = self.aux_hidden_state_layer_ids
        if type(ids) is list:
            object.__setattr__(self, "aux_hidden_state_layer_ids", tuple(ids))
        are_integers = type(ids) in (list, tuple) and all(type(layer) is int for layer in ids)
        if (
            not are_integers
            or not ids
            or any(a >= b for a, b in zip(ids, ids[1:]))
            or ids[0] < 1
            or ids[-1] > self.target_num_layers
        ):
            raise DrafterConfigError(
                f"CTC drafter: aux_hidden_state_layer_ids {shown(ids)} must be increasing numbers from 1 to "
                f"{self.target_num_layers}, the target's layers."
            )

    @property
    def has_draft_vocabulary(self) -> bool:
        """Whether only a part of the target's tokens are labels."""
        return self.draft_vocab_size < self.vocab_size

    @property
    def num_query_rows(self) -> int:
        """Rows of a draft that attend to the context, the anchor's first. Each takes a slot of the drafter's cache."""
        return 1 if self.architecture == "specformer" else 1 + self.num_frames

    @property
    def num_markov_inputs(self) -> int:
        """Rows of the label-conditional head's input table: the labels, and one row for anchors that are no label."""
        return self.draft_vocab_size + self.has_draft_vocabulary

    @classmethod
    def for_target(cls, target_config: Any, target: str = "", **overrides: Any) -> "DrafterConfig":
        """A drafter with the target's own layer shape; `target_config` is a Hugging Face configuration."""
        heads = target_config.num_attention_heads
        shape = dict(
            hidden_size=target_config.hidden_size,
            vocab_size=target_config.vocab_size,
            target_num_layers=target_config.num_hidden_layers,
            aux_hidden_state_layer_ids=default_aux_layer_ids(target_config.num_hidden_layers),
            num_attention_heads=heads,
            num_key_value_heads=getattr(target_config, "num_key_value_heads", None) or heads,
            head_dim=getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
            intermediate_size=target_config.intermediate_size,
            rms_norm_eps=getattr(target_config, "rms_norm_eps", 1e-6),
            max_position_embeddings=positions_of(target_config),
            target=target,
            target_architecture=(getattr(target_config, "architectures", None) or ["LlamaForCausalLM"])[0],
        )
        return cls(**{**shape, **overrides})

    def check_target(self, hidden_size: int, vocab_size: int, num_layers: int) -> None:
        """Refuse a target of another shape (DrafterConfigError)."""
        pairs = (
            ("hidden size", self.hidden_size, hidden_size),
            ("vocabulary size", self.vocab_size, vocab_size),
            ("number of layers", self.target_num_layers, num_layers),
        )
        for what, mine, theirs in pairs:
            if mine != theirs:
                raise DrafterConfigError(
                    f"The CTC drafter was trained for a target with {what} {mine}, but this target has {theirs}; "
                    f"serve it with its own target{f' ({shown(self.target)})' if self.target else ''} or train a "
                    "drafter for this one with `vllm-ctc train`."
                )

    def to_dict(self) -> dict[str, Any]:
        """The speculators-format content of `config.json`."""
        return {
            "architectures": [ARCHITECTURE],
            "speculators_model_type": SPECULATORS_TYPE,
            "speculators_config": {
                "algorithm": SPECULATORS_TYPE,
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": self.num_labels}],
                "verifier": {"name_or_path": self.target, "architectures": [self.target_architecture]},
            },
            "transformer_layer_config": {
                "model_type": "qwen3",
                "hidden_size": self.hidden_size,
                "vocab_size": self.vocab_size,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "head_dim": self.head_dim,
                "intermediate_size": self.intermediate_size,
                "rms_norm_eps": self.rms_norm_eps,
                "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
                "max_position_embeddings": self.max_position_embeddings,
                "hidden_act": "silu",
                "attention_bias": False,
            },
            "target_num_layers": self.target_num_layers,
            "aux_hidden_state_layer_ids": list(self.aux_hidden_state_layer_ids),
            "draft_vocab_size": self.draft_vocab_size,
            "architecture": self.architecture,
            "frame_attention": self.frame_attention,
            "positional_rank": self.positional_rank,
            "num_frames": self.num_frames,
            "lattice": self.lattice,
            "transition_rank": self.transition_rank,
            "markov_rank": self.markov_rank,
            "tree_nodes": self.tree_nodes,
            "target_dtype": self.target_dtype,
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DrafterConfig":
        """Inverse of `to_dict`; refuses unknown, missing and contradictory fields (DrafterConfigError)."""
        kind = raw.get("speculators_model_type") if isinstance(raw, Mapping) else None
        if kind != SPECULATORS_TYPE:
            raise DrafterConfigError(
                f"This is not a CTC drafter: speculators_model_type is {shown(kind)}, "
                f"expected {SPECULATORS_TYPE!r}; give the folder that `vllm-ctc train` wrote."
            )
        try:
            layer, spec = raw["transformer_layer_config"], raw["speculators_config"]
            config = cls(
                hidden_size=layer["hidden_size"],
                vocab_size=layer["vocab_size"],
                target_num_layers=raw["target_num_layers"],
                aux_hidden_state_layer_ids=raw["aux_hidden_state_layer_ids"],
                draft_vocab_size=raw.get("draft_vocab_size", 0),
                architecture=raw.get("architecture", "adm"),
                frame_attention=raw.get("frame_attention", "bidirectional"),
                positional_rank=raw.get("positional_rank", 0),
                num_frames=raw["num_frames"],
                num_labels=spec["proposal_methods"][0]["speculative_tokens"],
                lattice=raw.get("lattice", "ctc"),
                transition_rank=raw.get("transition_rank", 0),
                markov_rank=raw["markov_rank"],
                tree_nodes=raw.get("tree_nodes", 0),
                num_layers=layer["num_hidden_layers"],
                num_attention_heads=layer["num_attention_heads"],
                num_key_value_heads=layer["num_key_value_heads"],
                head_dim=layer["head_dim"],
                intermediate_size=layer["intermediate_size"],
                rms_norm_eps=layer["rms_norm_eps"],
                rope_theta=layer["rope_parameters"]["rope_theta"],
                max_position_embeddings=layer["max_position_embeddings"],
                target=spec["verifier"]["name_or_path"],
                target_architecture=spec["verifier"]["architectures"][0],
                target_dtype=raw.get("target_dtype", ""),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise DrafterConfigError(
                f"The CTC drafter's {CONFIG_NAME} lacks or garbles a field ({error!r}); "
                "train it again or restore the file."
            ) from error
        _refuse_differences(raw, config.to_dict(), "")
        return config

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "DrafterConfig":
        """Read and check `folder`; also that its weights file is there (DrafterConfigError)."""
        folder = Path(folder)
        try:
            config = cls.from_dict(_read_json(folder / CONFIG_NAME))
            has_weights = (folder / WEIGHTS_NAME).is_file()
            if has_weights:
                (folder / WEIGHTS_NAME).open("rb").close()  # safetensors would not name a missing permission
        except OSError as error:
            raise DrafterConfigError(
                f"The CTC drafter at {folder} cannot be read ({error.strerror}); make its files readable to this user."
            ) from error
        if not has_weights:
            raise DrafterConfigError(
                f"The CTC drafter at {folder} has no {WEIGHTS_NAME}; train it again or restore the file."
            )
        return config


def positions_of(target_config: Any, at_most: float = math.inf) -> int:
    """How many positions vLLM serves a target with by default (`_get_and_verify_max_len` in its vllm/config/model.py).

    target_config: the Hugging Face configuration of its language model. Where rotary embeddings are scaled linearly,
    `max_position_embeddings` counts the positions before that; with "longrope", more than the original ones change all
    others, so vLLM has to be asked for them. With "dynamic" vLLM allows more than this, but its table of angles ends
    here (layers/rotary_embedding/dynamic_ntk_scaling_rope.py). at_most: the tokenizer's bound.
    """
    positions = int(min(target_config.max_position_embeddings, at_most))
    rope = getattr(target_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "linear":
        return int(positions * rope["factor"])
    if rope.get("rope_type") == "longrope":
        return min(positions, int(rope["original_max_position_embeddings"]))
    return positions


def _check_integer(name: str, value: Any, smallest: int, largest: int) -> None:
    if type(value) is not int or not smallest <= value <= largest:  # a truth value is an int to isinstance
        raise DrafterConfigError(
            f"CTC drafter: {name} must be {smallest} to {largest}, a whole number, not {shown(value)}."
        )


def _read_json(path: Path) -> Any:
    """The content of a configuration that may be anything (DrafterConfigError, OSError)."""
    if not path.is_file():
        raise DrafterConfigError(
            f"No CTC drafter at {path.parent}: {path.name} is missing; give the folder that `vllm-ctc train` wrote."
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise DrafterConfigError(
            f"{path} has more than {MAX_CONFIG_BYTES} bytes, far more than a CTC drafter's configuration; "
            "restore the file."
        )
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_unique_fields, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DrafterConfigError(
            f"{path} is not valid JSON ({error}); train the drafter again or restore the file."
        ) from error


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses duplicates: JSON readers differ in which of two values they take."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the field {shown(name)} stands there twice")
        fields[name] = value
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _refuse_differences(given: Any, known: Any, where: str) -> None:
    """Every leaf of `given` must be what `known` would write: refuses unknown and contradictory fields alike."""
    if isinstance(known, dict):
        if not isinstance(given, Mapping):
            raise DrafterConfigError(f"The CTC drafter's {CONFIG_NAME}: {where} must be an object, not {shown(given)}.")
        for key, value in given.items():
            path = f"{where}.{key}" if where else key
            if key not in known:
                raise DrafterConfigError(
                    f"The CTC drafter's {CONFIG_NAME} has an unknown field {shown(path)}; "
                    "remove it or upgrade vllm-ctc-spec."
                )
            _refuse_differences(value, known[key], path)
    elif type(given) is not type(known) or given != known:  # 0 == False, 1.0 == 1
        raise DrafterConfigError(
            f"The CTC drafter's {CONFIG_NAME} says {where} = {shown(given)}, which contradicts the rest "
            f"({shown(known)} expected); restore the file."
        )


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Up to five layers of the target, evenly spread; never the last one, which some targets cannot report."""
    last = max(1, num_layers - 1)
    count = min(NUM_AUX_LAYERS, last)
    if count == 1:
        return (last,)
    return tuple(round(1 + i * (last - 1) / (count - 1)) for i in range(count))
