"""Acceptance length without a server: the one that serving would get on given responses of the target.

The responses are fixed. So one pass of the target gives every hidden state, the drafts of all positions are made at
once, and serving's walk over them is a lookup: at the anchor advance by the labels accepted and one. That is exact
at any temperature at which the responses were sampled, because verification leaves the output's law alone: given that
the target says y, a greedy chain or a tree is accepted as far as it holds y, and a draft sampled from q up to each
label with probability min(1, q(y) / p(y)).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.acceptance import Acceptance, expected_walk, walk
from vllm_ctc_spec.training.batches import anchor_positions, make_batch
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.drafting import Drafting
from vllm_ctc_spec.training.hidden_states import HiddenStates

ANCHORS_AT_ONCE = 64  # bounds the logits, and the attention mask, which is quadratic in the anchors of a forward

Part = TypeVar("Part")


def draft_everywhere(
    drafter: CTCDrafter, hidden_states: HiddenStates, examples: Sequence[Example], measure: Callable[[Drafting], Part]
) -> Iterator[tuple[Example, list[Part]]]:
    """Each example that has anything to draft, with the results of `measure` at all of its anchors. `measure` gets some
    anchors at a time: their logits are gone before the next ones come."""
    device, num_labels = drafter.target_head.device, drafter.config.num_labels
    for example in examples:
        positions = torch.tensor(anchor_positions(example), dtype=torch.long)[None]
        if not positions.numel():
            continue
        batch = make_batch([example], positions, num_labels).to(device)
        states = hidden_states([example], batch.token_ids)
        parts = [
            measure(Drafting.at(drafter, states, batch.anchors_in(slice(start, start + ANCHORS_AT_ONCE))))
            for start in range(0, positions.shape[1], ANCHORS_AT_ONCE)
        ]
        yield example, parts


def measure_chain(drafter: CTCDrafter, hidden_states: HiddenStates, examples: Sequence[Example]) -> Acceptance:
    """Greedy chains of U labels."""
    num_labels = drafter.config.num_labels
    return measure_chains(drafter, hidden_states, examples, [num_labels])[num_labels]


@torch.no_grad()
def measure_chains(
    drafter: CTCDrafter, hidden_states: HiddenStates, examples: Sequence[Example], sizes: Sequence[int]
) -> dict[int, Acceptance]:
    """Greedy chains of each size, at most U labels: the first labels of the longest chain, of which no more than these
    can be accepted."""
    measured: dict[int, Acceptance] = {size: Acceptance([], []) for size in sizes}
    for _, parts in draft_everywhere(drafter, hidden_states, examples, lambda part: part.accepted(part.chain())):
        accepted = torch.cat(parts)
        for size in sizes:
            measured[size].tokens.append(len(accepted))
            measured[size].steps.append(walk(accepted.clamp_max(size).tolist()))
    return measured


@torch.no_grad()
def measure_trees(
    drafter: CTCDrafter, hidden_states: HiddenStates, examples: Sequence[Example], sizes: Sequence[int]
) -> dict[int, Acceptance]:
    """Trees of each size, at most U deep. Every size has its own search: a larger tree has more candidates, so its
    first rows are better than the tree that is served.
    """
    measured: dict[int, Acceptance] = {size: Acceptance([], []) for size in sizes}

    def depths(part: Drafting) -> list[Tensor]:
        return [part.accepted_in(part.tree(size)) for size in sizes]

    for _, parts in draft_everywhere(drafter, hidden_states, examples, depths):
        for size, of_size in zip(sizes, zip(*parts)):
            accepted = torch.cat(of_size).tolist()
            measured[size].tokens.append(len(accepted))
            measured[size].steps.append(walk(accepted))
    return measured


@torch.no_grad()
def measure_sampled_chain(
    drafter: CTCDrafter,
    hidden_states: HiddenStates,
    examples: Sequence[Example],
    target_log_probs: Callable[[Example], Tensor],
) -> Acceptance:
    """Chains sampled from q at temperature 1, for responses sampled at temperature 1: exact expected steps.

    target_log_probs: log p of each response token under the target, `[response]`.
    """
    tokens, steps = [], []
    for example, parts in draft_everywhere(drafter, hidden_states, examples, lambda part: (part.log_q(), part.valid)):
        log_q, valid = (torch.cat(each) for each in zip(*parts))
        log_p = target_log_probs(example).to(log_q)
        # Label k of anchor i, response token i, is response token i + k.
        place = torch.arange(len(log_q))[:, None] + torch.arange(1, log_q.shape[1] + 1)
        log_p = log_p[place.clamp_max(len(log_p) - 1)]
        probability = torch.where(valid, (log_q - log_p).clamp_max(0).exp(), 0.0)
        tokens.append(len(log_q))
        steps.append(expected_walk(probability.cpu()))
    return Acceptance(tokens, steps)
