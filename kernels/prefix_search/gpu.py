"""Serves a GPU, in Triton: the probabilities of the candidates, then the whole search of each request."""

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels._recursions import (
    candidate_bias,
    candidate_masses,
    complement,
    extend,
    first_largest,
    root_state,
    store_state,
)
from vllm_ctc_spec.kernels.best_tokens import best_tokens_triton, candidate_probs, head_block, warps_for
from vllm_ctc_spec.kernels.contract import DTYPES, IMPOSSIBLE, Budget, DraftTree, Frames

_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)
# The head's products of all pairs of candidates are made at once where they fit: one multiprocessor a request takes
# longer to read the head again at every node.
_BIAS_BYTES, _BIAS_TILE = 1 << 26, 64


def prefix_search_triton(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    logits, markov = frames.logits, frames.markov
    if logits.stride(2) != 1:
        raise ValueError("prefix_search needs logits that are contiguous in the vocabulary")
    if markov is not None and not (markov[0].is_contiguous() and markov[1].is_contiguous()):
        raise ValueError("prefix_search needs contiguous Markov weights [V, r]")
    budget = budget._replace(width=min(budget.width, logits.shape[2]))
    return search_candidates(best_tokens_triton(logits, budget.width, frames.tile_best), frames, budget, chain_only)


def search_candidates(
    tokens: torch.Tensor,  # [B, T * budget.width] int64, from `best_tokens`
    frames: Frames,
    budget: Budget,
    chain_only: torch.Tensor | None = None,
) -> DraftTree:
    logits, log_scale, log_blank, anchor, markov, transitions, _ = frames
    (batch, num_frames, num_tokens), num_candidates = logits.shape, tokens.shape[1]
    log_scale, log_blank = log_scale.contiguous(), log_blank.contiguous()
    rows = 1 + budget.nodes
    tree = DraftTree(**{name: logits.new_empty(batch, rows, dtype=dtype) for name, dtype in DTYPES.items()})
    block_m = triton.next_power_of_2(num_candidates)
    num_warps = warps_for(block_m)
    rank = 0 if markov is None else markov[0].shape[1]
    w_in, w_out = (None, None) if markov is None else markov
    bias, anchor = None, anchor.contiguous()
    if markov is not None and 4 * batch * (1 + num_candidates) * num_candidates <= _BIAS_BYTES:
        bias = log_scale.new_empty(batch, 1 + num_candidates, num_candidates)
        tiles = triton.cdiv(1 + num_candidates, _BIAS_TILE), triton.cdiv(num_candidates, _BIAS_TILE)
        bias_kernel[(*tiles, batch)](
            tokens, anchor, w_in, w_out, bias, num_candidates, RANK=rank,
            BLOCK_R=max(16, min(32, triton.next_power_of_2(rank))), BLOCK=_BIAS_TILE,
            PRECISION="tf32" if w_in.element_size() == 2 else "ieee", num_warps=8,
        )  # fmt: skip
    p = candidate_probs(tokens, logits, log_scale)
    search_kernel[(batch,)](
        tokens, p, log_scale, log_blank, None if transitions is None else transitions.contiguous(), anchor,
        None if chain_only is None else chain_only.contiguous().view(torch.int8),
        bias, w_in, w_out, p.new_empty(batch, rows, 2, num_frames), p.new_empty(batch, budget.nodes, block_m),
        tree.tokens, tree.parents, tree.depths, tree.scores, tree.ancestors,
        num_candidates, min(budget.depth, num_frames), N=budget.nodes, T=num_frames,
        BLOCK_N=triton.next_power_of_2(budget.nodes), BLOCK_T=triton.next_power_of_2(num_frames), BLOCK_M=block_m,
        RANK=rank, BLOCK_R=head_block(rank, block_m), COMPLETE=budget.width == num_tokens, num_warps=num_warps,
    )  # fmt: skip
    return tree


@triton.jit
def bias_kernel(
    tokens_ptr,  # [B, M] int64
    anchor_ptr,  # [B] int64
    w_in_ptr,  # [V, RANK]
    w_out_ptr,  # [V, RANK]
    bias_ptr,  # [B, 1 + M, M] fp32, written: of every candidate behind the anchor, and behind every candidate
    num_candidates,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`W_out[v] . W_in[last]` of a tile of pairs. Grid (cdiv(1 + M, BLOCK), cdiv(M, BLOCK), B).

    tf32 holds 16-bit weights exactly.
    """
    row = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tokens_ptr += row * num_candidates
    last = tl.load(tokens_ptr + i - 1, mask=(i > 0) & (i <= num_candidates), other=0)
    last = tl.where(i == 0, tl.load(anchor_ptr + row), last)
    token = tl.load(tokens_ptr + m, mask=m < num_candidates, other=0)
    bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.static_range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inner = tl.load(w_in_ptr + last[:, None] * RANK + r[None, :], mask=r[None, :] < RANK, other=0.0)
        outer = tl.load(w_out_ptr + token[None, :] * RANK + r[:, None], mask=r[:, None] < RANK, other=0.0)
        bias = tl.dot(inner.to(tl.float32), outer.to(tl.float32), bias, input_precision=PRECISION)
    bias_ptr += (row * (1 + num_candidates) + i[:, None]) * num_candidates + m[None, :]
    tl.store(bias_ptr, bias, mask=(i[:, None] <= num_candidates) & (m[None, :] < num_candidates))


@triton.jit
def _child_scores(
    tokens_ptr,  # [M] int64
    p_ptr,  # [T, BLOCK_M] fp32
    state_ptr,  # [2, T] fp32
    bias_ptr,  # [1 + M, M] fp32, or None
    w_in_ptr,  # [V, RANK]
    w_out_ptr,  # [V, RANK]
    last,
    place,
    score,
    repeat,
    total,
    num_candidates,
    T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPLETE: tl.constexpr,
):
    """The score of every child of a node, -inf where there is none. place: where its last label stands; score: its own;
    repeat: `S(last)`; total: `M`."""
    mass = candidate_masses(p_ptr, state_ptr, place, repeat, T, BLOCK_M)
    log_q = tl.where(mass > _IMPOSSIBLE, tl.log(mass), -float("inf"))
    if RANK > 0:
        if bias_ptr is not None:
            m = tl.arange(0, BLOCK_M)
            bias_ptr += (1 + place) * num_candidates
            log_q += tl.load(bias_ptr + m, mask=m < num_candidates, other=0.0)
        else:
            log_q += candidate_bias(tokens_ptr, last, w_in_ptr, w_out_ptr, num_candidates, BLOCK_M, RANK, BLOCK_R)
        largest = tl.max(log_q, axis=0)
        if COMPLETE:
            z = tl.sum(tl.exp(log_q - largest), axis=0)
        else:
            log_rest = tl.log(tl.maximum(total - tl.sum(mass, axis=0), 0.0, propagate_nan=tl.PropagateNan.ALL))
            largest = tl.maximum(largest, log_rest)
            z = tl.sum(tl.exp(log_q - largest), axis=0) + tl.exp(log_rest - largest)
        log_q -= largest + tl.log(z)
    # A NaN is not above -inf. The minimum would turn it into 0, so it must not reach it.
    return tl.where(log_q > -float("inf"), score + tl.minimum(log_q, 0.0), -float("inf"))


@triton.jit(do_not_specialize=["depth"])
def search_kernel(
    tokens_ptr,  # [B, M] int64, ascending
    p_ptr,  # [B, T, BLOCK_M] fp32
    log_scale_ptr,  # [B, T] fp32
    log_blank_ptr,  # [B, T] fp32
    transitions_ptr,  # [B, 1 + T, T] fp32, or None
    anchor_ptr,  # [B] int64
    chain_only_ptr,  # [B] int8
    bias_ptr,  # [B, 1 + M, M] fp32, from bias_kernel, or None
    w_in_ptr,  # [V, RANK]
    w_out_ptr,  # [V, RANK]
    state_ptr,  # [B, 1 + N, 2, T] fp32, scratch: w = n + b, and b of each node
    child_ptr,  # [B, N, BLOCK_M] fp32, scratch: the scores of the children of each node
    tree_tokens_ptr,  # [B, 1 + N] int64, the DraftTree
    tree_parents_ptr,  # [B, 1 + N] int32
    tree_depths_ptr,  # [B, 1 + N] int32
    tree_scores_ptr,  # [B, 1 + N] fp32
    tree_ancestors_ptr,  # [B, 1 + N] int64
    num_candidates,
    depth,
    N: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COMPLETE: tl.constexpr,
):
    """Best-first search. Grid (B,).

    A queue holds, for every row that has been expanded, its best child that is not yet in the tree. N times: expand the
    newest row, take the best of the queue as the next row, and put that row's next sibling into its place. No child
    outranks its parent, so rows come out in their final order, and no node outside of the tree is ever expanded.
    """
    batch_row = tl.program_id(0).to(tl.int64)
    tokens_ptr += batch_row * num_candidates
    p_ptr += batch_row * T * BLOCK_M
    state_ptr += batch_row * (1 + N) * 2 * T
    child_ptr += batch_row * N * BLOCK_M
    if bias_ptr is not None:
        bias_ptr += batch_row * (1 + num_candidates) * num_candidates
    anchor = tl.load(anchor_ptr + batch_row)
    if chain_only_ptr is not None:
        is_chain = tl.load(chain_only_ptr + batch_row) != 0

    t, m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    log_scale = tl.load(log_scale_ptr + batch_row * T + t, mask=t < T, other=0.0)
    log_blank = tl.load(log_blank_ptr + batch_row * T + t, mask=t < T, other=0.0)
    label_mass = tl.where(log_scale < float("inf"), complement(log_blank), 0.0)
    if transitions_ptr is not None:
        transitions_ptr += batch_row * (1 + T) * T
    blank, b = root_state(log_blank_ptr + batch_row * T, transitions_ptr, T, BLOCK_T)
    store_state(state_ptr, b, b, T, BLOCK_T)
    total = tl.sum(label_mass * b, axis=0)
    repeat, score, place, token, level = 0.0, 0.0, -1, anchor, 0

    # Every row is written when it is found, and read again by its children.
    out = batch_row * (1 + N)
    tree_tokens_ptr += out
    tree_parents_ptr += out
    tree_depths_ptr += out
    tree_scores_ptr += out
    tree_ancestors_ptr += out
    lane = tl.arange(0, BLOCK_N)
    _fill_column(tree_tokens_ptr, anchor, anchor, lane, N)
    _fill_column(tree_parents_ptr, -1, -1, lane, N)
    _fill_column(tree_depths_ptr, 0, 0, lane, N)
    _fill_column(tree_scores_ptr, 0.0, -float("inf"), lane, N)
    _fill_column(tree_ancestors_ptr, 0, 0, lane, N)

    # Lane i of the queue is row i.
    queue_score = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    queue_order = tl.zeros((BLOCK_N,), tl.int32)
    row, alive = 0, True
    while (row < N) & alive:
        tl.debug_barrier()  # the state of this row is written
        if level < depth:
            child = _child_scores(
                tokens_ptr, p_ptr, state_ptr + row * 2 * T, bias_ptr, w_in_ptr, w_out_ptr, token, place, score, repeat,
                total, num_candidates, T, BLOCK_M, RANK, BLOCK_R, COMPLETE,
            )  # fmt: skip
            tl.store(child_ptr + row * BLOCK_M + m, child)
            best, best_place = first_largest(child, m)
            queue_score = tl.where(lane == row, best, queue_score)
            queue_order = tl.where(lane == row, (level * BLOCK_N + row) * BLOCK_M + best_place, queue_order)
        tl.debug_barrier()  # the children of this row are written

        # The best of the queue; ties go to the shallower, then to the parent that came first.
        score = tl.max(queue_score, axis=0)
        order = tl.min(tl.where(queue_score == score, queue_order, 0x7FFFFFFF), axis=0)
        alive = score > -float("inf")
        place, parent, level = order % BLOCK_M, order // BLOCK_M % BLOCK_N, order // BLOCK_M // BLOCK_N
        sibling = tl.load(child_ptr + parent * BLOCK_M + m)
        is_later = (sibling < score) | ((sibling == score) & (m > place))
        best, best_place = first_largest(tl.where(is_later, sibling, -float("inf")), m)
        if chain_only_ptr is not None:
            best = tl.where(is_chain, -float("inf"), best)
        queue_score = tl.where(lane == parent, best, queue_score)
        queue_order = tl.where(lane == parent, order - place + best_place, queue_order)

        token = tl.load(tokens_ptr + place)
        # At the root w = b, so any last label will do.
        is_repeat = token == tl.load(tree_tokens_ptr + parent)
        own = tl.full((), 1, tl.int64) << (row + tl.zeros((), tl.int64))
        ancestors = tl.load(tree_ancestors_ptr + parent) | own
        level += 1
        row += 1
        tl.store(tree_tokens_ptr + row, token, mask=alive)
        tl.store(tree_parents_ptr + row, parent, mask=alive)
        tl.store(tree_depths_ptr + row, level, mask=alive)
        tl.store(tree_scores_ptr + row, score, mask=alive)
        tl.store(tree_ancestors_ptr + row, ancestors, mask=alive)
        weight_ptr = state_ptr + parent * 2 * T + tl.where(is_repeat, T, 0)
        p, n, b = extend(p_ptr + place, weight_ptr, blank, transitions_ptr, alive, T, BLOCK_T, BLOCK_M)
        store_state(state_ptr + row * 2 * T, n + b, b, T, BLOCK_T)
        repeat = tl.sum(p * b, axis=0)
        total = tl.sum(label_mass * (n + b) - p * n, axis=0)


@triton.jit
def _fill_column(column_ptr, of_anchor, of_nodes, lane, N: tl.constexpr):
    tl.store(column_ptr, of_anchor)
    tl.store(column_ptr + 1 + lane, of_nodes, mask=lane < N)
