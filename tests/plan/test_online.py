"""Following a plan on simulated servers: hardly slower than no speculation or the plan, whatever is accepted."""

import random

import pytest

from vllm_ctc_spec.plan.online import PROBE, WAITS, FollowedPlan
from vllm_ctc_spec.plan.solve import UNBOUNDED, Expected

SCHEDULE = [(1, 1, 8), (2, 4, 2), (5, UNBOUNDED, 0)]
EXPECTED = [
    Expected(1, 2, 1.8, 1.4), Expected(1, 8, 2.6, 1.6), Expected(2, 2, 1.8, 1.3), Expected(2, 8, 2.6, 1.2),
    Expected(4, 2, 1.8, 1.1), Expected(4, 8, 2.6, 0.9),
]  # fmt: skip
LENGTHS = {2: 1.8, 8: 2.6}


class Server:
    """A batch of requests; time is counted in steps without speculation."""

    def __init__(self, share: float, seed: int = 0):
        """share: accepted tokens, of those that the plan expects."""
        self.plan, self.share, self.random = FollowedPlan(SCHEDULE, EXPECTED), share, random.Random(seed)
        self.tokens = self.time = 0.0
        self.drafted: list[int] = []

    def run(self, batch: int, steps: int) -> float:
        """Speedup of these steps."""
        tokens, time = self.tokens, self.time
        for _ in range(steps):
            size = self.plan[batch]
            self.drafted.append(size)
            self.time += step_time(batch, size)
            for _ in range(batch):
                accepted = self.draw(size)
                self.tokens += (1 + accepted) / batch
                if size:
                    self.plan.observe(size, accepted)
        return (self.tokens - tokens) / (self.time - time)

    def draw(self, size: int) -> int:
        """As many as expected, times the share, in the mean; any number up to the draft's."""
        if not size:
            return 0
        probability = self.share * (LENGTHS[size] - 1) / size
        return sum(self.random.random() < probability for _ in range(size))


def step_time(batch: int, size: int) -> float:
    if not size:
        return 1.0
    measured = min(row.batch_size for row in EXPECTED if row.batch_size >= batch)
    (row,) = (row for row in EXPECTED if (row.batch_size, row.tokens) == (measured, size))
    return row.acceptance_length / row.speedup


@pytest.mark.parametrize(("batch", "size"), [(1, 8), (2, 2), (3, 2), (4, 2), (5, 0), (400, 0)])
def test_requests_like_the_plans_get_the_plans_drafts(batch, size):
    assert FollowedPlan(SCHEDULE, EXPECTED)[batch] == size
    server = Server(share=1.0)
    server.run(batch, 3000)
    assert server.drafted.count(size) >= 0.99 * 3000
    assert server.plan.share == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3])
def test_never_slower_than_no_speculation_and_near_the_best_choice(share, batch):
    server = Server(share, seed=int(10 * share) + batch)
    server.run(batch, 2000)  # the server learns
    speed = server.run(batch, 20_000)
    sizes = (0, 2, 8) if batch == 1 else (0, 2)
    best = max((1 + share * (LENGTHS.get(size, 1) - 1)) / step_time(batch, size) for size in sizes)
    assert speed >= 0.98
    assert speed >= 0.96 * best


def test_a_smaller_draft_is_next():
    """With half of what the plan expects eight tokens give 1.11, two give 1.09; with a third 0.94 and 0.99."""
    plan = FollowedPlan([(1, 1, 8), (2, 9, 2)], [Expected(1, 8, 3.0, 1.5), Expected(1, 2, 1.6, 1.45)])
    assert plan[1] == 8
    for _ in range(2000):
        plan.observe(8, 1)  # half
    assert plan.share == pytest.approx(0.5, abs=0.01) and plan[1] == 2
    for _ in range(2000):
        plan.observe(2, 0)
    assert plan[1] == 0


def test_drafts_return_when_they_pay_again():
    server = Server(share=0.1)
    server.run(1, 3000)
    assert server.drafted[-1] == 0
    server.share = 1.0
    server.run(1, 2 * WAITS[1])
    assert server.drafted[-100:] == [8] * 100


def test_while_nothing_pays_looks_become_rare():
    server = Server(share=0.0)
    server.run(1, 60_000)
    looks = [step for step in range(1, 60_000) if server.drafted[step] and not server.drafted[step - 1]]
    waits = [after - before - PROBE for before, after in zip(looks, looks[1:])]
    assert waits[0] < waits[1] < waits[2] and max(waits) <= WAITS[1]
    assert sum(map(bool, server.drafted[1000:])) <= 0.02 * 59_000


def test_a_batch_that_pays_teaches_the_others():
    """At one request 8 tokens pay with 0.7 of what is expected, at four 2 tokens do not; no looks are needed."""
    server = Server(share=0.7)
    for _ in range(200):
        server.run(1, 20)
        server.run(4, 20)
    last = server.drafted[-40:]
    assert set(last[:20]) <= {8, 2} and set(last[20:]) == {0}


def test_drafts_of_other_sizes_and_a_plan_without_expectations_change_nothing():
    plan = FollowedPlan(SCHEDULE, EXPECTED)
    for _ in range(1000):
        plan.observe(5, 0)  # cut at the end of a request
    assert plan.share == 1.0
    bare = FollowedPlan(SCHEDULE, [])
    for _ in range(1000):
        bare.observe(8, 0)
    assert [bare[batch] for batch in (1, 2, 4, 5)] == [8, 2, 2, 0]


def test_a_plan_whose_drafts_accept_nothing_divides_by_nothing():
    plan = FollowedPlan([(1, 9, 2)], [Expected(1, 2, 1.0, 1.2)])
    plan.observe(2, 0)
    assert plan.share == 1.0 and plan[1] == 2
