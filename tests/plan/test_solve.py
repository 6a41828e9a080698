"""The solver against all assignments of drafts to batch sizes, and by hand."""

import math
import random
from itertools import product
from statistics import geometric_mean

import pytest

from vllm_ctc_spec.plan.solve import (
    KINDS,
    NONE,
    SERVED,
    UNBOUNDED,
    Choice,
    Draft,
    better_kind,
    choose,
    confirmed,
    mean_speed,
    needs_confirmation,
    schedule,
)

DRAFTS = ("chain:1", "chain:3", "tree:2", "tree:7", "tree:16", "ctc+cache:3", "ctc+cache:15")


def random_case(seed: int) -> tuple[dict, dict]:
    rng = random.Random(seed)
    batches = sorted(rng.sample(range(1, 20), rng.randint(1, 4)))
    steps = {
        batch: {NONE: rng.uniform(5, 10)} | {draft: rng.uniform(8, 40) for draft in DRAFTS} for batch in batches
    }
    return steps, {draft: rng.uniform(1, 4) for draft in DRAFTS}


@pytest.mark.parametrize("min_speedup", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("seed", range(40))
def test_no_assignment_of_one_kind_is_faster(seed: int, min_speedup: float) -> None:
    steps, lengths = random_case(seed)

    def speed(batch: int, draft: str) -> float:
        return batch * lengths.get(draft, 1.0) / steps[batch][draft] * 1e3

    def allowed(batch: int, kind: str) -> list[str]:
        reach = min_speedup * speed(batch, NONE)
        paying = [draft for draft in DRAFTS if draft.startswith(kind) and speed(batch, draft) >= reach]
        return paying or [NONE]

    best = {}
    for kind in KINDS:
        assignments = product(*(allowed(batch, kind) for batch in steps))
        best[kind] = max(geometric_mean(map(speed, steps, assignment)) for assignment in assignments)
    choices = {kind: choose(steps, lengths, kind, min_speedup) for kind in KINDS}
    assert {kind: mean_speed(chosen) for kind, chosen in choices.items()} == pytest.approx(best)
    assert best[better_kind(choices)] == max(best.values())
    for choice in (choice for chosen in choices.values() for choice in chosen):
        assert choice.step_ms == steps[choice.batch_size][choice.draft]
        assert choice.tokens_a_second == pytest.approx(speed(choice.batch_size, choice.draft))
        none = speed(choice.batch_size, NONE)
        assert choice.speedup == pytest.approx(choice.tokens_a_second / none)
        if min_speedup >= 1:
            assert choice.speedup >= 1  # never slower


@pytest.mark.parametrize("seed", range(20))
def test_a_schedule_gives_every_batch_the_next_larger_measured_ones_draft(seed: int) -> None:
    steps, lengths = random_case(seed)
    choices = choose(steps, lengths, "tree", 1.0)
    ranges = schedule(choices)
    assert ranges[0][0] == 1 and ranges[-1][1] == UNBOUNDED
    assert all(after[0] == before[1] + 1 and after[2] != before[2] for before, after in zip(ranges, ranges[1:]))
    sizes = {choice.batch_size: choice.size for choice in choices}
    for batch in range(1, 40):
        larger = [measured for measured in sizes if measured >= batch]
        (drafted,) = (size for first, last, size in ranges if first <= batch <= last)
        assert drafted == (sizes[min(larger)] if larger else 0)


def test_nothing_is_drafted_where_nothing_pays() -> None:
    steps = {1: {NONE: 10.0, "chain:1": 20.0}, 4: {NONE: 10.0, "chain:1": 25.0}}
    choices = choose(steps, {"chain:1": 1.9}, "chain", 1.0)
    assert choices == (Choice(1, NONE, 10.0, 1.0, 1.0), Choice(4, NONE, 10.0, 1.0, 1.0))
    assert schedule(choices) == [(1, UNBOUNDED, 0)]
    assert choose(steps, {}, "tree", 1.0) == choices  # a kind without candidates
    assert not needs_confirmation(choices)


def test_a_draft_that_reaches_the_speedup_exactly_is_taken_and_the_smaller_of_equals() -> None:
    steps = {1: {NONE: 10.0, "tree:4": 20.0, "tree:16": 40.0}}
    assert choose(steps, {"tree:4": 3.0, "tree:16": 6.0}, "tree", 1.5)[0].draft == "tree:4"
    assert choose(steps, {"tree:4": 3.0, "tree:16": 6.0}, "tree", 1.51)[0].draft == NONE


def test_drafts_that_are_slower_in_the_served_plan_go() -> None:
    choices = (
        Choice(1, "tree:16", 20.0, 4.0, 2.0), Choice(2, "tree:4", 20.0, 2.2, 1.1), Choice(4, NONE, 10.0, 1.0, 1.0),
    )  # fmt: skip
    assert needs_confirmation(choices)
    # At the second batch size the machine was half as fast as before.
    steps = {1: {NONE: 10.0, SERVED: 25.0}, 2: {NONE: 20.0, SERVED: 48.0}, 4: {NONE: 10.0, SERVED: 10.5}}
    kept = confirmed(choices, steps, 1.0)
    assert [choice.draft for choice in kept] == ["tree:16", NONE, NONE]
    assert [choice.step_ms for choice in kept] == pytest.approx([25.0, 10.0, 10.5])
    assert [choice.speedup for choice in kept] == pytest.approx([1.6, 1.0, 10 / 10.5])
    assert schedule(kept) == [(1, 1, 16), (2, UNBOUNDED, 0)]
    slower = confirmed(choices, steps, 0.9)[1]
    assert slower.draft == "tree:4" and slower.step_ms == pytest.approx(24.0)


@pytest.mark.parametrize(
    "text", ["chain", "chain:0", "tree:-1", "bush:3", "tree:3.0", "chain:٣", " chain:3", "chain:99999", "none"]
)
def test_what_is_no_draft(text: str) -> None:
    assert Draft.parse(text) is None


def test_drafts_are_read_as_they_are_written() -> None:
    assert [str(Draft.parse(text)) for text in DRAFTS] == list(DRAFTS)
    assert math.isclose(mean_speed([Choice(2, NONE, 4.0, 1.0, 1.0)]), 500.0)
