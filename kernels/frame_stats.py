"""Normaliser and best token of every frame in one pass. Triton serves a GPU, the torch reference a CPU."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_BLOCK_V = 4096
_NUM_WARPS = 8


class FrameStats(NamedTuple):
    logsumexp: torch.Tensor  # [B, T] fp32
    best: torch.Tensor  # [B, T] int64, the lowest index among ties
    best_logit: torch.Tensor  # [B, T] fp32


def frame_stats(logits: torch.Tensor) -> FrameStats:
    """Log-partition and argmax of each frame:

        logsumexp[b, t] = log sum_v exp(logits[b, t, v]),   best[b, t] = argmax_v logits[b, t, v]

    The blank is an odds against the whole vocabulary, `P_t(blank) = sigmoid(beta_t)`, so only the logsumexp is missing
    between vocabulary logits and frame log-probabilities:
    `log p_t(v) = logits[b, t, v] - logsumexp[b, t] + log sigmoid(-beta_t)`.

    Arguments:
        logits: [B, T, V] fp16, bf16 or fp32, contiguous in V.
    Returns:
        FrameStats. A frame of -inf only has logsumexp = best_logit = -inf and best = 0.

    Why custom: torch makes two reductions (three passes: max, sum of exp, argmax) and an fp32 copy of 16-bit logits;
    one online-softmax pass reads each logit once and writes 16 bytes a frame.
    """
    return (frame_stats_triton if logits.is_cuda else frame_stats_reference)(logits)


def frame_stats_reference(logits: torch.Tensor) -> FrameStats:
    logits = logits.float()
    best_logit, best = logits.max(dim=-1)
    return FrameStats(torch.logsumexp(logits, dim=-1), best, best_logit)


def frame_stats_triton(logits: torch.Tensor) -> FrameStats:
    batch, num_frames, num_tokens = logits.shape
    if logits.stride(2) != 1:
        raise ValueError("frame_stats needs logits that are contiguous in the vocabulary")
    logsumexp = torch.empty(batch, num_frames, dtype=torch.float32, device=logits.device)
    best = torch.empty(batch, num_frames, dtype=torch.int64, device=logits.device)
    best_logit = torch.empty_like(logsumexp)
    _frame_stats_kernel[(num_frames, batch)](
        logits,
        logits.stride(0),
        logits.stride(1),
        logsumexp,
        best,
        best_logit,
        num_tokens,
        BLOCK_V=_BLOCK_V,
        num_warps=_NUM_WARPS,
    )
    return FrameStats(logsumexp, best, best_logit)


@triton.jit
def _frame_stats_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    logsumexp_ptr,  # [B, T] fp32
    best_ptr,  # [B, T] int64
    best_logit_ptr,  # [B, T] fp32
    num_tokens,
    BLOCK_V: tl.constexpr,
):
    """Online softmax over blocks of the vocabulary: `sum <- sum exp(max - max') + exp(x - max')`. Grid (T, B).

    Only the maximum is reduced over the block in every iteration, the sum and the argmax stay per lane to the end.
    """
    frame, row = tl.program_id(0), tl.program_id(1)
    logits_ptr += row.to(tl.int64) * logits_stride_b + frame.to(tl.int64) * logits_stride_t
    lane = tl.arange(0, BLOCK_V)
    maximum = tl.full((), -float("inf"), tl.float32)
    lane_sum = tl.zeros((BLOCK_V,), tl.float32)
    lane_best = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    lane_token = lane
    for start in range(0, num_tokens, BLOCK_V):
        token = start + lane
        x = tl.load(logits_ptr + token, mask=token < num_tokens, other=-float("inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(x, axis=0))
        shift = tl.where(new_maximum == -float("inf"), 0.0, new_maximum)  # -inf - -inf is NaN
        lane_sum = lane_sum * tl.exp(maximum - shift) + tl.exp(x - shift)
        maximum = new_maximum
        lane_token = tl.where(x > lane_best, token, lane_token)
        lane_best = tl.maximum(x, lane_best)
    # A frame of -inf only: every lane ties at its first token, so the minimum is token 0.
    best = tl.min(tl.where(lane_best == maximum, lane_token, num_tokens), axis=0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    out = row * tl.num_programs(0) + frame
    tl.store(logsumexp_ptr + out, shift + tl.log(tl.sum(lane_sum, axis=0)))
    tl.store(best_ptr + out, best.to(tl.int64))
    tl.store(best_logit_ptr + out, maximum)
