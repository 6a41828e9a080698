"""Normaliser and best token of every frame in one pass over the logits."""

import torch
import triton
import triton.language as tl

_BLOCK_V = 4096


def frame_stats(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-partition and argmax of each frame:

        logsumexp[b, t] = log sum_v exp(logits[b, t, v]),   best[b, t] = argmax_v logits[b, t, v]

    The blank is an odds against the whole vocabulary, `P_t(blank) = sigmoid(beta_t)`, so the logsumexp is all that is
    missing between vocabulary logits and frame log-probabilities:
    `log p_t(v) = logits[b, t, v] - logsumexp[b, t] + log sigmoid(-beta_t)`.

    Arguments:
        logits: [B, T, V] fp16, bf16 or fp32, contiguous in V.
    Returns:
        logsumexp [B, T] fp32; best [B, T] int64, the lowest index among ties; best_logit [B, T] fp32.
        A frame of -inf only has logsumexp = best_logit = -inf and best = 0.

    Why custom: torch makes two reductions (three passes: max, sum of exp, argmax) and an fp32 copy of 16-bit logits;
    one online-softmax pass reads each logit once and writes 16 bytes a frame.
    """
    return (frame_stats_triton if logits.is_cuda else frame_stats_reference)(logits)


def frame_stats_reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = logits.float()
    best_logit, best = logits.max(dim=-1)
    return torch.logsumexp(logits, dim=-1), best, best_logit
