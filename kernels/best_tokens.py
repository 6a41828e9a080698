"""The candidates of a request: the best tokens of each of its frames, in order. Triton serves a GPU; a CPU's search has
its own selection."""

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels._recursions import frame_prob
from vllm_ctc_spec.kernels.frame_stats import TILE, frame_stats_triton

_GROUP = 8  # tiles, of 8 parts of 8 tokens each
assert TILE == _GROUP * _GROUP
_GROUPS_OF_A_WARP = 256  # more of them spill registers on sm_90
_CANDIDATES_OF_A_WARP, _MAX_WARPS = 256, 8
_HEAD_TILE_OF_A_WARP = 1024  # products of candidates and columns of the head; more of them spill registers on sm_90


def best_tokens(logits: torch.Tensor, width: int, tile_best: torch.Tensor | None = None) -> torch.Tensor:
    """The `C` tokens of the largest logits of each frame, the lower token among equals.

    Arguments:
        logits: [B, T, V] fp16, bf16 or fp32, contiguous in V.
        width: C, at most V.
        tile_best: of `frame_stats`; None: it is computed here.
    Returns:
        [B, T * C] int64, ascending: duplicates are neighbours, and a lower place means a lower token.

    A group of tokens whose best logit is not among the C largest of all groups holds none of the C best tokens: C
    others are larger. So four small selections follow each other: of groups of 512 tokens, of their tiles of 64, of the
    tiles' parts of 8, and of tokens. Each is a search for the C-th largest value, bit by bit, in a warp or two.

    Why custom: the radix selection of `torch.topk` reads a large vocabulary several times, in several launches. Here
    the pass that `frame_stats` makes anyway is the only one, and two launches follow.
    """
    return (best_tokens_triton if logits.is_cuda else best_tokens_reference)(logits, width, tile_best)


def best_tokens_reference(logits: torch.Tensor, width: int, tile_best: torch.Tensor | None = None) -> torch.Tensor:
    order = logits.sort(dim=2, descending=True, stable=True).indices[..., :width]
    return order.flatten(1).sort(dim=1).values


def best_tokens_triton(logits: torch.Tensor, width: int, tile_best: torch.Tensor | None = None) -> torch.Tensor:
    if tile_best is None:
        tile_best = frame_stats_triton(logits).tile_best
    (batch, num_frames, num_tokens), num_tiles = logits.shape, tile_best.shape[2]
    of_frames = torch.empty(2, batch, num_frames, width, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(batch, num_frames * width, dtype=torch.int64, device=logits.device)
    block_c = triton.next_power_of_2(width)
    block_g = max(block_c, triton.next_power_of_2(triton.cdiv(num_tiles, _GROUP)))
    _best_tokens_kernel[(num_frames, batch)](
        logits, logits.stride(0), logits.stride(1), tile_best, *of_frames, num_tokens, num_tiles,
        C=width, GROUP=_GROUP, BLOCK_G=block_g, BLOCK_C=block_c, BITS=8 * logits.element_size(),
        num_warps=max(1, min(_MAX_WARPS, max(block_g, block_c * _GROUP) // _GROUPS_OF_A_WARP)),
    )  # fmt: skip
    block_m = triton.next_power_of_2(num_frames * width)
    _sort_tokens_kernel[(batch,)](
        of_frames[1], tokens, M=num_frames * width, BLOCK_M=block_m,
        num_warps=warps_for(block_m),
    )  # fmt: skip
    return tokens


@triton.jit
def _best(x):
    """The maximum of each row, in its dtype: Triton's is in fp32."""
    return tl.max(x, axis=1).to(x.dtype)


@triton.jit
def _key(x, BITS: tl.constexpr):
    """An integer of that many bits that grows with x. A NaN is above all numbers, as for `torch.topk`; -0 is 0."""
    bits = x.to(tl.int32 if BITS == 32 else tl.int16, bitcast=True).to(tl.int32)
    key = bits ^ ((bits >> 31) & ((1 << (BITS - 1)) - 1))
    return tl.where(x == x, tl.where(key == -1, 0, key), (1 << (BITS - 1)) - 1)


@triton.jit
def _store_best(key, value, out_ptr, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Store the values of the COUNT largest keys, in their order; of equal keys the first ones."""
    # Counts are fp32, exact here: adding them leaves the units that compare free.
    threshold = tl.where(tl.sum((key >= 0).to(tl.float32), axis=0) >= COUNT, 0, -(1 << (BITS - 1)))
    step = 1 << (BITS - 2)
    for _ in range(BITS - 1):
        larger = threshold + step
        threshold = tl.where(tl.sum((key >= larger).to(tl.float32), axis=0) >= COUNT, larger, threshold)
        step = step >> 1
    above, equal = (key > threshold).to(tl.int32), (key == threshold).to(tl.int32)
    room = COUNT - tl.sum(above, axis=0)
    both = above | (equal << 16)
    before = tl.cumsum(both, axis=0) - both
    above_before, equal_before = before & 0xFFFF, (before >> 16) & 0xFFFF
    is_best = (above != 0) | ((equal != 0) & (equal_before < room))
    tl.store(out_ptr + above_before + tl.minimum(equal_before, room), value, mask=is_best)


@triton.jit
def _members(groups_ptr, C: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """The members of C groups, in their order, and whether there is such a group."""
    place = tl.arange(0, BLOCK_C * GROUP)
    is_group = place // GROUP < C
    return tl.load(groups_ptr + place // GROUP, mask=is_group, other=0) * GROUP + place % GROUP, is_group


@triton.jit
def _best_tokens_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    tile_best_ptr,  # [B, T, cdiv(V, GROUP * GROUP)], as the logits
    scratch_ptr,  # [B, T, C] int32
    tokens_ptr,  # [B, T, C] int32, written, ascending
    num_tokens,
    num_tiles,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BITS: tl.constexpr,
):
    """The C best groups of GROUP tiles of a frame, their C best tiles, parts and tokens. Grid (T, B).

    What lies behind the last tile or token is -inf, and so no better than any token before it.
    """
    frame, row = tl.program_id(0), tl.program_id(1)
    out = (row * tl.num_programs(0) + frame).to(tl.int64)
    tile_best_ptr += out * num_tiles
    logits_ptr += row.to(tl.int64) * logits_stride_b + frame.to(tl.int64) * logits_stride_t
    scratch_ptr += out * C
    tokens_ptr += out * C  # holds tiles before it holds tokens
    member = tl.arange(0, GROUP)[None, :]

    group = tl.arange(0, BLOCK_G)
    tile = group[:, None] * GROUP + member
    x = _best(tl.load(tile_best_ptr + tile, mask=tile < num_tiles, other=-float("inf")))
    _store_best(_key(x, BITS), group, scratch_ptr, C, BITS)
    tl.debug_barrier()  # the groups are written
    tile, is_group = _members(scratch_ptr, C, GROUP, BLOCK_C)
    x = tl.load(tile_best_ptr + tile, mask=is_group & (tile < num_tiles), other=-float("inf"))
    _store_best(_key(x, BITS), tile, tokens_ptr, C, BITS)
    tl.debug_barrier()  # the tiles are written, and the groups read
    part, is_group = _members(tokens_ptr, C, GROUP, BLOCK_C)
    token = part[:, None] * GROUP + member
    x = tl.load(logits_ptr + token, mask=is_group[:, None] & (token < num_tokens), other=-float("inf"))
    _store_best(_key(_best(x), BITS), part, scratch_ptr, C, BITS)
    tl.debug_barrier()  # the parts are written, and the tiles read
    token, is_group = _members(scratch_ptr, C, GROUP, BLOCK_C)
    x = tl.load(logits_ptr + token, mask=is_group & (token < num_tokens), other=-float("inf"))
    _store_best(_key(x, BITS), token, tokens_ptr, C, BITS)


@triton.jit
def _sort_tokens_kernel(
    of_frames_ptr,  # [B, M] int32
    tokens_ptr,  # [B, M] int64, written, ascending
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid (B,)."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    tokens = tl.load(of_frames_ptr + row * M + m, mask=m < M, other=0x7FFFFFFF)
    tl.store(tokens_ptr + row * M + m, tl.sort(tokens).to(tl.int64), mask=m < M)


def candidate_probs(tokens: torch.Tensor, logits: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """`p_t` of every candidate, on a GPU: `[B, T, BLOCK_M]` fp32, 0 for a duplicate and behind the last one, which are
    no labels. tokens: [B, M] int64, ascending; log_scale: contiguous."""
    (batch, num_frames, _), num_candidates = logits.shape, tokens.shape[1]
    block_m = triton.next_power_of_2(num_candidates)
    p = log_scale.new_empty(batch, num_frames, block_m)
    candidates_kernel[(batch, num_frames)](
        logits, logits.stride(0), logits.stride(1), log_scale, tokens, p, num_candidates,
        T=num_frames, BLOCK_M=block_m, num_warps=warps_for(block_m),
    )  # fmt: skip
    return p


def warps_for(block_m: int) -> int:
    """Warps of a program that holds so many candidates."""
    return max(1, min(_MAX_WARPS, block_m // _CANDIDATES_OF_A_WARP))


def head_block(rank: int, block_m: int) -> int:
    """Columns of the head that such a program multiplies at once."""
    return max(1, min(triton.next_power_of_2(rank), _HEAD_TILE_OF_A_WARP * warps_for(block_m) // block_m))


@triton.jit
def candidates_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    log_scale_ptr,  # [B, T] fp32
    tokens_ptr,  # [B, M] int64, ascending
    p_ptr,  # [B, T, BLOCK_M] fp32, written
    num_candidates,
    T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid (B, T)."""
    row, frame = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    valid = m < num_candidates
    tokens_ptr += row * num_candidates
    token = tl.load(tokens_ptr + m, mask=valid, other=0)
    before = tl.load(tokens_ptr + m - 1, mask=valid & (m > 0), other=-1)
    is_first = valid & (token != before)
    logits_ptr += row * logits_stride_b + frame.to(tl.int64) * logits_stride_t
    x = tl.load(logits_ptr + token, mask=is_first, other=-float("inf"))
    p = frame_prob(x, tl.load(log_scale_ptr + row * T + frame))
    tl.store(p_ptr + (row * T + frame) * BLOCK_M + m, p)
