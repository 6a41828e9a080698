"""After a run: which of data, steps or size to raise next, as far as its own measurements tell."""

import math
from typing import NamedTuple

from vllm_ctc_spec.training.acceptance import Acceptance

LAST_PART = 0.75  # of the steps, behind which a rise of held-out acceptance says that the run was too short
MIN_RISE = 0.01  # of the acceptance length: less is not worth another quarter of the steps
MIN_GAP = 0.05  # of the loss


class Estimate(NamedTuple):
    """half_width: of the 95% interval."""

    value: float
    half_width: float

    def exceeds(self, smallest: float) -> bool:
        """More than nothing for certain, and more than `smallest` as far as is known."""
        return self.value > self.half_width and self.value > smallest

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.half_width:.3f}"


class Measurement(NamedTuple):
    """Held-out acceptance after a step, with an entry for each conversation."""

    step: int
    tokens: list[int]
    steps: list[float]

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance(self.tokens, self.steps)


class Evidence(NamedTuple):
    """What a finished run knows. Losses are those of the published weights, None where they cannot be compared."""

    passes: float  # how often each training sequence was read
    train_loss: Estimate | None
    held_out_loss: Estimate | None
    measurements: list[Measurement]  # in order of their steps

    @property
    def gap(self) -> Estimate | None:
        """How much worse the drafter predicts held-out responses than those that it learned from."""
        if self.train_loss is None or self.held_out_loss is None:
            return None
        half_width = math.hypot(self.train_loss.half_width, self.held_out_loss.half_width)
        return Estimate(self.held_out_loss.value - self.train_loss.value, half_width)

    @property
    def rise(self) -> Estimate | None:
        """Of held-out acceptance in the last part of the run, measured on the same responses."""
        last = self.measurements[-1]
        before = [each for each in self.measurements if each.step <= LAST_PART * last.step]
        return Estimate(*last.acceptance.minus(before[-1].acceptance)) if before else None


def advise(evidence: Evidence) -> str:
    """Sentences: what was measured, then what follows from it."""
    gap, rise, last = evidence.gap, evidence.rise, evidence.measurements[-1]
    known = [f"Each training sequence was read {evidence.passes:.2g} times"]
    if gap is not None:
        known.append(f"the loss on held-out responses is {gap} above that on trained ones ({evidence.train_loss})")
    if rise is not None:
        known.append(f"held-out acceptance changed by {rise} over the last quarter of the steps")
    return f"{'; '.join(known)}. {_verdict(evidence, gap, rise, last.acceptance.length)}"


def _verdict(evidence: Evidence, gap: Estimate | None, rise: Estimate | None, length: float) -> str:
    memorises = gap is not None and evidence.train_loss is not None and gap.exceeds(MIN_GAP * evidence.train_loss.value)
    learns = rise is not None and rise.exceeds(MIN_RISE * length)
    falls = rise is not None and Estimate(-rise.value, rise.half_width).exceeds(0)
    if memorises and evidence.passes <= 1:
        return (
            "No sequence was read twice, so the held-out rows seem to be of another kind than the others: shuffle the "
            "file, or train on more like them."
        )
    if memorises or falls:
        more = ", and steps with them" if learns else ""
        return f"Raise the data first: more prompts{more}."
    if learns:
        fresh = " The data have sequences that were not read yet." if evidence.passes < 1 else ""
        return f"Raise --steps first.{fresh}"
    if rise is None:
        return "Measure more often (--eval-every) to see whether more steps would help."
    if gap is None or not _is_sharp(rise, length):
        return "This does not tell what to raise; more held-out prompts (--held-out) would."
    return (
        "Neither more data nor more steps would help much: what is left is the size (--num-layers, --num-frames, "
        "--aux-layers)."
    )


def _is_sharp(rise: Estimate, length: float) -> bool:
    """Whether a rise that is worth more steps would have been seen."""
    return rise.half_width < 2 * MIN_RISE * length
