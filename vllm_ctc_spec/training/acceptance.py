"""Held-out acceptance length: what greedy serving would get from this drafter, without a server.

The target's own greedy responses are fixed, so that one pass of the target gives every hidden state, the drafts of
all positions are made at once, and serving's walk over them is a lookup: at the anchor accept the longest prefix of
the draft that the response continues with, then the target's own next token.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vllm_ctc_spec.drafter import CTCDrafter, Frames
from vllm_ctc_spec.kernels.prefix_chain import prefix_chain
from vllm_ctc_spec.training.batches import anchor_positions, make_batch
from vllm_ctc_spec.training.generate import Example
from vllm_ctc_spec.training.target import AuxHiddenStates

ANCHORS_AT_ONCE = 64  # bounds the attention mask, which is quadratic in the anchors of a forward

Chain = Callable[[Frames, Tensor, CTCDrafter], Tensor]


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Tokens advanced and steps taken, one entry per response."""

    tokens: list[int]
    steps: list[int]

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
        return f"{self.length:.3f} +- {self.half_width:.3f} ({len(self.steps)} prompts, {sum(self.steps)} steps)"


def prefix_drafts(frames: Frames, anchors: Tensor, drafter: CTCDrafter) -> Tensor:
    """Greedy labels from the exact prefix conditionals, `[N, U]`; frames `[N, T, ...]`, anchors `[N]`."""
    logits, odds = frames.logits.float(), frames.blank_odds.float()
    head = drafter.markov_head
    markov = None if head is None else (head.embedding.weight, head.output.weight)
    log_label = logsigmoid(-odds) - torch.logsumexp(logits, -1)
    return prefix_chain(logits, log_label, logsigmoid(odds), anchors, drafter.config.num_labels, markov=markov)[0]


def parallel_drafts(frames: Frames, anchors: Tensor, drafter: CTCDrafter) -> Tensor:
    """Greedy labels of a drafter trained with the cross-entropy twin: frame k is label k."""
    labels = [anchors]
    for k in range(drafter.config.num_labels):
        scores = frames.logits[:, k]
        if drafter.markov_head is not None:
            scores = scores + drafter.markov_head(labels[-1])
        labels.append(scores.argmax(-1))
    return torch.stack(labels[1:], 1)


CHAINS: dict[str, Chain] = {"prefix": prefix_drafts, "ctc": prefix_drafts, "ce": parallel_drafts}


def walk(accepted: Sequence[int]) -> tuple[int, int]:
    """Tokens and steps of serving, given how many labels would be accepted at each anchor of a response."""
    position = steps = 0
    while position < len(accepted):
        # The response may end before the draft does, or before the target's own next token.
        position += min(accepted[position] + 1, len(accepted) - position)
        steps += 1
    return len(accepted), steps


@torch.no_grad()
def measure_acceptance(
    drafter: CTCDrafter, aux_hidden_states: AuxHiddenStates, examples: Sequence[Example], chain: Chain
) -> Acceptance:
    """Greedy acceptance length over the examples that have anything to draft."""
    device, num_labels = drafter.target_head.device, drafter.config.num_labels
    tokens, steps = [], []
    for example in examples:
        there = torch.tensor(anchor_positions(example))[None]
        if not there.numel():
            continue
        batch = make_batch([example], there, num_labels).to(device)
        aux = aux_hidden_states(batch.token_ids)
        matches = []
        for start in range(0, there.shape[1], ANCHORS_AT_ONCE):
            part = slice(start, start + ANCHORS_AT_ONCE)
            frames = drafter(aux, batch.anchors[:, part], batch.positions[:, part])
            drafts = chain(Frames(frames.logits[0], frames.blank_odds[0]), batch.anchors[0, part], drafter)
            matches.append(drafts == batch.labels[0, part])
        accepted = torch.cat(matches).cumprod(1).sum(1).tolist()
        advanced, taken = walk(accepted)
        tokens.append(advanced)
        steps.append(taken)
    return Acceptance(tokens, steps)
