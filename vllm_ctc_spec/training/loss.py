"""Training losses: the prefix conditionals (default), the paper's full-sequence CTC, and the cross-entropy twin.

Rows are anchors, `N` of them. A loss takes frames, labels `[N, U]` (what the target says after the anchor), valid
`[N, U]` (a prefix of each row: false past the end of the response) and bias `[N, U, V]`, the label-conditional head's
for `previous_labels`, or None. Each returns the loss of every row and the labels that counted: those that are
valid and feasible, because a repeat takes two frames and T of them may not hold the row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vllm_ctc_spec.ctc import NEG, LabelForward, label_forward
from vllm_ctc_spec.drafter import Frames

DECAY = 4.0
MIN_LOG_GAP = -1e-6
"""1 - exp(x) of a smaller difference x is rounding noise in fp32, and its logarithm's gradient explodes."""


class RowLoss(NamedTuple):
    loss: Tensor  # [N], 0 where nothing counted
    counted: Tensor  # [N, U] bool


Loss = Callable[[Frames, Tensor, Tensor, Tensor | None], RowLoss]


def position_weights(counted: Tensor) -> Tensor:
    """omega_k ~ exp(-(k-1)/4) over the counted labels: the first labels are reached most often. Rows sum to 1 or 0."""
    decay = torch.exp(-torch.arange(counted.shape[1], device=counted.device) / DECAY)
    weights = counted * decay
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-9)


def label_log_probs(frames: Frames, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Conditional log-probabilities of all tokens, log p_t(y_k) and log p_t(blank): [N, T, V], [N, T, U], [N, T]."""
    log_token = torch.log_softmax(frames.logits, -1)
    index = labels[:, None].expand(-1, frames.logits.shape[1], -1)
    log_label = log_token.gather(-1, index) + logsigmoid(-frames.blank_odds)[..., None]
    return log_token, log_label, logsigmoid(frames.blank_odds)


def feasible(log_mass: Tensor, valid: Tensor) -> Tensor:
    """The labels before the first that has no alignment."""
    return valid & (log_mass > NEG / 2).cumprod(1).bool()


def prefix_loss(frames: Frames, labels: Tensor, valid: Tensor, bias: Tensor | None) -> RowLoss:
    """`- sum_k omega_k log q(y_k | y_<k)`, the drafter's exact conditionals.

    Without the label-conditional head the terms are log P_k - log P_{k-1}. With it, the mass that goes on after
    y_<k keeps its size 1 - stop_k and is shared out by Q_k(v) exp(bias(v | y_{k-1})), renormalised over v.
    """
    log_token, log_label, log_blank = label_log_probs(frames, labels)
    forward = label_forward(log_label, log_blank, labels)
    counted = feasible(forward.log_prefix, valid)
    zero = forward.log_prefix.new_zeros(())
    log_prefix = torch.where(counted, forward.log_prefix, zero)
    log_before = torch.cat([torch.zeros_like(log_prefix[:, :1]), log_prefix[:, :-1]], 1)
    if bias is None:
        log_q = log_prefix - log_before
    else:
        log_exact = torch.cat([log_blank.sum(1, keepdim=True), forward.log_exact[:, :-1]], 1)
        gap = torch.where(counted, log_exact - log_before, NEG).clamp_max(MIN_LOG_GAP)
        log_goes_on = torch.log(-torch.expm1(gap))
        log_total = biased_log_mass(log_token, frames.blank_odds, log_label, forward, labels, bias)
        own = bias.gather(-1, labels[..., None]).squeeze(-1)
        log_q = log_goes_on + log_prefix + own - log_total
    log_q = torch.where(counted, log_q, zero)
    return RowLoss(-(position_weights(counted) * log_q).sum(1), counted)


def biased_log_mass(
    log_token: Tensor, blank_odds: Tensor, log_label: Tensor, forward: LabelForward, labels: Tensor, bias: Tensor
) -> Tensor:
    """log sum_v P(y_<k, v) exp(bias_k(v)), `[N, U]`.

    The sum over the vocabulary comes first, sum_t w_k[t] (sum_v p_t(v) exp(bias_k(v))), so that P(y_<k, v) is never
    built for every v. A repeat, v == y_{k-1}, is left out of it and added with its own weights; subtracting the part
    that may not count would cancel. The anchor is not in the frames, so that the first label has no repeat.
    """
    highest = bias.amax(-1, keepdim=True).detach()
    factor = (bias - highest).exp()  # [N, U, V]
    last = labels[:, :-1, None]
    repeat_factor = factor[:, 1:].gather(-1, last).squeeze(-1)
    factor = torch.cat([factor[:, :1], factor[:, 1:].scatter(-1, last, 0.0)], 1)
    weights = forward.log_fresh + logsigmoid(-blank_odds)[:, None]  # [N, U, T]
    repeat_weights = forward.log_repeat[:, 1:] + log_label[:, :, :-1].transpose(1, 2)  # p_t(y_{k-1}) included
    scale = weights.amax(-1, keepdim=True).detach()
    total = ((weights - scale).exp() * torch.bmm(factor, log_token.exp().transpose(1, 2))).sum(-1)
    repeat = repeat_factor * (repeat_weights - scale[:, 1:]).exp().sum(-1)
    total = torch.cat([total[:, :1], total[:, 1:] + repeat], 1)
    return total.clamp_min(torch.finfo(total.dtype).tiny).log() + (scale + highest).squeeze(-1)


def ctc_loss(frames: Frames, labels: Tensor, valid: Tensor, bias: Tensor | None) -> RowLoss:
    """The paper's loss, `- log P(collapse == y_1..y_L)` per label: every frame must be explained."""
    _, log_label, log_blank = label_log_probs(frames, labels)
    forward = label_forward(log_label, log_blank, labels)
    counted = feasible(forward.log_prefix, valid)
    length = counted.sum(1)
    log_exact = forward.log_exact.gather(1, (length - 1).clamp_min(0)[:, None]).squeeze(1)
    log_exact = torch.where(length > 0, log_exact, log_exact.new_zeros(()))
    return RowLoss(-log_exact / length.clamp_min(1), counted)


def ce_loss(frames: Frames, labels: Tensor, valid: Tensor, bias: Tensor | None) -> RowLoss:
    """The parallel twin without alignments: frame k predicts label k, the blank and later frames are unused."""
    logits = frames.logits[:, : labels.shape[1]]
    logits = logits if bias is None else logits + bias
    log_q = torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)
    return RowLoss(-(position_weights(valid) * log_q).sum(1), valid)


LOSSES: dict[str, Loss] = {"prefix": prefix_loss, "ctc": ctc_loss, "ce": ce_loss}


def previous_labels(anchors: Tensor, labels: Tensor) -> Tensor:
    """The token before each label, the anchor before the first: [N, U]."""
    return torch.cat([anchors[:, None], labels[:, :-1]], 1)
