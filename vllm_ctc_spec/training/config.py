"""The settings of one training run: one dataclass, recorded beside the drafter and compared on every restart."""

import dataclasses
import functools
import operator
import types
import typing
from typing import Any

from vllm_ctc_spec.drafter.config import ARCHITECTURES, FRAME_ATTENTION, LATTICES
from vllm_ctc_spec.errors import TrainingError

SETTINGS_NAME = "train_config.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our names, and those of torch and vLLM
PARALLEL = ("ddp", "fsdp")
DEFAULT_DTYPE = "bf16 on a GPU, else fp32"
PROMPT_FILES = "rows with question, prompt, instruction, turns, messages or conversations (jsonl, json or parquet)"
MIN_DRAFT_VOCABULARY = 256  # fewer labels than there are bytes draft next to nothing
MAY_CHANGE = ("accumulate", "save_every", "eval_every", "license", "base_model")
"""Settings that may differ when a run is resumed, because the weights of a step do not depend on them. The interval of
measurements decides only which weights are known to be the best."""


def setting(text: str, default: Any = dataclasses.MISSING, choices: tuple = (), metavar: str | None = None) -> Any:
    """A setting's field, with all that the command line shows of it; text: its help."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. The place of its files and the number of its processes are not among them.

    Fields whose default follows from others, or from the machine (`resolved`), may be None as a user gives them, and
    are never None in a run.
    """

    target: str = setting("Hugging Face folder of the model to speed up")
    data: str = setting(f"{PROMPT_FILES}, a folder of such files, or one that `vllm-ctc data` wrote")
    features: str = setting(
        "target: it runs beside the training; stored: what `vllm-ctc data --hidden-states` kept",
        "target",
        choices=("target", "stored"),
    )
    loss: str = setting(
        "prefix: exact prefix conditionals; ctc: the paper's full-sequence loss; ce: cross-entropy, the twin in "
        "which frame k is label k",
        "prefix",
        choices=("prefix", "ctc", "ce"),
    )
    architecture: str = setting(
        "adm, the Attention Draft Module: each frame is a query to the context; specformer: the anchor alone is one, "
        "and all frames are made from its state, a cheaper draft",
        "adm",
        choices=ARCHITECTURES,
    )
    frame_attention: str = setting("attention among a SpecFormer's frames", "bidirectional", choices=FRAME_ATTENTION)
    positional_rank: int = setting(
        "rank of a SpecFormer's map from a state to T frames, which has T x H x H weights with 0", 0
    )
    lattice: str | None = setting(
        "how frames spell labels: ctc: with blanks and repeats; transitions: with learned steps between frames; "
        "slots: one label each (default: slots with --loss ce, else ctc)",
        None,
        choices=LATTICES,
    )
    num_frames: int = setting("T, the parallel outputs of one draft forward", 12)
    num_labels: int = setting("U, the labels that one draft is trained to hold; at most T", 8)
    num_layers: int = setting("transformer layers of the drafter; of a SpecFormer, those behind its context layer", 2)
    aux_layers: tuple[int, ...] | None = setting(
        "layers of the target that the drafter reads, 1 = after the first (default: up to five, spread)",
        None,
    )
    markov_rank: int | None = setting(
        "rank of the label-conditional head, 0 = none (default: 64, and 0 with --loss ctc)",
        None,
    )
    transition_rank: int | None = setting(
        "of the steps' queries and keys (default: 64 with --lattice transitions)",
        None,
    )
    blank_share: float | None = setting("share of frames that hold no label at the start (default: (T - U) / T)", None)
    draft_vocab_size: int | str = setting(
        "labels that a frame can hold: the tokens that the target says most often; full: all of them; "
        "auto: as many as make up 99 percent of what it says",
        "auto",
    )
    tree_nodes: int = setting("the tree that the drafter is served with and measured by, 0 = a chain of U labels", 0)
    init: str = setting("drafter to take weights from, by name and shape, such as one that --loss ce warmed up", "")
    steps: int = setting("updates", 4000)
    batch_size: int = setting("sequences in a step, of all workers together", 8)
    accumulate: int = setting(
        "parts of a step, one after the other: the same update in less memory; a run may change it",
        1,
    )
    anchors: int = setting("random drafting positions per sequence and step", 64)
    position_decay: float = setting("label k weighs exp(-(k - 1) / this) in the loss", 4.0)
    optimizer: str = setting(
        "muon: for the matrices, and AdamW for the rest; adamw: for everything",
        "muon",
        choices=("muon", "adamw"),
    )
    lr: float = setting("peak learning rate", 4e-3)
    warmup: int = setting("steps of linear warm-up, at most a tenth of all", 50)
    clip: float = setting("largest norm of the gradient", 1.0)
    seed: int = setting("of the weights, the order and the anchors", 0)
    temperature: float = setting("of the target's responses, 0 = greedy", 0.0)
    max_new_tokens: int = setting("longest response of the target", 256)
    chat_template_kwargs: dict | None = setting(
        "arguments of the target's chat template as a JSON object, those that the server will use, "
        """such as '{"enable_thinking": false}' for Qwen3""",
        None,
    )
    held_out: int = setting(
        "last rows of the file that measure acceptance and are never trained on, at most a tenth; of a folder as many "
        "in each part of it",
        100,
    )
    regenerate: bool = setting(
        "conversations go on with the target's own answers; without it their earlier turns are those of the file", False
    )
    save_every: int = setting("steps between checkpoints", 100)
    eval_every: int = setting("steps between measurements of the held-out acceptance length; the best one is kept", 500)
    license: str = setting("of the drafter, for its README.md (default: the target's, by its README.md)", "")
    base_model: str = setting(
        "the target's name on the model hub, for the drafter's README.md (default: what its folder or files say)",
        "",
    )
    dtype: str | None = setting(
        f"of the target, as it will be served, and of the drafter's matrix products, which are in bf16 with fp16 "
        f"(default: {DEFAULT_DTYPE})",
        None,
        choices=tuple(DTYPES),
    )

    def __post_init__(self) -> None:
        if self.aux_layers is not None:
            object.__setattr__(self, "aux_layers", tuple(self.aux_layers))
        for name, default in self.resolved().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        check_choices(self)
        positive = ("steps", "batch_size", "accumulate", "anchors", "position_decay", "lr", "clip", "max_new_tokens",
                    "held_out", "save_every", "eval_every")  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise TrainingError(f"{option(name)} must be more than 0, not {getattr(self, name)}.")
        for name, what in (("temperature", "0 (greedy) or more"), ("warmup", "0 or more")):
            if not getattr(self, name) >= 0:
                raise TrainingError(f"{option(name)} must be {what}, not {getattr(self, name)}.")
        if not 0 < self.blank_share < 1:
            raise TrainingError(f"--blank-share must be between 0 and 1, not {self.blank_share}.")
        self._check_draft_vocabulary()
        self._check_combinations()

    def _check_draft_vocabulary(self) -> None:
        size = self.draft_vocab_size
        is_number = isinstance(size, int) and not isinstance(size, bool)
        if not (size in ("auto", "full") or is_number and size >= MIN_DRAFT_VOCABULARY):
            raise TrainingError(
                f"--draft-vocab-size must be auto, full or a number of tokens, {MIN_DRAFT_VOCABULARY} or more, not "
                f"{size}."
            )

    def resolved(self) -> dict[str, Any]:
        """The defaults that depend on other settings, or on the machine."""
        lattice = self.lattice or ("slots" if self.loss == "ce" else "ctc")
        return {
            "lattice": lattice,
            "markov_rank": 0 if self.loss == "ctc" else 64,
            "transition_rank": 64 if lattice == "transitions" else 0,
            # The share that a uniform spread of U labels over T frames leaves.
            "blank_share": max(self.num_frames - self.num_labels, 0.05) / max(self.num_frames, 1),
            "dtype": self.dtype or default_dtype(),
        }

    def _check_combinations(self) -> None:
        if (self.loss == "ce") != (self.lattice == "slots"):
            raise TrainingError(
                f"--loss {self.loss} cannot train --lattice {self.lattice}: the cross-entropy twin is --loss ce with "
                "--lattice slots, both or neither; leave --lattice out."
            )
        if self.loss == "ctc" and self.lattice != "ctc":
            raise TrainingError(f"--loss ctc cannot train --lattice {self.lattice}, which has no blank; use prefix.")
        if self.loss == "ctc" and self.markov_rank > 0:
            raise TrainingError(
                "--loss ctc is the likelihood of whole alignments and cannot train the label-conditional head; "
                "add --markov-rank 0 or use --loss prefix."
            )
        if self.batch_size % self.accumulate:
            raise TrainingError(
                f"--batch-size {self.batch_size} cannot be split into --accumulate {self.accumulate} equal parts."
            )


@dataclasses.dataclass(frozen=True)
class WorkerOptions:
    """The processes that do the work of a run. The drafter does not depend on them."""

    threads: int | None = setting("CPU threads of each worker (default: PyTorch's choice, shared)", None)
    num_workers: int = setting("processes that share each step, with Ray", 1)
    ray_address: str | None = setting(
        "of a running cluster (default: Ray on this machine, if needed)", None, metavar="HOST:PORT"
    )
    parallel: str = setting("each worker holds the drafter (ddp) or a shard of it", "ddp", choices=PARALLEL)

    @property
    def use_ray(self) -> bool:
        return self.num_workers > 1 or self.ray_address is not None

    def check(self, config: TrainConfig) -> None:
        if self.num_workers < 1:
            raise TrainingError(f"--num-workers must be 1 or more, not {self.num_workers}.")
        if self.parallel != "ddp" and self.num_workers == 1:
            raise TrainingError(f"--parallel {self.parallel} shares a drafter among --num-workers; give 2 or more.")
        if config.batch_size % (self.num_workers * config.accumulate):
            raise TrainingError(
                f"--batch-size {config.batch_size} cannot be split equally among --num-workers {self.num_workers} "
                f"with --accumulate {config.accumulate} parts each."
            )


def default_dtype() -> str:
    """bf16 on a GPU, which computes several times faster in it and holds a target in half of the memory; else fp32."""
    import torch  # not at the top: --help needs none

    return "bf16" if torch.cuda.is_available() else "fp32"


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def check_choices(config: Any) -> None:
    """Refuse a value that is none of its field's choices (TrainingError)."""
    for field in dataclasses.fields(config):
        choices, value = field.metadata.get("choices"), getattr(config, field.name)
        if choices and value not in choices:
            raise TrainingError(f"{option(field.name)} must be one of {', '.join(choices)}, not {value!r}.")


def kind_of(field: dataclasses.Field) -> Any:
    """The type of a field's values, None apart: `int` of `int | None`."""
    if not isinstance(field.type, types.UnionType):
        return field.type
    return functools.reduce(operator.or_, (kind for kind in typing.get_args(field.type) if kind is not type(None)))


def as_in_training(name: str, **changes: Any) -> Any:
    """A setting that another command shares with training; changes: another default, help text or the like."""
    field = TrainConfig.__dataclass_fields__[name]
    return dataclasses.field(default=changes.pop("default", field.default), metadata={**field.metadata, **changes})
