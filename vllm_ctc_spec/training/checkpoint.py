"""Files of a run: what may be started where, the resumable checkpoint, the log, and the finished drafter."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from vllm_ctc_spec.config import CONFIG_NAME, WEIGHTS_NAME
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.training.settings import (
    SETTINGS_NAME,
    TrainConfig,
    TrainingError,
    differing_settings,
    record_settings,
)

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class RunPaths:
    output: Path
    work: Path
    labels: Path

    def check(self, config: TrainConfig, overwrite: bool) -> None:
        """Refuse a folder that holds something else or another run; writes nothing."""
        if self.output.exists() and not self.output.is_dir():
            raise TrainingError(f"--output {self.output} is a file; give a folder.")
        if (self.output / CONFIG_NAME).is_file() and not (self.output / SETTINGS_NAME).is_file():
            raise TrainingError(
                f"--output {self.output} holds a model that `vllm-ctc train` did not write; use another folder."
            )
        for folder in (self.output, self.work):
            differing = differing_settings(folder / SETTINGS_NAME, dataclasses.asdict(config))
            if differing and not overwrite:
                raise TrainingError(
                    f"{folder} holds a run with other settings ({', '.join(differing)}); "
                    "use --overwrite or another folder."
                )

    def start(self, config: TrainConfig, overwrite: bool) -> None:
        """Claim the work folder for this run; `overwrite` forgets the progress of the one before, not its labels."""
        self.work.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (CHECKPOINT_NAME, LOG_NAME):
                (self.work / name).unlink(missing_ok=True)
        record_settings(self.work / SETTINGS_NAME, dataclasses.asdict(config))


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds. Data order and anchors follow from seed and step, so that no random state does."""

    drafter: CTCDrafter
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    best_length: float = -1.0  # below any measurement
    best_step: int = 0
    best_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def keep_if_best(self, length: float) -> None:
        if length > self.best_length:
            self.best_length, self.best_step = length, self.step
            self.best_weights = {name: w.detach().cpu().clone() for name, w in self.drafter.state_dict().items()}

    def save(self, work: Path) -> None:
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state["drafter"] = self.drafter.state_dict()
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        temporary = work / (CHECKPOINT_NAME + ".tmp")
        torch.save(state, temporary)
        os.replace(temporary, work / CHECKPOINT_NAME)

    def restore(self, work: Path) -> None:
        """Continue from the checkpoint, if there is one, and forget log entries that it does not cover."""
        path = work / CHECKPOINT_NAME
        if path.is_file():
            state = torch.load(path, map_location=self.drafter.target_head.device)
            self.drafter.load_state_dict(state.pop("drafter"))
            for optimizer, saved in zip(self.optimizers, state.pop("optimizers")):
                optimizer.load_state_dict(saved)
            for name, value in state.items():
                setattr(self, name, value)
        log = work / LOG_NAME
        if log.is_file():
            kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.step]
            log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step_of(line: str) -> float:
    """A line that a kill cut short belongs to no step."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def publish(drafter: CTCDrafter, config: TrainConfig, paths: RunPaths) -> None:
    """Stage the finished drafter, then move it in. The configuration goes first and comes last: without it a folder
    is no drafter, so that a crash in between leaves none rather than a mixture."""
    staged = paths.work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    drafter.save(staged)
    record_settings(staged / SETTINGS_NAME, dataclasses.asdict(config))
    paths.output.mkdir(parents=True, exist_ok=True)
    (paths.output / CONFIG_NAME).unlink(missing_ok=True)
    for name in (SETTINGS_NAME, WEIGHTS_NAME, CONFIG_NAME):
        shutil.move(staged / name, paths.output / name)
    staged.rmdir()
