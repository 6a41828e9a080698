"""What is said of a run before its first step is what its steps read, and the time follows from the log."""

import itertools
import random

import pytest

from vllm_ctc_spec.training.batches import epochs, sample_batch
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.forecast import Forecast, Pace, duration, rounded


def test_the_forecast_is_what_the_steps_read():
    rng = random.Random(0)
    examples = [Example([1], [5] * rng.randint(1, 30)) for _ in range(64)]  # some have nothing to draft
    usable = [example for example in examples if len(example.response) > 1]
    config = TrainConfig("t", "d", steps=200, batch_size=4, anchors=7, num_labels=5)
    forecast = Forecast.of(config, examples)
    batches = itertools.islice(epochs(examples, 4, 0), 200)
    found = [sample_batch(batch, 7, 5, seed) for seed, batch in enumerate(batches)]
    assert forecast.anchors == pytest.approx(sum(int(batch.valid[..., 0].sum()) for batch in found), rel=0.02)
    assert forecast.labels == pytest.approx(sum(int(batch.valid.sum()) for batch in found), rel=0.02)
    assert (forecast.sequences, forecast.examples) == (800, len(usable))
    assert forecast.places == sum(len(example.response) - 1 for example in usable)


def test_the_forecast_is_exact_where_every_anchor_is_read():
    examples = [Example([1, 2], [5] * 4), Example([1], [5] * 9)]
    forecast = Forecast.of(TrainConfig("t", "d", steps=3, batch_size=2, anchors=50, num_labels=3), examples)
    assert forecast == Forecast(6, 2, 3 * (3 + 8), 3 * ((3 + 2 + 1) + (6 * 3 + 2 + 1)), 11)
    assert str(forecast) == (
        "The steps read 6 sequences, each of the 2 different ones 3 times, and learn 81 labels at 33 anchors; the data "
        "have 11 different anchors."
    )


def test_numbers_are_told_in_three_digits():
    assert [rounded(n) for n in (7, 950, 6400, 999_600, 1_284_000, 2.5e9)] == [
        "7", "950", "6.4 k", "1 M", "1.28 M", "2.5 G",
    ]  # fmt: skip
    assert [duration(s) for s in (5, 89, 200, 5400, 36_000)] == [
        "5 seconds", "89 seconds", "3.3 minutes", "1.5 hours", "10 hours",
    ]  # fmt: skip


def test_the_time_left_is_that_of_steps_and_measurements():
    pace = Pace(TrainConfig("t", "d", steps=100, eval_every=30))
    for step in range(1, 10):
        pace.add({"step": step, "seconds": 2.0})
    assert not pace.is_known
    pace.add({"step": 10, "seconds": 400.0})  # another program's
    assert pace.is_known and pace.seconds_left(10) == 180
    assert pace.sentence(10) == "2 seconds a step, about 3 minutes and the measurements to go"
    pace.add({"step": 30, "seconds": 2.0, "measurement_seconds": 60.0})
    assert pace.seconds_left(30) == 140 + 3 * 60  # behind 60, 90 and the last step
    assert pace.seconds_left(90) == 20 + 60 and pace.seconds_left(100) == 0
    assert pace.left(30) == "about 5.3 minutes to go"


def test_a_run_shorter_than_the_first_steps_has_a_pace():
    pace = Pace(TrainConfig("t", "d", steps=2), [{"step": 1, "seconds": 1.0}, {"step": 2, "seconds": 1.0}])
    assert pace.is_known
