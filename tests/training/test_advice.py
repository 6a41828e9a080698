"""What a run says about the next one follows from its measurements, and says so where they do not tell."""

import math

import pytest

from vllm_ctc_spec.training.advice import Estimate, Evidence, Measurement, advise

TRAINED = Estimate(2.0, 0.02)


def measured(step: int, steps: float, rows: int = 40) -> Measurement:
    """Ten tokens a row; rows differ a little."""
    return Measurement(step, [10] * rows, [steps + 0.1 * (row % 2) for row in range(rows)])


RISING = [measured(50, 6.0), measured(75, 5.0), measured(100, 4.0)]
FLAT = [measured(50, 6.0), measured(75, 4.0), measured(100, 4.0)]
FALLING = [measured(50, 6.0), measured(75, 4.0), measured(100, 4.5)]
UNCERTAIN = [measured(75, 4.0, 2), Measurement(100, [10, 10], [3.0, 5.0])]
LAST_ONLY = [measured(100, 4.0)]
GAP, NO_GAP = Estimate(2.3, 0.05), Estimate(2.05, 0.04)


@pytest.mark.parametrize(
    ("passes", "losses", "measurements", "verdict"),
    [
        (5, (TRAINED, GAP), FLAT, "Raise the data first: more prompts."),
        (5, (TRAINED, GAP), RISING, "Raise the data first: more prompts, and steps with them."),
        (5, (TRAINED, NO_GAP), FALLING, "Raise the data first: more prompts."),
        (5, (TRAINED, NO_GAP), RISING, "Raise --steps first."),
        (0.5, (TRAINED, NO_GAP), RISING, "Raise --steps first. The data have sequences that were not read yet."),
        (5, (None, None), RISING, "Raise --steps first."),
        (5, (TRAINED, NO_GAP), FLAT, "Neither more data nor more steps would help much: what is left is the size"),
        (5, (None, None), FLAT, "This does not tell what to raise"),
        (5, (TRAINED, NO_GAP), UNCERTAIN, "This does not tell what to raise; more held-out prompts"),
        (5, (TRAINED, Estimate(2.3, 0.5)), LAST_ONLY, "Measure more often (--eval-every)"),
        (0.5, (TRAINED, GAP), FLAT, "No sequence was read twice, so the held-out rows seem to be of another kind"),
    ],
)
def test_a_verdict_follows_from_what_was_measured(passes, losses, measurements, verdict):
    said = advise(Evidence(passes, *losses, measurements))
    assert f". {verdict}" in said and said.startswith(f"Each training sequence was read {passes:.2g} times")
    assert ("above that on trained ones" in said) == (losses[0] is not None)
    assert ("over the last quarter" in said) == (len(measurements) > 1)


def test_the_rise_is_that_of_the_last_quarter():
    often = [measured(step, 10 - step / 20) for step in range(10, 101, 10)]
    assert Evidence(1, None, None, often).rise == Estimate(*often[-1].acceptance.minus(often[6].acceptance))
    assert Evidence(1, None, None, often[-2:]).rise is None


def test_an_estimate_exceeds_only_for_certain():
    assert Estimate(0.3, 0.2).exceeds(0.1)
    assert not Estimate(0.3, 0.4).exceeds(0.1) and not Estimate(0.3, 0.2).exceeds(0.5)
    assert not Estimate(5.0, math.inf).exceeds(0)
    assert Evidence(1, Estimate(2.0, 0.3), Estimate(2.5, 0.4), LAST_ONLY).gap == Estimate(0.5, pytest.approx(0.5))
