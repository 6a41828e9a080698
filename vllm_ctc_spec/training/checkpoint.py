"""Files of a run: what may be started where, the resumable checkpoint, the log, and the finished drafter."""

import dataclasses
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from vllm_ctc_spec.config import CONFIG_NAME, WEIGHTS_NAME
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.metrics import LOG_NAME, TENSORBOARD_NAME
from vllm_ctc_spec.training.settings import (
    SETTINGS_NAME,
    TrainConfig,
    TrainingError,
    differing_settings,
    new_file,
    record_settings,
)
from vllm_ctc_spec.training.workers import WHOLE, Workers

CHECKPOINT_NAME = "checkpoint.pt"


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
            shutil.rmtree(self.work / TENSORBOARD_NAME, ignore_errors=True)
        record_settings(self.work / SETTINGS_NAME, dataclasses.asdict(config))


@dataclasses.dataclass
class Progress:
    """What a checkpoint holds. Data order and anchors follow from seed and step, so that no random state does."""

    drafter: CTCDrafter
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    best_step: int = 0
    best_tokens: list[int] = dataclasses.field(default_factory=list)  # of the best held-out acceptance
    best_steps: list[float] = dataclasses.field(default_factory=list)
    best_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Acceptance:
        return Acceptance(self.best_tokens, self.best_steps)

    def keep_if_best(self, acceptance: Acceptance, weights: dict[str, Tensor]) -> None:
        if not self.best_weights or acceptance.length > self.best.length:
            self.best_tokens, self.best_steps = acceptance.tokens, acceptance.steps
            self.best_step, self.best_weights = self.step, weights

    def save(self, work: Path, workers: Workers) -> None:
        """One file with whole weights and states, for any number of processes to continue from; called by all."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state["drafter"], state["optimizers"] = get_state_dict(self.drafter, self.optimizers, options=WHOLE)
        if workers.is_main:
            with new_file(work / CHECKPOINT_NAME) as temporary:
                try:
                    torch.save(state, temporary)
                except RuntimeError as error:  # what torch makes of a full disk
                    raise OSError(error) from error
        workers.wait()

    def restore(self, work: Path) -> None:
        """Continue from the checkpoint, if there is one."""
        path = work / CHECKPOINT_NAME
        if not path.is_file():
            return
        state = read_checkpoint(path)
        set_state_dict(
            self.drafter,
            self.optimizers,
            model_state_dict=state.pop("drafter"),
            optim_state_dict=state.pop("optimizers"),
            options=StateDictOptions(full_state_dict=True),
        )
        for name, value in state.items():
            setattr(self, name, value)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A damaged one is refused (TrainingError): torch writes checksums, and does not compare them when it reads."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu")
    except Exception as error:  # of any kind: what damage makes of an archive
        raise TrainingError(
            f"The checkpoint {path} is damaged ({type(error).__name__}: {error}); restore it from a copy, or start the "
            "run again with --overwrite."
        ) from error


def publish(drafter: CTCDrafter, config: TrainConfig, paths: RunPaths) -> None:
    """Stage the finished drafter, then move it in. The configuration goes first and comes last: without it a folder
    is no drafter, so that a crash in between leaves none rather than a mixture."""
    staged = paths.work / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        drafter.save(staged)
        record_settings(staged / SETTINGS_NAME, dataclasses.asdict(config))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise TrainingError(
            f"The drafter cannot be written to {paths.work} ({error}); when there is room, the same command continues."
        ) from error
    paths.output.mkdir(parents=True, exist_ok=True)
    (paths.output / CONFIG_NAME).unlink(missing_ok=True)
    for name in (SETTINGS_NAME, WEIGHTS_NAME, CONFIG_NAME):
        shutil.move(staged / name, paths.output / name)
    staged.rmdir()
