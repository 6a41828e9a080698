"""Serves a CPU: `tree_merge` in loops that numba compiles, one request after the other."""

import numpy as np
import torch
from torch import Tensor

from vllm_ctc_spec.kernels._compiled import compiled
from vllm_ctc_spec.kernels.contract import DraftTree
from vllm_ctc_spec.kernels.tree_merge import MergedTree


def tree_merge_cpu(
    tokens: Tensor,  # [B, S, 1 + N] int64
    parents: Tensor,  # [B, S, 1 + N] int32
    scores: Tensor,  # [B, S, 1 + N] fp32
    log_weights: Tensor,  # [B, S] fp32
    chain_only: Tensor | None = None,
) -> MergedTree:
    batch, num_sources, width = tokens.shape
    tree = empty_trees(tokens[:, 0, 0].numpy(), width)
    rows = np.full((batch, width, num_sources), -1)
    rows[:, 0] = 0
    chains = np.zeros(batch, np.bool_) if chain_only is None else chain_only.contiguous().numpy()
    merge_all(
        tokens.numpy(), parents.numpy(), scores.numpy(), log_weights.contiguous().numpy(), chains, *tree.values(), rows
    )  # fmt: skip
    return MergedTree(
        DraftTree(**{name: torch.from_numpy(values) for name, values in tree.items()}), torch.from_numpy(rows)
    )


def empty_trees(anchors: np.ndarray, width: int) -> dict[str, np.ndarray]:
    """The fields of `DraftTree` [B, width] for trees without nodes; anchors [B] int64."""
    shape = len(anchors), width
    scores = np.full(shape, -np.inf, np.float32)
    scores[:, 0] = 0
    return {
        "tokens": np.repeat(anchors[:, None], width, 1), "parents": np.full(shape, -1, np.int32),
        "depths": np.zeros(shape, np.int32), "scores": scores, "ancestors": np.zeros(shape, np.int64),
    }  # fmt: skip


@compiled
def merge_all(
    tokens,
    parents,
    scores,
    log_weights,
    chains,
    out_tokens,
    out_parents,
    out_depths,
    out_scores,
    out_ancestors,
    out_rows,
):
    batch, num_sources, width = tokens.shape
    most = num_sources * (width - 1)
    for b in range(batch):
        token, parent, score = np.zeros(most, np.int64), np.full(most, -2), np.full(most, np.float32(-np.inf))
        rows = np.full((most, num_sources), -1)
        count = 0
        for s in range(num_sources):
            lane_of = np.full(width, -1)  # the union's node of each row; the anchor's is -1
            for row in range(1, width):
                above = parents[b, s, row]
                if above < 0:
                    break
                wanted, lane = lane_of[above], 0
                while lane < count and not (parent[lane] == wanted and token[lane] == tokens[b, s, row]):
                    lane += 1
                lane_of[row] = lane
                rows[lane, s] = row
                score[lane] = np.logaddexp(score[lane], log_weights[b, s] + scores[b, s, row])
                if lane == count:
                    token[lane], parent[lane] = tokens[b, s, row], wanted
                    count += 1
        lanes = best_nodes(
            token[:count], parent[:count], score[:count], chains[b], out_tokens[b], out_parents[b], out_depths[b],
            out_scores[b], out_ancestors[b], -np.inf,
        )  # fmt: skip
        for row in range(len(lanes)):
            out_rows[b, 1 + row] = rows[lanes[row]]


@compiled
def best_nodes(token, parent, score, is_chain, tokens, parents, depths, scores, ancestors, none):
    """Take the best node whose parent is in the tree, until the tree is full or there is none.

    token [U] int64, parent [U] int64 the place of the parent among the U, -1 for the anchor; score [U] fp32, not above
    `none` where there is no node. The fields of one `DraftTree` [1 + N] are written. Returns [K] int64, the places of
    the tree's nodes.
    """
    lanes = np.full(len(tokens) - 1, -1)
    row_of_parent = np.full(len(token), -1)  # -1: not in the tree
    for lane in range(len(token)):
        if parent[lane] == -1:
            row_of_parent[lane] = 0
    row = 0
    while row + 1 < len(tokens):
        best = -1
        for lane in range(len(token)):
            is_open = row_of_parent[lane] >= 0 and not (is_chain and row_of_parent[lane] != row)
            if is_open and score[lane] > none and (best < 0 or score[lane] > score[best]):
                best = lane
        if best < 0:
            break
        row += 1
        above = row_of_parent[best]
        tokens[row], parents[row], depths[row] = token[best], above, depths[above] + 1
        # Rounding may lift a mixture above its parent's.
        scores[row] = min(score[best], scores[row - 1])
        ancestors[row] = ancestors[above] | (np.int64(1) << (row - 1))
        lanes[row - 1] = best
        row_of_parent[best] = -1
        for lane in range(len(token)):
            if parent[lane] == best:
                row_of_parent[lane] = row
    return lanes[:row]
