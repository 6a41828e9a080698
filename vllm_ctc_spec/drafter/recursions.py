"""The losses' forward recursions: prefix probabilities of given label sequences, batched and differentiable.

The mathematics is in `oracle.py`, to which tests hold them. Everything is in log space with `NEG` as log 0.
"""

import dataclasses

import torch
from torch import Tensor

from vllm_ctc_spec.drafter.lattice import NEG

MIN_LOG_GAP = -1e-6
"""For a smaller difference x, 1 - exp(x) is rounding noise in fp32, and the gradient of its logarithm explodes."""


@dataclasses.dataclass(frozen=True)
class LabelForward:
    """The forward recursion along given labels, for a batch.

    log_prefix [N, U]: log P(y_1..y_k), k = 1..U
    log_fresh [N, U, T]: log(n + b) before label k, over frames t - 1 (a new label's emission weight); with
        transitions log phi before label k
    log_repeat [N, U, T]: log b before label k (a repeated label's); with transitions log_fresh
    log_exact [N, U]: log of the mass of whole alignments that collapse to exactly y_1..y_k; with transitions, of those
        that stop behind y_k
    """

    log_prefix: Tensor
    log_fresh: Tensor
    log_repeat: Tensor
    log_exact: Tensor


def label_forward(label_log_probs: Tensor, blank_log_probs: Tensor, labels: Tensor) -> LabelForward:
    """Prefix probabilities of whole sequences under autograd.

    label_log_probs [N, T, U]: log p_t(y_k); blank_log_probs [N, T]; labels [N, U] (for repeats).
    One step per frame over all labels at once: w[k] = logaddexp(b[k-1], n[k-1] unless y_k == y_{k-1}),
    e[t, k] = w[k] + log p_t(y_k), n'[k] = logaddexp(n[k] + log p_t(y_k), e[t, k]),
    b'[k] = logaddexp(b[k], n[k]) + log p_t(blank); log P_k = logsumexp_t e[t, k].
    """
    num_rows, num_frames, num_labels = label_log_probs.shape
    is_repeat = torch.zeros_like(labels, dtype=torch.bool)
    is_repeat[:, 1:] = labels[:, 1:] == labels[:, :-1]
    n = label_log_probs.new_full((num_rows, num_labels + 1), NEG)
    b = torch.cat([n.new_zeros(num_rows, 1), n[:, 1:]], 1)
    emissions, fresh, repeat = [], [], []
    for t in range(num_frames):
        log_p, log_blank = label_log_probs[:, t], blank_log_probs[:, t, None]
        both = torch.logaddexp(b, n)
        fresh.append(both[:, :-1])
        repeat.append(b[:, :-1])
        emit = torch.where(is_repeat, b[:, :-1], both[:, :-1]) + log_p
        n = torch.cat([n[:, :1], torch.logaddexp(n[:, 1:] + log_p, emit)], 1).clamp_min(NEG)
        b = (both + log_blank).clamp_min(NEG)
        emissions.append(emit)
    return LabelForward(
        log_prefix=torch.logsumexp(torch.stack(emissions), 0),
        log_fresh=torch.stack(fresh, -1),
        log_repeat=torch.stack(repeat, -1),
        log_exact=torch.logaddexp(b, n)[:, 1:],
    )


def transition_forward(label_log_probs: Tensor, log_transitions: Tensor) -> LabelForward:
    """The same with transitions. label_log_probs [N, T, U]: log p_t(y_k); log_transitions [N, 1 + T, T].

    alpha_k[t] = p_t(y_k) phi_k[t], P_k = sum_t alpha_k[t], phi_{k+1}[t] = sum_{s<t} alpha_k[s] A[s, t].
    """
    log_sum = torch.logsumexp(log_transitions[:, 1:], -1)  # [N, T]
    log_stop = torch.log(-torch.expm1(log_sum.clamp_max(MIN_LOG_GAP))).masked_fill(log_sum > MIN_LOG_GAP, NEG)
    phi, prefix, weights, exact = log_transitions[:, 0], [], [], []
    for log_p in label_log_probs.unbind(-1):
        weights.append(phi)
        emit = (phi + log_p).clamp_min(NEG)
        prefix.append(torch.logsumexp(emit, 1))
        exact.append(torch.logsumexp(emit + log_stop, 1).clamp_min(NEG))
        phi = torch.logsumexp(emit[..., None] + log_transitions[:, 1:], 1).clamp_min(NEG)
    log_phi = torch.stack(weights, 1)
    return LabelForward(torch.stack(prefix, 1), log_phi, log_phi, torch.stack(exact, 1))
