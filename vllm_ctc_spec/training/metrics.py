"""The log of a run: one JSON object a step in `log.jsonl`, and the same numbers for TensorBoard where it is installed.

Metrics are sums and totals, so that any stretch of the log can be averaged.
"""

import json
from pathlib import Path

LOG_NAME = "log.jsonl"
TENSORBOARD_NAME = "tensorboard"


class MetricsLog:
    """Continues behind `last_step`: later entries are of steps that a resumed run will repeat."""

    def __init__(self, work: Path, last_step: int):
        path = work / LOG_NAME
        if path.is_file():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(work / TENSORBOARD_NAME, last_step)

    def write(self, entry: dict[str, float]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in entry.items():
                if name != "step":
                    self._board.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_log(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / LOG_NAME).read_text(encoding="utf-8").splitlines()]


def _step_of(line: str) -> float:
    """A line that a kill cut short belongs to no step."""
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
