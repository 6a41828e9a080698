"""Files of a run: the check of its folder, the resumable checkpoints, the log, and the finished drafter."""

import dataclasses
import os
import platform
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from vllm_ctc_spec.drafter.config import CONFIG_NAME, WEIGHTS_NAME
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.card import CARD_NAME, write_card
from vllm_ctc_spec.training.config import SETTINGS_NAME, TrainConfig
from vllm_ctc_spec.training.files import differing_settings, new_file, record_settings, writing
from vllm_ctc_spec.training.metrics import LOG_NAME, TENSORBOARD_NAME, LogFollower
from vllm_ctc_spec.training.workers import FULL_STATE, Workers

CHECKPOINT_NAME = "checkpoint.pt"
PREVIOUS_NAME = "checkpoint-previous.pt"  # the one before
DAMAGED_NAME = "checkpoint-damaged.pt"  # a newest one that could not be read; perhaps somebody can mend it


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
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for folder in (self.output, self.work):
            differing = differing_settings(folder / SETTINGS_NAME, dataclasses.asdict(config), defaults)
            if differing and not overwrite:
                raise TrainingError(
                    f"{folder} holds a run with other settings ({', '.join(differing)}); "
                    "use --overwrite or another folder."
                )

    def start(self, config: TrainConfig, overwrite: bool) -> None:
        """Claim the work folder for this run; `overwrite` forgets the progress of the one before, not its labels."""
        self.work.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in (CHECKPOINT_NAME, PREVIOUS_NAME, DAMAGED_NAME, LOG_NAME):
                (self.work / name).unlink(missing_ok=True)
            shutil.rmtree(self.work / TENSORBOARD_NAME, ignore_errors=True)
        record_settings(self.work / SETTINGS_NAME, dataclasses.asdict(config))


@dataclasses.dataclass
class Progress:
    """The content of a checkpoint. There is no random state: data order and anchors follow from seed and step."""

    drafter: CTCDrafter
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    best_step: int = 0
    best_tokens: list[int] = dataclasses.field(default_factory=list)  # of the best held-out acceptance
    best_steps: list[float] = dataclasses.field(default_factory=list)
    best_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    measurements: list[tuple] = dataclasses.field(default_factory=list)  # fields of `advice.Measurement`

    @property
    def best(self) -> Acceptance:
        return Acceptance(self.best_tokens, self.best_steps)

    def keep_if_best(self, acceptance: Acceptance, weights: dict[str, Tensor]) -> None:
        self.measurements.append((self.step, acceptance.tokens, acceptance.steps))
        if not self.best_weights or acceptance.length > self.best.length:
            self.best_tokens, self.best_steps = acceptance.tokens, acceptance.steps
            self.best_step, self.best_weights = self.step, weights

    def save(self, work: Path, workers: Workers) -> None:
        """One file with whole weights and states, for any number of processes to continue from; called by all. The new
        file is whole before the old one makes room: at any moment one of the two names has a sound checkpoint."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state["drafter"], state["optimizers"] = get_state_dict(self.drafter, self.optimizers, options=FULL_STATE)
        if workers.is_main:
            with new_file(work / CHECKPOINT_NAME) as temporary:
                try:
                    torch.save(state, temporary)
                except RuntimeError as error:  # torch raises it for a full disk
                    raise OSError(error) from error
                if (work / CHECKPOINT_NAME).is_file():
                    os.replace(work / CHECKPOINT_NAME, work / PREVIOUS_NAME)
        workers.wait()

    def restore(self, work: Path, workers: Workers, device: torch.device) -> None:
        """Continue from the newest sound checkpoint, if there is one; called by all. The main process finds it first.
        The others, perhaps on another machine, read the folder after it and must find the same one."""
        state = recover(work) if workers.is_main else {}
        (step,) = workers.total([state.get("step", 0)], device)
        path = work / CHECKPOINT_NAME
        if not workers.is_main and path.is_file():
            state = read_checkpoint(path)
        if state.get("step", 0) != step:
            raise TrainingError(
                f"The checkpoint {path} is of step {state.get('step', 0)} on {platform.node()} and of step {step:.0f} "
                "where the main worker runs; wait until the machines see the same, and repeat the command."
            )
        if not state:
            return
        set_state_dict(
            self.drafter,
            self.optimizers,
            model_state_dict=state.pop("drafter"),
            optim_state_dict=state.pop("optimizers"),
            options=StateDictOptions(full_state_dict=True),
        )
        for name, value in state.items():
            setattr(self, name, value)


def recover(work: Path) -> dict[str, Any]:
    """The newest sound checkpoint; empty before the first. It has `CHECKPOINT_NAME` from here on, so that the next one
    does not push it out for a damaged one. TrainingError if every checkpoint (one or two) is damaged."""
    newest, previous = work / CHECKPOINT_NAME, work / PREVIOUS_NAME
    errors = []
    for path in (newest, previous):
        if not path.is_file():
            continue
        try:
            state = read_checkpoint(path)
        except TrainingError as error:
            errors.append(error)
            continue
        if path == previous:
            with writing(newest):
                if errors:
                    os.replace(newest, work / DAMAGED_NAME)
                    print(_steps_lost(errors[0], work, state["step"]))
                os.replace(previous, newest)
        return state
    if errors:
        raise errors[0]
    return {}


def _steps_lost(damage: TrainingError, work: Path, step: int) -> str:
    """Message for a damaged newest checkpoint when training resumes from `step`."""
    last = max(step + 1, LogFollower(work).last_step)
    return (
        f"The checkpoint {work / CHECKPOINT_NAME} is damaged ({_reason(damage.__cause__)}) and now {DAMAGED_NAME}: "
        f"steps {step + 1} to {last} are lost, and the run goes on from step {step}, the checkpoint before."
    )


def _reason(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Refuses a damaged one (TrainingError): torch writes checksums, but does not compare them when it reads."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu")
    except Exception as error:  # a damaged archive may raise anything
        raise TrainingError(
            f"The checkpoint {path} is damaged ({_reason(error)}); restore it from a copy, or start the run again with "
            "--overwrite."
        ) from error


def publish(drafter: CTCDrafter, config: TrainConfig, paths: RunPaths, card: str) -> None:
    """Stage the finished drafter, then move it in. The old configuration is removed first and the new one moves last:
    without one a folder is no drafter, so a crash in between leaves none rather than a mixture. card: its README.md."""
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
    with writing(paths.output / CARD_NAME):
        write_card(paths.output, card)
    for name in (SETTINGS_NAME, WEIGHTS_NAME, CONFIG_NAME):
        shutil.move(staged / name, paths.output / name)
    staged.rmdir()
