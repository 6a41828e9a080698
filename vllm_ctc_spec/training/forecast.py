"""What a run will read and how long it will take: counted before its first step, measured from then on."""

import dataclasses
import statistics
from collections import deque
from collections.abc import Iterable, Sequence

from vllm_ctc_spec.training.batches import anchor_positions
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.dataset import Example

FIRST_STEPS = 10  # measured before anything is said about the time
RECENT_STEPS = 100  # of which the median counts: other programs come and go


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Everything that the steps of a run read, together and in expectation."""

    sequences: int
    examples: int  # different sequences that have anything to draft
    anchors: float
    labels: float  # at these anchors, those outside of the draft vocabulary included
    places: int  # different anchors in the data

    @classmethod
    def of(cls, config: TrainConfig, examples: Sequence[Example]) -> "Forecast":
        numbers = [number for example in examples if (number := len(anchor_positions(example)))]
        sequences = config.steps * config.batch_size
        chosen = [min(config.anchors, number) for number in numbers]
        labels = [many * _mean_labels(number, config.num_labels) for many, number in zip(chosen, numbers)]
        times = sequences / len(numbers)
        return cls(sequences, len(numbers), times * sum(chosen), times * sum(labels), sum(numbers))

    def __str__(self) -> str:
        return (
            f"The steps read {rounded(self.sequences)} sequences, each of the {rounded(self.examples)} different ones "
            f"{self.sequences / self.examples:.2g} times, and learn {rounded(self.labels)} labels at "
            f"{rounded(self.anchors)} anchors; the data have {rounded(self.places)} different anchors."
        )


def _mean_labels(number: int, num_labels: int) -> float:
    """Labels of a random anchor among `number`, of which the last has one label behind it, the one before two, ..."""
    short = min(number, num_labels)
    return (short * (short + 1) / 2 + (number - short) * num_labels) / number


def rounded(number: float) -> str:
    """Three digits: 950, 6.40 k, 1.28 M."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} seconds"


class Pace:
    """How fast a run is, by its log. Checkpoints, a second each or so, are not counted."""

    def __init__(self, config: TrainConfig, entries: Iterable[dict[str, float]] = ()):
        """entries: of the log until now."""
        self._config = config
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._measurement: float | None = None
        for entry in entries:
            self.add(entry)

    def add(self, entry: dict[str, float]) -> None:
        self._steps.append(entry["seconds"])
        self._measurement = entry.get("measurement_seconds", self._measurement)

    @property
    def is_known(self) -> bool:
        return len(self._steps) >= min(FIRST_STEPS, self._config.steps)

    def seconds_left(self, step: int) -> float:
        """Behind this step; the measurements count once one has been made."""
        steps, every = self._config.steps, self._config.eval_every
        measurements = steps // every - step // every + (steps % every > 0 and step < steps)
        return (steps - step) * statistics.median(self._steps) + measurements * (self._measurement or 0)

    def left(self, step: int) -> str:
        """In words; without the measurements, if none has been made yet."""
        besides = " and the measurements" if self._measurement is None else ""
        return f"about {duration(self.seconds_left(step))}{besides} to go"

    def sentence(self, step: int) -> str:
        return f"{statistics.median(self._steps):.3g} seconds a step, {self.left(step)}"
