"""What one training run was asked to do: one dataclass, recorded beside the drafter and compared on every restart."""

import dataclasses
import json
import os
from pathlib import Path

SETTINGS_NAME = "train_config.json"
LOSS_NAMES = ("prefix", "ctc", "ce")
DTYPES = ("fp32", "bf16")


class TrainingError(ValueError):
    """The run cannot start or go on; the message is one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every setting that changes the trained drafter; where the files lie and the number of threads do not."""

    target: str
    data: str
    num_frames: int = 12
    num_labels: int = 8
    num_layers: int = 2
    markov_rank: int = 64
    loss: str = "prefix"
    steps: int = 4000
    batch_size: int = 8  # sequences
    anchors: int = 64  # per sequence and step
    lr: float = 4e-3
    seed: int = 0
    temperature: float = 0.0  # of the target's responses, 0 = greedy
    max_new_tokens: int = 256
    held_out: int = 100
    save_every: int = 100
    eval_every: int = 500
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "anchors", "lr", "max_new_tokens", "held_out", "save_every", "eval_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise TrainingError(f"{option(name)} must be more than 0, not {getattr(self, name)}.")
        if self.temperature < 0:
            raise TrainingError(f"--temperature must be 0 (greedy) or more, not {self.temperature}.")
        for name, choices in (("loss", LOSS_NAMES), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise TrainingError(f"{option(name)} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.loss == "ctc" and self.markov_rank > 0:
            raise TrainingError(
                "--loss ctc is the likelihood of whole alignments and cannot train the label-conditional head; "
                "add --markov-rank 0 or use --loss prefix."
            )


def option(name: str) -> str:
    """The command line's spelling of a field."""
    return "--" + name.replace("_", "-")


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def record_settings(path: Path, settings: dict) -> None:
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


def differing_settings(path: Path, settings: dict) -> list[str]:
    """`--name then -> now` for each setting in which the recorded run at `path` differs; empty if there is none."""
    if not path.is_file():
        return []
    recorded = json.loads(path.read_text(encoding="utf-8"))
    names = [*settings, *(name for name in recorded if name not in settings)]
    return [
        f"{option(name)} {recorded.get(name)} -> {settings.get(name)}"
        for name in names
        if recorded.get(name) != settings.get(name)
    ]
