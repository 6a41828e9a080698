"""Serves a GPU, in Triton: the union and its best nodes, one program a request."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ctc_spec.kernels._best_nodes import best_nodes
from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree
from vllm_ctc_spec.kernels.tree_merge import MergedTree


def tree_merge_triton(
    tokens: Tensor,  # [B, S, 1 + N] int64
    parents: Tensor,  # [B, S, 1 + N] int32
    scores: Tensor,  # [B, S, 1 + N] fp32
    log_weights: Tensor,  # [B, S] fp32
    chain_only: Tensor | None = None,
) -> MergedTree:
    batch, num_sources, width = tokens.shape
    tree = DraftTree(**{name: tokens.new_empty(batch, width, dtype=dtype) for name, dtype in DTYPES.items()})
    rows = tokens.new_empty(batch, width, num_sources)
    num_nodes, block_u = width - 1, triton.next_power_of_2(num_sources * (width - 1))
    row_of_lane = tokens.new_full((batch, num_sources, block_u), -1, dtype=torch.int32)
    _tree_merge_kernel[(batch,)](
        tokens.contiguous(), parents.contiguous(), scores.contiguous(), log_weights.contiguous(),
        None if chain_only is None else chain_only.contiguous().view(torch.int8), row_of_lane,
        tree.tokens, tree.parents, tree.depths, tree.scores, tree.ancestors, rows,
        S=num_sources, N=num_nodes, BLOCK_N=triton.next_power_of_2(num_nodes), BLOCK_U=block_u, num_warps=1,
    )  # fmt: skip
    return MergedTree(tree, rows)


@triton.jit
def _tree_merge_kernel(
    tokens_ptr,  # [B, S, 1 + N] int64
    parents_ptr,  # [B, S, 1 + N] int32
    scores_ptr,  # [B, S, 1 + N] fp32
    log_weights_ptr,  # [B, S] fp32
    chain_only_ptr,  # [B] int8, or None
    row_of_lane_ptr,  # [B, S, BLOCK_U] int32, scratch, -1 everywhere
    tree_tokens_ptr,  # [B, 1 + N] int64, the DraftTree
    tree_parents_ptr,  # [B, 1 + N] int32
    tree_depths_ptr,  # [B, 1 + N] int32
    tree_scores_ptr,  # [B, 1 + N] fp32
    tree_ancestors_ptr,  # [B, 1 + N] int64
    rows_ptr,  # [B, 1 + N, S] int64
    S: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """The union in registers, one lane for each of its nodes. Every row of a source's tree is compared with all of
    them at once, and is one of them or the next. Grid (B,)."""
    request = tl.program_id(0).to(tl.int64)
    lane, node = tl.arange(0, BLOCK_U), tl.arange(0, BLOCK_N)
    token = tl.zeros((BLOCK_U,), tl.int64)
    parent = tl.full((BLOCK_U,), -2, tl.int32)
    score = tl.full((BLOCK_U,), -float("inf"), tl.float32)
    row_of_lane_ptr += request * S * BLOCK_U
    count = 0
    for source in range(S):
        tree = (request * S + source) * (1 + N)
        weight = tl.load(log_weights_ptr + request * S + source)
        used = tl.sum((tl.load(parents_ptr + tree + 1 + node, mask=node < N, other=-1) >= 0).to(tl.int32), axis=0)
        lane_of_node = tl.full((BLOCK_N,), -1, tl.int32)
        for row in range(1, used + 1):
            label = tl.load(tokens_ptr + tree + row)
            above = tl.load(parents_ptr + tree + row)
            above = tl.where(above > 0, tl.sum(tl.where(node + 1 == above, lane_of_node, 0), axis=0), -1)
            mixed = weight + tl.load(scores_ptr + tree + row)
            same = (lane < count) & (parent == above) & (token == label)
            place = tl.min(tl.where(same, lane, count), axis=0)
            here = lane == place
            token = tl.where(here, label, token)
            parent = tl.where(here, above, parent)
            largest = tl.maximum(score, mixed)
            total = largest + tl.log(1 + tl.exp(tl.minimum(score, mixed) - largest))
            score = tl.where(here, tl.where(largest > -float("inf"), total, largest), score)
            lane_of_node = tl.where(node + 1 == row, place, lane_of_node)
            tl.store(row_of_lane_ptr + source * BLOCK_U + place, row)
            count = tl.maximum(count, place + 1)
    is_chain = 0
    if chain_only_ptr is not None:
        is_chain = tl.load(chain_only_ptr + request).to(tl.int32)
    out = request * (1 + N)
    places = best_nodes(
        token, parent, score, is_chain, tl.load(tokens_ptr + request * S * (1 + N)),
        tree_tokens_ptr + out, tree_parents_ptr + out, tree_depths_ptr + out, tree_scores_ptr + out,
        tree_ancestors_ptr + out, 0.0, -float("inf"), N, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    tl.debug_barrier()  # rows of all lanes are written
    for source in range(S):
        there = tl.load(row_of_lane_ptr + source * BLOCK_U + tl.maximum(places, 0), mask=places >= 0, other=-1)
        tl.store(rows_ptr + (out + 1 + node) * S + source, there.to(tl.int64), mask=node < N)
        tl.store(rows_ptr + out * S + source, 0)
