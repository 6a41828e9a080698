"""Stacks of drafters: the search against enumeration of all stacks, the formula against simulated decoding."""

import random
from collections.abc import Iterator
from itertools import combinations, product

import pytest

from vllm_ctc_spec.plan.stacks import Level, expected_tokens, fastest_stack, seconds_a_token


def random_models(seed: int) -> tuple[list[float], dict[tuple[int, int], float]]:
    rng = random.Random(seed)
    count = rng.randint(1, 4)
    seconds = sorted(rng.uniform(0.01, 1) ** 2 for _ in range(count))
    return seconds, {pair: rng.choice([0.0, rng.random(), 0.95]) for pair in combinations(range(count), 2)}


def all_stacks(num_drafting: int, max_tokens: int) -> Iterator[tuple[Level, ...]]:
    for depth in range(num_drafting + 1):
        for models in combinations(range(num_drafting), depth):
            for tokens in product(range(1, max_tokens + 1), repeat=depth):
                yield tuple(map(Level, models, tokens))


@pytest.mark.parametrize("seed", range(60))
def test_no_stack_is_faster(seed: int) -> None:
    seconds, acceptance = random_models(seed)
    best = fastest_stack(seconds, acceptance, 6)
    every = [seconds_a_token(stack, seconds, acceptance) for stack in all_stacks(len(seconds) - 1, 6)]
    assert len(every) == 7 ** (len(seconds) - 1)  # each model is left out or passes on 1 to 6 tokens
    assert best.seconds == pytest.approx(min(every))
    assert seconds_a_token(best.levels, seconds, acceptance) == pytest.approx(best.seconds)


def test_a_target_alone_takes_its_forward_and_a_useless_drafter_is_left_out() -> None:
    assert fastest_stack([2.0], {}, 6) == ((), 2.0)
    assert fastest_stack([1.0, 2.0], {(0, 1): 0.0}, 6) == ((), 2.0)
    assert fastest_stack([0.0, 2.0], {(0, 1): 1.0}, 6) == ((Level(0, 6),), 2.0 / 7)


@pytest.mark.parametrize(("acceptance", "drafted"), [(0.0, 4), (0.5, 1), (0.8, 6), (1.0, 3)])
def test_expected_tokens_of_a_verification(acceptance: float, drafted: int) -> None:
    if acceptance < 1:
        assert expected_tokens(acceptance, drafted) == pytest.approx(
            (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
        )
    rng = random.Random(1)
    mean = sum(accepted(acceptance, drafted, rng) + 1 for _ in range(50_000)) / 50_000
    assert expected_tokens(acceptance, drafted) == pytest.approx(mean, rel=0.02)


def accepted(acceptance: float, drafted: int, rng: random.Random) -> int:
    return next((k for k in range(drafted) if rng.random() >= acceptance), drafted)


class Simulation:
    """A stack that decodes: each level hands tokens to the one above, and asks the one below for its drafts whenever it
    has too few. What is verified in one go and not handed on stays for the next time."""

    def __init__(self, levels, seconds, acceptance, seed: int):
        self.levels, self.seconds, self.acceptance = levels, seconds, acceptance
        self.rng, self.time, self.left = random.Random(seed), 0.0, [0] * len(levels)

    def draft(self, height: int) -> int:
        """Tokens of the level at this height, from its model and those below."""
        level = self.levels[height]
        while self.left[height] < level.tokens:
            self.left[height] += self.verify(height, level.model) if height else self.forward(level.model)
        self.left[height] -= level.tokens
        return level.tokens

    def forward(self, model: int) -> int:
        self.time += self.seconds[model]
        return 1

    def verify(self, height: int, model: int) -> int:
        drafted = self.draft(height - 1)
        probability = self.acceptance[self.levels[height - 1].model, model]
        return accepted(probability, drafted, self.rng) + self.forward(model)

    def seconds_a_token(self, tokens: int) -> float:
        target, made = len(self.seconds) - 1, 0
        while made < tokens:
            made += self.verify(len(self.levels), target) if self.levels else self.forward(target)
        return self.time / made


@pytest.mark.parametrize(
    "levels",
    [
        (), (Level(1, 4),), (Level(0, 2), Level(1, 5)), (Level(0, 6), Level(2, 3)),
        (Level(0, 3), Level(1, 2), Level(2, 6)),
    ],
)  # fmt: skip
def test_simulated_decoding_takes_as_long(levels: tuple[Level, ...]) -> None:
    seconds = [0.02, 0.1, 0.3, 1.0]
    acceptance = {(0, 1): 0.6, (0, 2): 0.5, (0, 3): 0.4, (1, 2): 0.8, (1, 3): 0.7, (2, 3): 0.9}
    simulated = Simulation(levels, seconds, acceptance, seed=2).seconds_a_token(40_000)
    assert seconds_a_token(levels, seconds, acceptance) == pytest.approx(simulated, rel=0.02)
