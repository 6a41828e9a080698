"""What one training run was asked to do: one dataclass, recorded beside the drafter and compared on every restart."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from vllm_ctc_spec.drafter.config import LATTICES
from vllm_ctc_spec.errors import TrainingError

SETTINGS_NAME = "train_config.json"
LOSS_NAMES = ("prefix", "ctc", "ce")
OPTIMIZERS = ("muon", "adamw")
FEATURES = ("target", "stored")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # and what torch and vLLM call them
PARALLEL = ("ddp", "fsdp")
DEFAULT_DTYPE = "bf16 on a GPU, else fp32"
MIN_DRAFT_VOCABULARY = 256  # fewer labels than there are bytes draft next to nothing
MAY_CHANGE = ("accumulate", "save_every", "eval_every")
"""Settings of a run that another command may continue it with: the weights of a step do not depend on them. How often
they are measured decides only which are known to be the best; what was measured before counts on."""
CHOICES = {"features": FEATURES, "loss": LOSS_NAMES, "optimizer": OPTIMIZERS, "dtype": DTYPES}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; where the files lie and how many processes share the work are none.

    Fields whose default follows from others, or from the machine (`resolved`), are None in what a user gives, and never
    in a run.
    """

    target: str
    data: str
    features: str = "target"
    loss: str = "prefix"
    lattice: str | None = None
    num_frames: int = 12
    num_labels: int = 8
    num_layers: int = 2
    aux_layers: tuple[int, ...] | None = None
    markov_rank: int | None = None
    transition_rank: int | None = None
    blank_share: float | None = None
    draft_vocab_size: int | str = "auto"
    tree_nodes: int = 0
    init: str = ""
    steps: int = 4000
    batch_size: int = 8
    accumulate: int = 1
    anchors: int = 64
    position_decay: float = 4.0
    optimizer: str = "muon"
    lr: float = 4e-3
    warmup: int = 50
    clip: float = 1.0
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 256
    chat_template_kwargs: dict | None = None
    held_out: int = 100
    save_every: int = 100
    eval_every: int = 500
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.aux_layers is not None:
            object.__setattr__(self, "aux_layers", tuple(self.aux_layers))
        for name, default in self.resolved().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise TrainingError(f"{option(name)} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
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
            # What a uniform spread of U labels over T frames leaves.
            "blank_share": max(self.num_frames - self.num_labels, 0.05) / max(self.num_frames, 1),
            "dtype": self.dtype or default_dtype(),
        }

    def _check_combinations(self) -> None:
        if self.lattice not in LATTICES:
            raise TrainingError(f"--lattice must be one of {', '.join(LATTICES)}, not {self.lattice!r}.")
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
    """Which processes do the work of a run; the drafter is the same."""

    num_workers: int = 1
    parallel: str = "ddp"
    ray_address: str | None = None  # of a running cluster; None: Ray on this machine for more than one worker
    threads: int | None = None  # of each worker; None: an equal share of PyTorch's choice

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
    """A GPU computes several times faster in bf16, and a target takes half of the memory there."""
    import torch  # not at the top: --help needs none

    return "bf16" if torch.cuda.is_available() else "fp32"


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def read_settings(path: Path) -> dict[str, Any]:
    """Settings from a TOML file, keys as the fields of `TrainConfig`."""
    try:
        with path.open("rb") as file:
            given = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise TrainingError(f"The configuration {path} cannot be read ({error}).") from error
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, value in given.items():
        if name not in fields:
            raise TrainingError(f"{path} has an unknown setting {name!r}; the settings are {', '.join(fields)}.")
        if not _fits(value, str(fields[name].type)):
            raise TrainingError(f"{path}: {name} must be {fields[name].type}, not {value!r}.")
    return given


def _fits(value: Any, annotation: str) -> bool:
    kinds = {
        "str": str, "int": int, "int | str": (int, str), "float": (int, float), "tuple[int, ...]": list, "dict": dict,
    }  # fmt: skip
    kind = kinds[annotation.removesuffix(" | None").removeprefix("<class '").removesuffix("'>")]
    return isinstance(value, kind) and not isinstance(value, bool)
