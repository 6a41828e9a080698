"""One tree out of several: the best nodes under a mixture of the laws that the sources give to paths.

Source s says that the next labels begin with y_1..y_k with probability P_s(y_1..y_k). The score of a node in its tree
is log P_s; a node that its tree lacks has P_s = 0. With weights pi_s that sum to 1,

    P(y_1..y_k) = sum_s pi_s P_s(y_1..y_k)

Every P_s only falls along a path, so P does, and the N most probable nodes of the union are a tree. Among all trees of
N nodes of the union it has the largest expected number of accepted labels under P. Mixing edges instead, P(y_k | y_<k),
would give a source a say about what follows a path that it excluded.

Triton serves a GPU, numba a CPU.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import DraftTree


class MergedTree(NamedTuple):
    tree: DraftTree  # [B, 1 + N]
    rows: (
        Tensor  # [B, 1 + N, S] int64, the row of each node in each source's tree, 0 for the anchor; -1 where it is none
    )


def tree_merge(
    trees: Sequence[DraftTree],  # S of [B, 1 + N]
    log_weights: Tensor,  # [B, S] fp32
    chain_only: Tensor | None = None,  # [B] bool
) -> MergedTree:
    """The N best nodes of the union of S trees under the mixture of their path probabilities.

    Arguments:
        trees: of the same requests, with the same anchors and the same N, whose tokens are of one vocabulary.
        log_weights: [B, S] fp32, log pi_s; -inf for a source that has no say.
        chain_only: None, or [B] bool: rows that get the best child of the best child and so on, one node per depth.
    Returns:
        The tree, whose scores are log P, and where its nodes stand in the sources' trees. Nodes of probability 0 are
        none. Among equals the node that comes first does: in the first source's order, then in the next one's. The
        first K rows are what the same trees give for K nodes.

    Why custom: a node of one tree is a node of another if tokens and parents agree, and whether parents agree has to be
    known first. One program a request walks the later trees once, each row a comparison with all nodes found so far,
    and takes the best node N times. In torch it would be two sequences of launches as long as that.
    """
    stacked = tuple(torch.stack([getattr(tree, name) for tree in trees], 1) for name in ("tokens", "parents", "scores"))
    if log_weights.is_cuda:
        from vllm_ctc_spec.kernels.tree_merge.gpu import tree_merge_triton

        return tree_merge_triton(*stacked, log_weights, chain_only)
    from vllm_ctc_spec.kernels.tree_merge.cpu import tree_merge_cpu  # numba is for a CPU only

    return tree_merge_cpu(*stacked, log_weights, chain_only)
