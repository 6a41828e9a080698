"""The tree of the most probable label prefixes, from exact prefix conditionals.

With the forward vectors `w`, `b` and the exact conditional `S(v)` of a prefix as in `prefix_chain`, the score of a
node is the sum of `log q` along its path:

    q(v | prefix) = S(v)                                        the rest of 1 is the mass of stopping here
    q(v | prefix) = S(v) e^{bias(v)} / Z                        with a head, bias(v) = W_out[v] . W_in[last]
    Z = sum_{v in candidates} S(v) e^{bias(v)} + max(0, M - sum_{v in candidates} S(v))
    M = sum_v S(v) = sum_t P(t is no blank) w[t-1] - sum_t p_t(last) n[t-1]

The candidates are the `C` best tokens of each frame. `Z` is the sum over the full vocabulary with bias 0 outside of the
candidates, and is the full definition where `C >= V`. `M` comes from the state, without a pass over the vocabulary. A
frame with an infinite log_scale holds no label. A child whose `S` is not above `IMPOSSIBLE`, or whose score is not a
number, does not exist.

`q <= 1`, so a prefix never outranks its parent, and the best N are found without looking below any other node. Their
order is score, then depth (shallower first), then the parent's row, then the token.
"""

import torch

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.limits import MAX_NODES
from vllm_ctc_spec.kernels.prefix_search.gpu import prefix_search_triton


def prefix_search(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    """The `N` most probable label prefixes, given that they consist of candidates: the `C` best tokens of each frame.

    Arguments:
        budget: C is clamped to V. With C = N small trees lose where a head favours tokens that no frame ranks high.
        chain_only: None, or [B] bool: rows that get the best child of the best child and so on, one node per depth.
    Returns:
        The DraftTree [B, 1 + N]; unused rows hold the anchor's token.
    Raises:
        ValueError: for a budget of 0 or of more than MAX_NODES nodes; on a GPU, for logits or a head that are not
            contiguous.

    Why custom: every node needs the `S` of all T * C candidates under its own state. In torch this is some thirty
    launches per depth over [B, N, T * C] for N nodes of every depth, most of which are dropped later. Here one program
    per request holds the search and expands only the nodes of the tree: four or five launches whatever N and D, and
    nothing of size N * V.
    """
    if not 1 <= budget.nodes <= MAX_NODES:
        raise ValueError(f"prefix_search finds 1 to {MAX_NODES} nodes, not {budget.nodes}")
    if frames.logits.is_cuda:
        return prefix_search_triton(frames, budget, chain_only)
    from vllm_ctc_spec.kernels.prefix_search.cpu import prefix_search_cpu  # numba is for a CPU only

    return prefix_search_cpu(frames, budget, chain_only)


def greedy_chain(
    frames: Frames, num_labels: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, N] int64, [B] int32
    """The most probable label, the most probable one behind it, and so on: the tree of `prefix_search` in which every
    row is a chain of up to `N` labels, `width` tokens of each frame being candidates.

    `prefix_chain` without sampling finds the same labels among all tokens, but reads the vocabulary's logits once a
    label. Here they are read once, for the candidates.

    Returns:
        labels [B, N] int64, the anchor past the end, and lengths [B] int32, the number of labels before the end.
    """
    every = torch.ones_like(frames.anchor, dtype=torch.bool)
    tree = prefix_search(frames, Budget(num_labels, width, num_labels), every)
    return tree.tokens[:, 1:], (tree.parents[:, 1:] >= 0).sum(1, dtype=torch.int32)
