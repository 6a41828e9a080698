"""The CTC transform by its definition, in dictionaries: a beam of raw paths, and the collapse of each."""

import math
from collections import defaultdict

import numpy as np
import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels.contract import DraftTree, Frames

Nodes = dict[tuple[int, ...], float]  # the labels of each node and its score, in no order that a comparison may use


def raw_tree(frames: Frames, row: int, beam: int, width: int) -> tuple[list[list[tuple[float, tuple[int, ...]]]], int]:
    """The kept raw paths of every frame, (exact log probability, symbols), best first, and the blank.

    The rank of a path is the definition's fp32 sum; what its probability adds to a node is the fp64 sum.
    """
    logits, log_scale, log_blank = frames[:3]
    blank = logits.shape[2]
    # More tokens than paths change nothing, except for how topk ranks equal logits.
    best, tokens = logits.topk(min(width - 1, blank, beam), dim=2)
    token_log_p = (best.float() + log_scale[..., None]).masked_fill(best == -torch.inf, -torch.inf)
    log_p = torch.cat([token_log_p, log_blank[..., None]], 2)[row].clamp(max=0).numpy()
    if np.isnan(log_p).any():
        return [], blank
    symbols = [[*frame, blank] for frame in tokens[row].tolist()]
    kept, levels = [(np.float32(0), 0.0, ())], []
    for t, frame in enumerate(symbols):
        extended = [
            (rank + log_p[t, r], exact + float(log_p[t, r]), (*path, symbol))
            for rank, exact, path in kept
            for r, symbol in enumerate(frame)
            if log_p[t, r] > -np.inf
        ]
        kept = sorted(extended, key=lambda path: -path[0])[:beam]  # stable: lower parent first, then the symbol's rank
        levels.append([path[1:] for path in kept])
    return levels, blank


def transform(frames: Frames, row: int, beam: int, width: int, depth: int) -> Nodes:
    """Every draft-tree node with its score, before the cut to the budget."""
    levels, blank = raw_tree(frames, row, beam, width)
    emitted = defaultdict(list)
    for level in levels:
        for exact, symbols in level:
            if symbols[-1] != blank and symbols[-2:-1] != symbols[-1:]:
                emitted[tuple(oracle.collapse(symbols, blank))].append(exact)
    nodes: Nodes = {}
    for labels, exact in emitted.items():  # a prefix is emitted in an earlier frame than what extends it
        score = max(exact) + math.log(math.fsum(math.exp(x - max(exact)) for x in exact))
        nodes[labels] = min(score, nodes.get(labels[:-1], 0.0))
    return {labels: score for labels, score in nodes.items() if len(labels) <= depth}


def tree_nodes(tree: DraftTree, row: int) -> Nodes:
    return {tuple(tree.path(row, i)): tree.scores[row, i].item() for i in range(1, 1 + int(tree.num_nodes[row]))}


def assert_is_the_cut(tree: DraftTree, row: int, nodes: Nodes) -> None:
    """Row `row` of the tree is the best of `nodes`; nodes that tie at the cut may replace each other."""
    budget = tree.tokens.shape[1] - 1
    found = tree_nodes(tree, row)
    expected = sorted(nodes.values(), reverse=True)[:budget]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-6, atol=1e-4)
    for labels, score in found.items():
        assert labels in nodes, labels
        np.testing.assert_allclose(score, nodes[labels], rtol=1e-6, atol=1e-4)
    for labels, score in nodes.items():
        assert len(nodes) > budget and score <= expected[-1] + 2e-4 or labels in found, labels
