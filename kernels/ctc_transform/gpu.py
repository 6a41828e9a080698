"""Serves a GPU, in Triton: the beam of raw paths with their prefixes, and the ranking of the prefixes.

Raw path `i` of frame `t` has the number `t * N + i`; a prefix has the number of the raw path that emitted it first,
plus one, and 0 is the root. The costs are `-log P`.
"""

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.ctc_transform.reference import best_tokens
from vllm_ctc_spec.kernels.tree_mask import tree_mask_triton

_UNUSED = tl.constexpr((1 << 63) - 1)
_LOW = tl.constexpr((1 << 16) - 1)


def ctc_transform_triton(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    logits, log_scale, log_blank, anchor = frames[:4]
    num_nodes, width, depth = budget
    batch, num_frames, num_tokens = logits.shape
    best, tokens = best_tokens(logits, num_nodes, width)
    num_best = best.shape[2]
    chain_only = None if chain_only is None else chain_only.contiguous()

    def scratch(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(batch, columns, dtype=dtype, device=logits.device)

    num_raw = num_frames * num_nodes
    prefixes = [scratch(num_raw, dtype) for dtype in (torch.int64, torch.int32, torch.int32, torch.float32)]
    tree = [scratch(1 + num_nodes, dtype) for dtype in (torch.int64, torch.int32, torch.float32)]
    block_n, block_k = triton.next_power_of_2(num_nodes), triton.next_power_of_2(num_best + 1)
    block_t, block_all = triton.next_power_of_2(num_frames), triton.next_power_of_2(num_raw)
    num_slots = num_nodes + sum(min(num_nodes // (path + 1), num_best) for path in range(num_nodes))
    beam_kernel[(batch,)](
        best, tokens, log_scale.contiguous(), log_blank.contiguous(), chain_only, *prefixes, num_tokens,
        T=num_frames, N=num_nodes, K=num_best, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_S=triton.next_power_of_2(num_slots), num_warps=_num_warps(max(block_n * block_n, block_t * block_k)),
    )  # fmt: skip
    rank_kernel[(batch,)](
        *prefixes, anchor.contiguous(), *tree, num_tokens, depth,
        T=num_frames, N=num_nodes, BLOCK_N=block_n, BLOCK_ALL=block_all,
        num_warps=_num_warps(max(block_n * block_n, block_all)),
    )  # fmt: skip
    drafted, parents, scores = tree
    depths, ancestors = tree_mask_triton(parents)
    return DraftTree(drafted, parents, depths, scores, ancestors)


def _num_warps(num_elements: int) -> int:
    """16 elements of the largest block per thread, up to 4 warps: with 8, the compiler keeps to 128 registers on sm_90
    and spills some."""
    return max(1, min(4, num_elements // 512))


@triton.jit
def _cost_bits(cost):
    """The bits grow with the cost, because no cost is negative."""
    return cost.to(tl.int32, bitcast=True).to(tl.int64) << 32


@triton.jit
def _smallest(keys, COUNT: tl.constexpr):
    """The smallest keys, sorted; not negative."""
    if COUNT == 1:  # a topk of one does not compile before Triton 3.9
        return tl.min(keys, axis=0, keep_dims=True)
    else:
        return -tl.topk(-keys, COUNT)


@triton.jit
def _symbol_costs(best, log_scale, log_blank, r, K: tl.constexpr):
    """`-log p` of the K tokens, then of the blank, then inf. A frame of -inf only may have an infinite log_scale, and
    -inf + inf is NaN."""
    log_p = tl.where(best == -float("inf"), -float("inf"), best.to(tl.float32) + log_scale)
    return -tl.where(r < K, log_p, tl.where(r == K, log_blank, -float("inf")))


@triton.jit
def _extensions(slot, N: tl.constexpr, K: tl.constexpr):
    """The extensions of N paths by K tokens and the blank that can be among the N best, and their order in ties.

    Paths and tokens are sorted, so `(i + 1) (r + 1)` extensions are no worse than that of path `i` by token `r`, itself
    included. Where these are more than N, that extension is not among the N best. So N log N extensions remain of N K.
    Slots 0..N-1 hold the blank (r = K), unused slots r = K + 1.
    """
    i = tl.where(slot < N, slot, 0)
    r = tl.where(slot < N, K, K + 1)
    start = N
    for path in range(N):
        width = tl.minimum(N // (path + 1), K)
        inside = (slot >= start) & (slot < start + width)
        i = tl.where(inside, path, i)
        r = tl.where(inside, slot - start, r)
        start += width
    return i, r, i * (K + 2) + r


@triton.jit
def _merge(node, cost, emits, i):
    """Sum the raw paths of a frame that emit the same prefix: (cost of the sum, whether the lane is the first of them).
    Only the first lane's cost counts; it is the most probable one, because paths are sorted."""
    same = (node[:, None] == node[None, :]) & emits[:, None] & emits[None, :]
    mass = tl.sum(tl.where(same, tl.exp(cost[:, None] - cost[None, :]), 0.0), axis=1)
    first = tl.min(tl.where(same, i[None, :], same.shape[0]), axis=1)
    return cost - tl.log(mass), first == i


@triton.jit(do_not_specialize=["num_tokens"])
def beam_kernel(
    best_ptr,  # [B, T, K] the logits of the best tokens
    tokens_ptr,  # [B, T, K] int64, the best tokens
    log_scale_ptr,  # [B, T] fp32
    log_blank_ptr,  # [B, T] fp32
    chain_only_ptr,  # [B] bool, or None
    keys_ptr,  # [B, T * N] int64, written: (prefix before) * V + token where a raw path emits, else -1
    above_ptr,  # [B, T * N] int32, written: the prefix before where a raw path is the first to emit one, else -1
    depth_ptr,  # [B, T * N] int32, written where above is
    cost_ptr,  # [B, T * N] fp32, written where above is: the cost of the prefix
    num_tokens,
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid (B,). Lane `i` carries raw path `i` of the frame: its cost, its prefix, the prefix's depth, its last symbol.

    The warps read each other's prefixes in memory only behind the next barrier.
    """
    row = tl.program_id(0)
    best_ptr += row * T * K
    tokens_ptr += row * T * K
    log_scale_ptr += row * T
    log_blank_ptr += row * T
    keys_ptr += row * T * N
    above_ptr += row * T * N
    depth_ptr += row * T * N
    cost_ptr += row * T * N
    i = tl.arange(0, BLOCK_N)
    path, r, order = _extensions(tl.arange(0, BLOCK_S), N, K)

    # A NaN anywhere stops all paths before the first frame.
    t = tl.arange(0, BLOCK_T)[:, None]
    s = tl.arange(0, BLOCK_K)[None, :]
    all_best = tl.load(best_ptr + t * K + s, mask=(t < T) & (s < K), other=-float("inf"))
    all_log_scale = tl.load(log_scale_ptr + t, mask=t < T, other=0.0)
    all_log_blank = tl.load(log_blank_ptr + t, mask=t < T, other=0.0)
    all_costs = _symbol_costs(all_best, all_log_scale, all_log_blank, s, K)
    is_nan = tl.max(tl.max((all_costs != all_costs).to(tl.int32), axis=1), axis=0) > 0

    num_paths = N
    if chain_only_ptr is not None:
        num_paths = tl.where(tl.load(chain_only_ptr + row), 1, N)
    cost = tl.where((i == 0) & (is_nan == 0), 0.0, float("inf"))
    node = tl.zeros((BLOCK_N,), tl.int32)
    depth = tl.zeros((BLOCK_N,), tl.int32)
    last = tl.zeros((BLOCK_N,), tl.int64) + num_tokens
    for frame in range(T):
        best = tl.load(best_ptr + frame * K + r, mask=r < K, other=-float("inf"))
        symbol_cost = _symbol_costs(best, tl.load(log_scale_ptr + frame), tl.load(log_blank_ptr + frame), r, K)
        symbol_cost = tl.where(is_nan, float("inf"), tl.maximum(symbol_cost, 0.0))
        kept = _smallest(_cost_bits(tl.gather(cost, path, 0) + symbol_cost) | order, BLOCK_N)
        cost = tl.where(i < num_paths, (kept >> 32).to(tl.int32).to(tl.float32, bitcast=True), float("inf"))
        choice = (kept & _LOW).to(tl.int32)
        parent, rank = choice // (K + 2), choice % (K + 2)

        token = tl.load(tokens_ptr + frame * K + rank, mask=rank < K, other=0)
        token = tl.where(rank < K, token, num_tokens)
        emits = (rank < K) & (token != tl.gather(last, parent, 0)) & (cost < float("inf"))
        last = token
        above = tl.gather(node, parent, 0)
        depth = tl.gather(depth, parent, 0) + emits.to(tl.int32)
        key = tl.where(emits, above.to(tl.int64) * num_tokens + token, -1)
        own = frame * N + i
        tl.store(keys_ptr + own, key, mask=i < N)
        tl.debug_barrier()
        first = tl.full((BLOCK_N,), T * N, tl.int32)
        for earlier in range(frame + 1):
            other = tl.load(keys_ptr + earlier * N + i, mask=i < N, other=-2)
            match = key[:, None] == other[None, :]
            first = tl.minimum(first, tl.min(tl.where(match, earlier * N + i[None, :], T * N), axis=1))
        node = tl.where(emits, first + 1, above)

        frame_cost, is_leader = _merge(node, cost, emits, i)
        is_new = is_leader & (first == own)
        old_cost = tl.load(cost_ptr + first, mask=is_leader & (first < frame * N), other=float("inf"))
        tl.debug_barrier()  # several warps hold the same lane: all must have read before one writes
        low, high = tl.minimum(old_cost, frame_cost), tl.maximum(old_cost, frame_cost)
        tl.store(cost_ptr + first, low - tl.log(1.0 + tl.exp(low - high)), mask=is_leader)
        tl.store(above_ptr + own, tl.where(is_new, above, -1), mask=i < N)
        tl.store(depth_ptr + own, depth, mask=is_new)


@triton.jit(do_not_specialize=["num_tokens", "max_depth"])
def rank_kernel(
    keys_ptr,  # [B, T * N] int64
    above_ptr,  # [B, T * N] int32
    depth_ptr,  # [B, T * N] int32
    cost_ptr,  # [B, T * N] fp32, written: no cost below that of the prefix above
    anchor_ptr,  # [B] int64
    tokens_ptr,  # [B, 1 + N] int64, written
    parents_ptr,  # [B, 1 + N] int32, written
    scores_ptr,  # [B, 1 + N] fp32, written
    num_tokens,
    max_depth,
    T: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """The N best prefixes as rows of the tree. Grid (B,)."""
    row = tl.program_id(0)
    keys_ptr += row * T * N
    above_ptr += row * T * N
    depth_ptr += row * T * N
    cost_ptr += row * T * N
    i = tl.arange(0, BLOCK_N)

    # The prefix above was emitted in an earlier frame.
    for frame in range(T):
        above = tl.load(above_ptr + frame * N + i, mask=i < N, other=-1)
        cost = tl.load(cost_ptr + frame * N + i, mask=above >= 0, other=0.0)
        above_cost = tl.load(cost_ptr + above - 1, mask=above > 0, other=0.0)
        tl.store(cost_ptr + frame * N + i, tl.maximum(cost, above_cost), mask=above >= 0)
        tl.debug_barrier()

    number = tl.arange(0, BLOCK_ALL)
    is_node = tl.load(above_ptr + number, mask=number < T * N, other=-1) >= 0
    depth = tl.load(depth_ptr + number, mask=is_node, other=0)
    is_node = is_node & (depth <= max_depth)
    cost = tl.load(cost_ptr + number, mask=is_node, other=0.0)
    kept = _smallest(tl.where(is_node, _cost_bits(cost) | (depth << 16) | number, _UNUSED), BLOCK_N)
    used = (kept != _UNUSED) & (i < N)
    place = (kept & _LOW).to(tl.int32)
    above = tl.load(above_ptr + place, mask=used, other=0)
    key = tl.load(keys_ptr + place, mask=used, other=0)
    is_above = (place[None, :] + 1 == above[:, None]) & used[None, :]
    parent = tl.sum(tl.where(is_above, i[None, :] + 1, 0), axis=1)  # 0, the anchor, for the root

    anchor = tl.load(anchor_ptr + row)
    out = row * (N + 1) + 1 + i
    tl.store(tokens_ptr + out, tl.where(used, key - above.to(tl.int64) * num_tokens, anchor), mask=i < N)
    tl.store(parents_ptr + out, tl.where(used, parent, -1), mask=i < N)
    score = -(kept >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(scores_ptr + out, tl.where(used, score, -float("inf")), mask=i < N)
    tl.store(tokens_ptr + row * (N + 1), anchor)
    tl.store(parents_ptr + row * (N + 1), -1)
    tl.store(scores_ptr + row * (N + 1), 0.0)
