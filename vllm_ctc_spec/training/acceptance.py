"""Acceptance length: tokens that a response advances by, in serving's walk over it, per step of the target."""

import dataclasses
import math
from collections.abc import Sequence

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
        """Half the 95% confidence interval over prompts (normal approximation of a ratio of sums)."""
        count, steps = len(self.steps), sum(self.steps)
        if count < 2 or not steps:
            return math.inf
        residuals = [t - self.length * s for t, s in zip(self.tokens, self.steps)]
        return 1.96 * math.sqrt(count / (count - 1) * sum(r * r for r in residuals)) / steps

    def __str__(self) -> str:
        return f"{self.length:.3f} +- {self.half_width:.3f} ({len(self.steps)} prompts, {sum(self.steps):.0f} steps)"


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
