"""Acceptance length: tokens that a response advances by, in serving's walk over it, per step of the target."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Tokens advanced and steps taken, one entry per response; steps are expectations where drafts are sampled."""

    tokens: list[int]
    steps: list[float]

    @property
    def length(self) -> float:
        return sum(self.tokens) / max(1, sum(self.steps))

    @property
    def half_width(self) -> float:
        """Half of the 95% interval over entries."""
        return ratio(self.tokens, self.steps)[1]

    def grouped(self, groups: Sequence[Hashable]) -> "Acceptance":
        """One entry a group: the same length, and an interval over groups. Turns of one conversation are alike."""
        tokens: dict[Hashable, int] = defaultdict(int)
        steps: dict[Hashable, float] = defaultdict(float)
        for group, t, s in zip(groups, self.tokens, self.steps, strict=True):
            tokens[group] += t
            steps[group] += s
        return Acceptance(list(tokens.values()), list(steps.values()))

    def minus(self, other: "Acceptance") -> tuple[float, float]:
        """The difference of two lengths on the same responses, and half of its 95% interval: what the responses have in
        common cancels out."""
        pairs = zip(*(_influences(each.tokens, each.steps) for each in (self, other)), strict=True)
        return self.length - other.length, _half_width([mine - theirs for mine, theirs in pairs])

    def __str__(self) -> str:
        return f"{self.length:.3f} +- {self.half_width:.3f} ({len(self.steps)} rows, {sum(self.steps):.0f} steps)"


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float]:
    """The ratio of two sums over independent entries, and half of its 95% interval (normal approximation)."""
    return sum(tops) / max(1, sum(bottoms)), _half_width(_influences(tops, bottoms))


def _influences(tops: Sequence[float], bottoms: Sequence[float]) -> list[float]:
    """How far each entry moves the ratio of the sums, to first order."""
    total = max(1, sum(bottoms))
    mean = sum(tops) / total
    return [(top - mean * bottom) / total for top, bottom in zip(tops, bottoms)]


def _half_width(influences: Sequence[float]) -> float:
    count = len(influences)
    if count < 2:
        return math.inf
    return 1.96 * math.sqrt(count / (count - 1) * sum(i * i for i in influences))


def walk(accepted: Sequence[int]) -> int:
    """Steps of serving, given how many labels would be accepted at each anchor of a response."""
    position = steps = 0
    while position < len(accepted):
        # The response may end before the draft does, or before the target's own next token.
        position += accepted[position] + 1
        steps += 1
    return steps


def expected_walk(probability: Tensor) -> float:
    """Expected steps. probability `[anchors, U]`: that label k of anchor i is accepted if the labels before it are."""
    num_anchors, num_labels = probability.shape
    reached = torch.cat([torch.ones(num_anchors, 1), probability], 1).double().cumprod(1)
    stops = reached - torch.cat([reached[:, 1:], torch.zeros(num_anchors, 1)], 1)  # [anchors, 1 + U]: k accepted
    visits = torch.zeros(num_anchors + num_labels + 1, dtype=torch.float64)
    visits[0] = 1
    for anchor in range(num_anchors):
        visits[anchor + 1 : anchor + num_labels + 2] += visits[anchor] * stops[anchor]
    return float(visits[:num_anchors].sum())
