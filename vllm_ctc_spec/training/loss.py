"""Training losses: the exact prefix conditionals of any lattice (default), and the paper's full-sequence CTC.

Rows are anchors, `N` of them. A loss takes frames (without their logits), the vocabulary's scores at the labels
(`LabelScores`), labels `[N, U]` (the target's tokens after the anchor) and valid `[N, U]` (a prefix of each row: false
past the end of the response). Each returns the loss of every row and the labels that counted: the valid and feasible
ones. T frames may not hold every row, because a repeat takes two frames. The cross-entropy twin is the prefix loss of
the lattice "slots", in which frame k is label k.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vllm_ctc_spec.drafter.lattice import NEG, Lattice
from vllm_ctc_spec.drafter.recursions import MIN_LOG_GAP, LabelForward, label_forward, transition_forward
from vllm_ctc_spec.training.vocabulary import LabelScores

DECAY = 4.0


class RowLoss(NamedTuple):
    loss: Tensor  # [N], 0 where nothing counted
    counted: Tensor  # [N, U] bool


Loss = Callable[[Lattice, LabelScores, Tensor, Tensor, float], RowLoss]


def position_weights(counted: Tensor, decay: float = DECAY) -> Tensor:
    """omega_k ~ exp(-(k-1)/decay) over the counted labels: drafts reach the first most often. Rows sum to 1 or 0."""
    factors = torch.exp(-torch.arange(counted.shape[1], device=counted.device) / decay)
    weights = counted * factors
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-9)


def feasible(log_mass: Tensor, valid: Tensor) -> Tensor:
    """The labels before the first that has no alignment."""
    return valid & (log_mass > NEG / 2).cumprod(1).bool()


def forward_of(lattice: Lattice, scores: LabelScores, labels: Tensor) -> tuple[LabelForward, Tensor | None]:
    """The recursion along the labels, and log P(frame t holds a label) [N, T], None where every frame does."""
    if lattice.blank_odds is None:
        return transition_forward(scores.log_label, lattice.log_transitions), None
    holds_label = logsigmoid(-lattice.blank_odds)
    log_label = scores.log_label + holds_label[..., None]
    return label_forward(log_label, logsigmoid(lattice.blank_odds), labels), holds_label


def prefix_loss(lattice: Lattice, scores: LabelScores, labels: Tensor, valid: Tensor, decay: float = DECAY) -> RowLoss:
    """`- sum_k omega_k log q(y_k | y_<k)`, the exact conditionals of a drafter that may stop.

    Without the label-conditional head log q is log P_k - log P_{k-1}. With it, the mass that goes on after y_<k
    keeps its size 1 - stop_k and is shared out by Q_k(v) exp(bias(v | y_{k-1})), renormalised over v.
    """
    forward, holds_label = forward_of(lattice, scores, labels)
    counted = feasible(forward.log_prefix, valid)
    log_prefix = torch.where(counted, forward.log_prefix, 0.0)
    log_before = torch.cat([torch.zeros_like(log_prefix[:, :1]), log_prefix[:, :-1]], 1)
    if scores.log_mass is None:
        log_q = log_prefix - log_before
    else:
        log_goes_on = log_continuation(lattice, forward, log_before, counted)
        log_q = log_goes_on + log_prefix + scores.label_bias - biased_log_mass(forward, holds_label, scores, counted)
    log_q = torch.where(counted, log_q, 0.0)
    return RowLoss(-(position_weights(counted, decay) * log_q).sum(1), counted)


def log_continuation(lattice: Lattice, forward: LabelForward, log_before: Tensor, counted: Tensor) -> Tensor:
    """log(1 - stop_k) `[N, U]`, the probability that another label follows y_<k."""
    if lattice.blank_odds is None:
        return torch.where(counted, torch.logsumexp(forward.log_fresh, -1) - log_before, 0.0)
    nothing = logsigmoid(lattice.blank_odds).sum(1, keepdim=True)
    log_exact = torch.cat([nothing, forward.log_exact[:, :-1]], 1)
    gap = torch.where(counted, log_exact - log_before, NEG).clamp_max(MIN_LOG_GAP)
    return torch.log(-torch.expm1(gap))


def biased_log_mass(forward: LabelForward, holds_label: Tensor | None, scores: LabelScores, counted: Tensor) -> Tensor:
    """log sum_v P(y_<k, v) exp(bias_k(v)), `[N, U]`.

    The scores have the sum over the vocabulary, sum_t w_k[t] (sum_v p_t(v) exp(bias_k(v))), without the repeat
    v == y_{k-1}. The repeat is added here with its own weights: subtracting the part that may not count would cancel.
    Without a blank there is no repeat rule, and nothing was left out.
    """
    terms = forward.log_fresh + scores.log_mass
    if holds_label is not None:
        terms = terms + holds_label[:, None]
        repeat = forward.log_repeat + scores.log_last.mT + scores.last_bias[..., None] + holds_label[:, None]
        repeat = torch.cat([torch.full_like(repeat[:, :1], NEG), repeat[:, 1:]], 1)
        terms = torch.cat([terms, repeat], -1)
    # Labels that do not count may be log 0 throughout.
    return torch.logsumexp(torch.where(counted[..., None], terms, 0.0).clamp_min(NEG), -1)


def ctc_loss(lattice: Lattice, scores: LabelScores, labels: Tensor, valid: Tensor, decay: float = DECAY) -> RowLoss:
    """The paper's loss, `- log P(collapse == y_1..y_L)` per label: every frame must be explained."""
    forward, _ = forward_of(lattice, scores, labels)
    counted = feasible(forward.log_prefix, valid)
    length = counted.sum(1)
    log_exact = forward.log_exact.gather(1, (length - 1).clamp_min(0)[:, None]).squeeze(1)
    log_exact = torch.where(length > 0, log_exact, log_exact.new_zeros(()))
    return RowLoss(-log_exact / length.clamp_min(1), counted)


LOSSES: dict[str, Loss] = {"prefix": prefix_loss, "ctc": ctc_loss, "ce": prefix_loss}
