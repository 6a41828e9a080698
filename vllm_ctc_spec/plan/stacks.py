"""Stacks of drafters: a small model drafts for a larger one, which drafts for a larger one still, up to the target.

Nothing serves stacks yet; this is the arithmetic that says which stack would be fastest. Level i passes on T_i tokens
at a time. They cost, with c_i the seconds of one forward of model i and a_i the probability that it accepts a token of
the level below,

    X_0 = T_0 c_0,    X_i = T_i / E(a_i, T_(i-1)) (X_(i-1) + c_i),    E(a, T) = (1 - a^(T+1)) / (1 - a),

and the target, which takes T_(K-1) tokens of the level below at a time, seconds a token = (X_(K-1) + c_K) /
E(a_K, T_(K-1)). E is the expected number of tokens of one verification (Leviathan, Kalman, Matias, arXiv 2211.17192,
equation 1). Assumed: tokens are accepted independently, and a forward costs the same for any number of rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Level(NamedTuple):
    model: int
    tokens: int  # T, passed on at a time


class Stack(NamedTuple):
    """The drafting levels from the smallest model on; none: the target alone."""

    levels: tuple[Level, ...]
    seconds: float  # a token of the target


def expected_tokens(acceptance: float, drafted: int) -> float:
    """E(a, T), for 0 <= a <= 1."""
    return sum(acceptance**k for k in range(drafted + 1))


def seconds_a_token(
    levels: Sequence[Level], seconds: Sequence[float], acceptance: Mapping[tuple[int, int], float]
) -> float:
    """Of the target, the last model of `seconds`, which are those of a forward of each. acceptance: by (drafting model,
    verifying model)."""
    cost, below = 0.0, None
    for level in levels:
        rounds = level.tokens  # a model that drafts alone takes a forward a token
        if below is not None:
            rounds = level.tokens / expected_tokens(acceptance[below.model, level.model], below.tokens)
        cost, below = rounds * (cost + seconds[level.model]), level
    target = len(seconds) - 1
    accepted = 1.0 if below is None else expected_tokens(acceptance[below.model, target], below.tokens)
    return (cost + seconds[target]) / accepted


def fastest_stack(
    seconds: Sequence[float], acceptance: Mapping[tuple[int, int], float], max_tokens: int
) -> Stack:
    """Over all stacks of models in the order given, each at most once, that pass on 1 to `max_tokens` tokens.

    Exact: what a level costs grows with what the level below costs, and depends on nothing else of it but its model
    and its tokens, so that the cheapest way to each (model, tokens) is part of the fastest stack through it.
    """
    target = len(seconds) - 1
    cheapest: dict[Level, tuple[float, tuple[Level, ...]]] = {}
    for model in range(target):
        below = list(cheapest.items())
        for tokens in range(1, max_tokens + 1):
            level = Level(model, tokens)
            ways = [(tokens * seconds[model], (level,))]
            for lower, (cost, levels) in below:
                rounds = tokens / expected_tokens(acceptance[lower.model, model], lower.tokens)
                ways.append((rounds * (cost + seconds[model]), (*levels, level)))
            cheapest[level] = min(ways)
    stacks = [Stack((), seconds[target])]
    for lower, (cost, levels) in cheapest.items():
        accepted = expected_tokens(acceptance[lower.model, target], lower.tokens)
        stacks.append(Stack(levels, (cost + seconds[target]) / accepted))
    return min(stacks, key=lambda stack: stack.seconds)
