"""The log of a run: one JSON object a step in `log.jsonl`, the same numbers for TensorBoard where it is installed, and
their display to the user.

Metrics are sums and totals, so that any stretch of the log can be averaged.
"""

import contextlib
import json
from pathlib import Path

from tqdm import tqdm

from vllm_ctc_spec.training.files import write_atomically, writing
from vllm_ctc_spec.training.forecast import Pace

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"


class MetricsLog:
    """Continues behind `last_step`, without later entries: a resumed run will repeat their steps."""

    def __init__(self, work: Path, last_step: int):
        self._path = path = work / LOG_NAME
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
            write_atomically(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(work / TENSORBOARD_NAME, last_step)

    def write(self, entry: dict[str, float]) -> None:
        with writing(self._path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        with writing(self._path):  # entries that a full disk did not take are tried once more here
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class LogFollower:
    """Reads what another process logs, from where the log ends now. earlier: the entries before."""

    def __init__(self, work: Path):
        self._path = work / LOG_NAME
        self._offset = 0
        self.earlier = self.new_entries()
        self.last_step = self.earlier[-1]["step"] if self.earlier else 0

    def new_entries(self) -> list[dict[str, float]]:
        """The entries since the last call; all of them once more after a restart has cut the log."""
        if not self._path.is_file():
            return []
        if self._path.stat().st_size < self._offset:
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._offset += len(text)
        return [json.loads(line) for line in text.splitlines() if _step_of(line) < float("inf")]


class StepBar(contextlib.AbstractContextManager):
    """The progress bar of a run from its log's entries, and lines: how long it will take, once that is known, and each
    measurement behind `first_step`."""

    def __init__(self, steps: int, first_step: int, pace: Pace, disable: bool = False):
        """pace: has the log's entries up to `first_step`."""
        self._bar = tqdm(total=steps, initial=first_step, desc="drafter", unit="step", disable=disable)
        self._steps, self._shown, self._pace = steps, first_step, pace
        self._running = self._timed = False
        if pace.is_known:
            self._tell_time(first_step)

    def show(self, entry: dict[str, float]) -> None:
        """After a restart, steps that were shown before come again: the bar goes back, lines stay."""
        step = entry["step"]
        if not self._running:
            self._bar.unpause()  # the clock starts with the first step, not with the processes
            self._running = True
        self._pace.add(entry)
        if self._pace.is_known and not self._timed:
            self._tell_time(step)
        if "held_out_steps_total" in entry and step > self._shown:
            length = entry["held_out_tokens_total"] / max(1, entry["held_out_steps_total"])
            half_width = entry.get("held_out_half_width", float("inf"))
            left = f"; {self._pace.left(step)}" if step < self._steps else ""
            self._bar.write(f"step {step}: held-out acceptance length {length:.3f} +- {half_width:.3f}{left}")
        self._shown = max(self._shown, step)
        self._bar.set_postfix(loss=f"{entry['loss_sum'] / max(1, entry['anchors_total']):.3f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def _tell_time(self, step: int) -> None:
        self._timed = True
        if step < self._steps and not self._bar.disable:
            self._bar.write(f"step {step}: {self._pace.sentence(step)}")

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def read_log(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / LOG_NAME).read_text(encoding="utf-8").splitlines()]


def _step_of(line: str | bytes) -> float:
    """The line's step; a line that a kill cut short belongs to none."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _summary_writer(folder: Path, last_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=last_step + 1)
