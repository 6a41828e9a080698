"""Acceptance length without a server: what serving would get from this drafter on given responses of the target.

The responses are fixed, so that one pass of the target gives every hidden state, the drafts of all positions are made
at once, and serving's walk over them is a lookup: at the anchor advance by the labels accepted and one. That is exact
at any temperature at which the responses were sampled, because verification leaves the output's law alone: given that
the target says y, a greedy chain or a tree is accepted as far as it holds y, and a draft sampled from q up to each
label with probability min(1, q(y) / p(y)).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.batches import anchor_positions, make_batch
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.drafting import Drafting
from vllm_ctc_spec.training.features import Features

ANCHORS_AT_ONCE = 64  # bounds the logits, and the attention mask, which is quadratic in the anchors of a forward

Part = TypeVar("Part")


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
        """Of the 95% confidence interval over prompts (normal approximation of a ratio of sums)."""
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
    """Expected steps, where label k of anchor i, `[anchors, U]`, is accepted with a probability if those before are."""
    num_anchors, num_labels = probability.shape
    reached = torch.cat([torch.ones(num_anchors, 1), probability], 1).double().cumprod(1)
    stops = reached - torch.cat([reached[:, 1:], torch.zeros(num_anchors, 1)], 1)  # [anchors, 1 + U]: k accepted
    visits = torch.zeros(num_anchors + num_labels + 1, dtype=torch.float64)
    visits[0] = 1
    for anchor in range(num_anchors):
        visits[anchor + 1 : anchor + num_labels + 2] += visits[anchor] * stops[anchor]
    return float(visits[:num_anchors].sum())


def draft_everywhere(
    drafter: CTCDrafter, features: Features, examples: Sequence[Example], measure: Callable[[Drafting], Part]
) -> Iterator[tuple[Example, list[Part]]]:
    """Each example that has anything to draft, and what `measure` makes of the drafter at all of its anchors, some at a
    time: their logits are gone before the next ones come."""
    device, num_labels = drafter.target_head.device, drafter.config.num_labels
    for example in examples:
        there = torch.tensor(anchor_positions(example), dtype=torch.long)[None]
        if not there.numel():
            continue
        batch = make_batch([example], there, num_labels).to(device)
        states = features([example], batch.token_ids)
        parts = [
            measure(Drafting.at(drafter, states, batch.anchors_in(slice(start, start + ANCHORS_AT_ONCE))))
            for start in range(0, there.shape[1], ANCHORS_AT_ONCE)
        ]
        yield example, parts


@torch.no_grad()
def measure_chain(drafter: CTCDrafter, features: Features, examples: Sequence[Example]) -> Acceptance:
    """Greedy chains of U labels."""
    tokens, steps = [], []
    for _, parts in draft_everywhere(drafter, features, examples, lambda part: part.accepted(part.chain())):
        accepted = torch.cat(parts).tolist()
        tokens.append(len(accepted))
        steps.append(walk(accepted))
    return Acceptance(tokens, steps)


@torch.no_grad()
def measure_trees(
    drafter: CTCDrafter, features: Features, examples: Sequence[Example], sizes: Sequence[int]
) -> dict[int, Acceptance]:
    """Trees of each size, at most U deep. Each is searched for: the first rows of a larger one, which has more
    candidates, are better than the tree that is served.
    """
    measured: dict[int, Acceptance] = {size: Acceptance([], []) for size in sizes}

    def depths(part: Drafting) -> list[Tensor]:
        return [part.accepted_in(part.tree(size)) for size in sizes]

    for _, parts in draft_everywhere(drafter, features, examples, depths):
        for size, of_size in zip(sizes, zip(*parts)):
            accepted = torch.cat(of_size).tolist()
            measured[size].tokens.append(len(accepted))
            measured[size].steps.append(walk(accepted))
    return measured


@torch.no_grad()
def measure_sampled_chain(
    drafter: CTCDrafter,
    features: Features,
    examples: Sequence[Example],
    target_log_probs: Callable[[Example], Tensor],
) -> Acceptance:
    """Chains sampled from q at temperature 1, for responses sampled at temperature 1: exact expected steps.

    target_log_probs: log p of each response token under the target, `[response]`.
    """
    tokens, steps = [], []
    for example, parts in draft_everywhere(drafter, features, examples, lambda part: (part.log_q(), part.valid)):
        log_q, valid = (torch.cat(each) for each in zip(*parts))
        log_p = target_log_probs(example).to(log_q)
        # Label k of anchor i, response token i, is response token i + k.
        place = torch.arange(len(log_q))[:, None] + torch.arange(1, log_q.shape[1] + 1)
        log_p = log_p[place.clamp_max(len(log_p) - 1)]
        probability = torch.where(valid, (log_q - log_p).clamp_max(0).exp(), 0.0)
        tokens.append(len(log_q))
        steps.append(expected_walk(probability.cpu()))
    return Acceptance(tokens, steps)
