"""Normaliser, best token and best logits of the tiles of every frame in one pass. Triton serves a GPU, the torch
reference a CPU."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TILE = 64  # tokens
_BLOCK_V = 8192
_NUM_WARPS = 4


class FrameStats(NamedTuple):
    logsumexp: torch.Tensor  # [B, T] fp32
    best: torch.Tensor  # [B, T] int64, the lowest index among ties
    best_logit: torch.Tensor  # [B, T] fp32
    tile_best: torch.Tensor | None  # [B, T, cdiv(V, TILE)], as the logits; None on a CPU, where nothing reads it


def frame_stats(logits: torch.Tensor) -> FrameStats:
    """Log-partition and argmax of each frame, and the best logit of every TILE tokens:

        logsumexp[b, t] = log sum_v exp(logits[b, t, v]),   best[b, t] = argmax_v logits[b, t, v]
        tile_best[b, t, i] = max of logits[b, t, TILE i .. TILE (i + 1)]

    The blank is an odds against the whole vocabulary, `P_t(blank) = sigmoid(beta_t)`, so only the logsumexp is missing
    between vocabulary logits and frame log-probabilities:
    `log p_t(v) = logits[b, t, v] - logsumexp[b, t] + log sigmoid(-beta_t)`. With `tile_best`, `best_tokens` finds a
    frame's candidates without another pass over the vocabulary.

    Arguments:
        logits: [B, T, V] fp16, bf16 or fp32, contiguous in V.
    Returns:
        FrameStats. A frame of -inf only has logsumexp = best_logit = -inf and best = 0.

    Why custom: torch makes two reductions (three passes: max, sum of exp, argmax) and an fp32 copy of 16-bit logits;
    here each logit is read once. The vocabulary is split over programs, because the frames of one request are fewer
    than a GPU's multiprocessors.
    """
    return (frame_stats_triton if logits.is_cuda else frame_stats_reference)(logits)


def frame_stats_reference(logits: torch.Tensor) -> FrameStats:
    logits = logits.float()
    best_logit, best = logits.max(dim=-1)
    return FrameStats(torch.logsumexp(logits, dim=-1), best, best_logit, None)


def frame_stats_triton(logits: torch.Tensor) -> FrameStats:
    batch, num_frames, num_tokens = logits.shape
    if logits.stride(2) != 1:
        raise ValueError("frame_stats needs logits that are contiguous in the vocabulary")
    num_blocks, num_tiles = triton.cdiv(num_tokens, _BLOCK_V), triton.cdiv(num_tokens, TILE)
    logsumexp = torch.empty(batch, num_frames, dtype=torch.float32, device=logits.device)
    best = torch.empty(batch, num_frames, dtype=torch.int64, device=logits.device)
    best_logit = torch.empty_like(logsumexp)
    tile_best = torch.empty(batch, num_frames, num_tiles, dtype=logits.dtype, device=logits.device)
    blocks = torch.empty(batch, num_frames, 2, num_blocks, dtype=torch.float32, device=logits.device)
    strides = logits.stride(0), logits.stride(1)
    _frame_stats_kernel[(num_blocks, num_frames, batch)](
        logits, *strides, tile_best, blocks, num_tokens, num_tiles,
        TILE=TILE, BLOCK_V=_BLOCK_V, num_warps=_NUM_WARPS,
    )  # fmt: skip
    _merge_blocks_kernel[(num_frames, batch)](
        logits, *strides, tile_best, blocks, logsumexp, best, best_logit, num_tokens, num_tiles, num_blocks,
        TILE=TILE, BLOCK_I=triton.next_power_of_2(num_tiles), BLOCK_N=triton.next_power_of_2(num_blocks),
        num_warps=_NUM_WARPS,
    )  # fmt: skip
    return FrameStats(logsumexp, best, best_logit, tile_best)


@triton.jit
def _frame_stats_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    tile_best_ptr,  # [B, T, cdiv(V, TILE)], as the logits
    blocks_ptr,  # [B, T, 2, cdiv(V, BLOCK_V)] fp32: the maximum of each block, and its sum exp(x - maximum)
    num_tokens,
    num_tiles,
    TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One block of one frame, in registers. Grid (cdiv(V, BLOCK_V), T, B)."""
    block, frame, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    logits_ptr += row.to(tl.int64) * logits_stride_b + frame.to(tl.int64) * logits_stride_t
    tile = block * (BLOCK_V // TILE) + tl.arange(0, BLOCK_V // TILE)
    token = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(logits_ptr + token, mask=token < num_tokens, other=-float("inf")).to(tl.float32)
    tile_best = tl.max(x, axis=1)
    out = row * tl.num_programs(1) + frame
    tl.store(tile_best_ptr + out.to(tl.int64) * num_tiles + tile, tile_best, mask=tile < num_tiles)
    maximum = tl.max(tile_best, axis=0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)  # -inf - -inf is NaN
    blocks_ptr += out * 2 * tl.num_programs(0) + block
    tl.store(blocks_ptr, maximum)
    tl.store(blocks_ptr + tl.num_programs(0), tl.sum(tl.exp(x - shift)))


@triton.jit
def _merge_blocks_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    tile_best_ptr,  # [B, T, cdiv(V, TILE)]
    blocks_ptr,  # [B, T, 2, num_blocks] fp32
    logsumexp_ptr,  # [B, T] fp32
    best_ptr,  # [B, T] int64
    best_logit_ptr,  # [B, T] fp32
    num_tokens,
    num_tiles,
    num_blocks,
    TILE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of the blocks of a frame, and the first best token, which is in the first best tile. Grid (T, B)."""
    frame, row = tl.program_id(0), tl.program_id(1)
    out = row * tl.num_programs(0) + frame
    tile = tl.arange(0, BLOCK_I)
    tile_best = tl.load(
        tile_best_ptr + out.to(tl.int64) * num_tiles + tile, mask=tile < num_tiles, other=-float("inf")
    ).to(tl.float32)
    maximum = tl.max(tile_best, axis=0)
    # A frame of -inf only: all tie, so the first is token 0. The maximum of a frame of NaN only equals nothing.
    first = tl.min(tl.where(tile_best == maximum, tile, num_tiles - 1), axis=0)
    token = first * TILE + tl.arange(0, TILE)
    logits_ptr += row.to(tl.int64) * logits_stride_b + frame.to(tl.int64) * logits_stride_t
    x = tl.load(logits_ptr + token, mask=token < num_tokens, other=-float("inf")).to(tl.float32)
    best = tl.min(tl.where(x == maximum, token, num_tokens - 1), axis=0)

    block = tl.arange(0, BLOCK_N)
    blocks_ptr += out * 2 * num_blocks + block
    block_maximum = tl.load(blocks_ptr, mask=block < num_blocks, other=-float("inf"))
    block_sum = tl.load(blocks_ptr + num_blocks, mask=block < num_blocks, other=0.0)
    shift = tl.where(maximum == -float("inf"), 0.0, maximum)
    total = tl.sum(block_sum * tl.exp(block_maximum - shift), axis=0)
    tl.store(logsumexp_ptr + out, shift + tl.log(total))
    tl.store(best_ptr + out, best.to(tl.int64))
    tl.store(best_logit_ptr + out, maximum)
