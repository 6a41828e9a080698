"""A device function in Triton that writes the best tree of a union of nodes."""

import triton
import triton.language as tl


@triton.jit
def best_nodes(
    token,  # [BLOCK_U] int64
    parent,  # [BLOCK_U] int32, the place of the parent in the union, -1 for the anchor; -2 where there is no node
    score,  # [BLOCK_U] fp32, NONE where there is no node
    is_chain,  # only children of the node that was taken last are taken
    anchor,
    tree_tokens_ptr,  # [1 + N] int64, the DraftTree of this request
    tree_parents_ptr,  # [1 + N] int32
    tree_depths_ptr,  # [1 + N] int32
    tree_scores_ptr,  # [1 + N] fp32
    tree_ancestors_ptr,  # [1 + N] int64
    ANCHOR: tl.constexpr,  # the anchor's score: 0, or 1 where scores are probabilities
    NONE: tl.constexpr,  # that of no node: -inf, or 0
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Take the best node whose parent is in the tree, the first among equals, until the tree is full or there is none.

    Returns [BLOCK_N] int32, the place of each node in the union; -1 in unused rows. A step is one reduction for the
    best score and one for its place: no sort of the union, and the tree is prefix-closed whatever rounding does.
    """
    lane = tl.arange(0, BLOCK_U)
    node = tl.arange(0, BLOCK_N)
    row_of_parent = tl.where(parent == -1, 0, -1)
    depth = tl.zeros((BLOCK_U,), tl.int32)  # of the parent
    path = tl.zeros((BLOCK_U,), tl.int64)  # the parent's ancestors
    places = tl.full((BLOCK_N,), -1, tl.int32)
    tree_token = tl.zeros((BLOCK_N,), tl.int64) + anchor
    tree_parent = tl.full((BLOCK_N,), -1, tl.int32)
    tree_depth = tl.zeros((BLOCK_N,), tl.int32)
    tree_score = tl.full((BLOCK_N,), NONE, tl.float32)
    tree_ancestors = tl.zeros((BLOCK_N,), tl.int64)
    row, last, alive = 0, ANCHOR, True
    while (row < N) & alive:
        is_open = (row_of_parent >= 0) & (score > NONE)
        is_open = is_open & ((row_of_parent == row) | (is_chain == 0))
        best = tl.max(tl.where(is_open, score, NONE), axis=0)
        place = tl.min(tl.where(is_open & (score == best), lane, BLOCK_U), axis=0)
        alive = place < BLOCK_U
        is_new, is_taken = node == tl.where(alive, row, BLOCK_N), lane == place
        last = tl.minimum(last, best)
        level = 1 + tl.sum(tl.where(is_taken, depth, 0), axis=0)
        own = tl.sum(tl.where(is_taken, path, 0), axis=0) | (tl.full((), 1, tl.int64) << row)
        places = tl.where(is_new, place, places)
        tree_token = tl.where(is_new, tl.sum(tl.where(is_taken, token, 0), axis=0), tree_token)
        tree_parent = tl.where(is_new, tl.sum(tl.where(is_taken, row_of_parent, 0), axis=0), tree_parent)
        tree_depth = tl.where(is_new, level, tree_depth)
        tree_score = tl.where(is_new, last, tree_score)
        tree_ancestors = tl.where(is_new, own, tree_ancestors)
        row += 1
        is_child = alive & (parent == place)
        row_of_parent = tl.where(is_child, row, tl.where(is_taken, -1, row_of_parent))
        depth = tl.where(is_child, level, depth)
        path = tl.where(is_child, own, path)
    _store_column(tree_tokens_ptr, anchor, tree_token, node, N)
    _store_column(tree_parents_ptr, -1, tree_parent, node, N)
    _store_column(tree_depths_ptr, 0, tree_depth, node, N)
    _store_column(tree_scores_ptr, ANCHOR, tree_score, node, N)
    _store_column(tree_ancestors_ptr, 0, tree_ancestors, node, N)
    return places


@triton.jit
def _store_column(column_ptr, of_anchor, of_nodes, node, N: tl.constexpr):
    tl.store(column_ptr, of_anchor)
    tl.store(column_ptr + 1 + node, of_nodes, mask=node < N)
