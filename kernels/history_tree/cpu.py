"""Serves a CPU: `history_tree` in loops that numba compiles, one request after the other."""

import numpy as np
import torch
from torch import Tensor

from vllm_ctc_spec.kernels._compiled import compiled
from vllm_ctc_spec.kernels.contract import DraftTree
from vllm_ctc_spec.kernels.history_tree import (
    BEFORE_TEXT,
    CLASSES,
    MATCH,
    NO_TOKEN,
    RANKS,
    USUAL_GROWTH,
    Growth,
    HistoryTree,
    Texts,
    match_class,
)
from vllm_ctc_spec.kernels.tree_merge.cpu import best_nodes, empty_trees

_CLASS_OF = np.array([match_class(length) for length in range(MATCH + 1)])
_NO_TABLE = np.zeros((0, 0, 0), np.int32)


def history_tree_cpu(
    texts: Texts,
    requests: Tensor,
    anchor: Tensor,
    hazards: Tensor,
    num_nodes: int,
    depth: int,
    chain_only: Tensor | None = None,
    frozen: Tensor | None = None,
    growth: Growth = USUAL_GROWTH,
) -> HistoryTree:
    batch = len(requests)
    tree = empty_trees(anchor.numpy(), 1 + num_nodes)
    tree["scores"][:] = np.exp(tree["scores"])  # probabilities, which all devices multiply alike
    edges = np.full((batch, 1 + num_nodes), -1)
    chains = [False] * batch if chain_only is None else chain_only.tolist()
    table = _NO_TABLE if frozen is None else frozen.numpy()
    for b, request in enumerate(requests.tolist()):
        if request < 0:
            continue
        length = int(texts.context_lengths[request])
        start = 0 if texts.context_starts is None else int(texts.context_starts[request])
        if length <= start:
            continue
        before = NO_TOKEN if texts.context_starts is None else BEFORE_TEXT
        grow(
            texts.text[request, : int(texts.text_lengths[request])].numpy(),
            texts.context[request, start:length].numpy(), before, hazards.numpy(), depth, chains[b], table,
            growth.leader, growth.length, growth.followers, growth.leaders, growth.rounds, growth.scanned,
            growth.nodes, growth.by_match, *(field[b] for field in tree.values()), edges[b],
        )  # fmt: skip
    with np.errstate(divide="ignore"):
        np.log(tree["scores"], out=tree["scores"])
    return HistoryTree(
        DraftTree(**{name: torch.from_numpy(values) for name, values in tree.items()}), torch.from_numpy(edges)
    )


@compiled
def grow(
    text, context, before, hazards, depth, is_chain, table, leader, length, most_followers, most_leaders, rounds,
    scanned, most, by_match, tokens, parents, depths, scores, ancestors, out_edges,
):  # fmt: skip
    """`history_tree` for one request: text [T] int32, context [C] int32; the other arguments as there."""
    token, parent, level = np.zeros(most, np.int64), np.full(most, -2), np.zeros(most, np.int64)
    score, rest = np.zeros(most, np.float32), np.ones(1 + most, np.float32)  # rest and children of node i are at i + 1
    children, edge = np.zeros(1 + most, np.int64), np.full(most, -1)
    end = np.zeros(most, np.int8)  # of a follower: 1, and 2 once the tree has gone on from there
    leaders = np.full(most_leaders, -1)
    found = np.empty((CLASSES, scanned, 2), np.int64)
    ahead = np.empty(MATCH, np.int64)
    count = 0
    for current in range(rounds):
        num_leaders = _best_ends(end[:count], score[:count], leaders) if current else 1
        for node in leaders[:num_leaders]:
            _look_back(node, token, parent, context, before, ahead)
            counts = _scan(text, ahead, leader, by_match, found)
            taken = 0
            for kind in range(CLASSES - 1, 0, -1):
                for place in range(counts[kind]):
                    if taken == most_followers:
                        break
                    at, agree = found[kind, place]
                    reach = min(length, 1 + 2 * agree) if by_match else length
                    count, is_new = _insert(
                        text[at + 1 : at + 1 + reach], agree if by_match else -1, node, depth, hazards,
                        token, parent, level, score, rest, children, edge, end, count,
                    )  # fmt: skip
                    taken += is_new
            if len(table) and 0 <= ahead[0] < len(table):
                for place in range(table.shape[1]):
                    if taken == most_followers:
                        break
                    count, is_new = _insert(
                        table[ahead[0], place], 0, node, depth, hazards,
                        token, parent, level, score, rest, children, edge, end, count,
                    )  # fmt: skip
                    taken += is_new
    lanes = best_nodes(
        token[:count], parent[:count], score[:count], is_chain, tokens, parents, depths, scores, ancestors, 0
    )
    for row in range(len(lanes)):
        out_edges[1 + row] = edge[lanes[row]]


@compiled
def _look_back(node, token, parent, context, before, ahead):
    """Writes the MATCH tokens that end in `node`, the last one first."""
    place = len(context) - 1
    for i in range(MATCH):
        if node >= 0:
            ahead[i] = token[node]
            node = parent[node]
        else:
            ahead[i] = context[place] if place >= 0 else before
            place -= 1


@compiled
def _scan(text, ahead, leader, by_match, found):
    """Writes the most recent places of each class, and how many tokens agree there; returns how many [CLASSES]."""
    counts = np.zeros(CLASSES, np.int64)
    for place in range(len(text) - 2, -1, -1):
        if text[place] != ahead[0]:
            continue
        agree = 1
        while agree < MATCH:
            there = text[place - agree] if place >= agree else BEFORE_TEXT
            if there != ahead[agree]:
                break
            agree += 1
        if agree < leader:
            continue
        kind = _CLASS_OF[agree] if by_match else 1
        if counts[kind] < found.shape[1]:
            found[kind, counts[kind], 0], found[kind, counts[kind], 1] = place, agree
            counts[kind] += 1
    return counts


@compiled
def _best_ends(end, score, leaders):
    """Writes the best ends of followers from which the tree has not gone on yet, the first among equals; returns how
    many."""
    for number in range(len(leaders)):
        best = -1
        for node in range(len(end)):
            if end[node] == 1 and score[node] > 0 and (best < 0 or score[node] > score[best]):
                best = node
        if best < 0:
            return number
        leaders[number] = best
        end[best] = 2
    return len(leaders)


@compiled
def _insert(follower, agree, node, depth, hazards, token, parent, level, score, rest, children, edge, end, count):
    """Put the follower [FL] below `node`; agree: 0 for the frozen table, -1 without classes. Returns the number of
    nodes now, and whether there is a new one."""
    is_new = False
    begin = node
    for k in range(len(follower)):
        label = follower[k]
        above = level[node] if node >= 0 else 0
        if label < 0 or above == depth:
            break
        child = 0
        while child < count and not (parent[child] == node and token[child] == label):
            child += 1
        if child == len(token):
            break
        if child == count:
            rank = min(children[node + 1], RANKS - 1)
            kind = 0 if agree == 0 else 1 if agree < 0 else _CLASS_OF[min(agree + k, MATCH)]
            hazard = hazards[kind, rank]
            token[child], parent[child], level[child], edge[child] = label, node, above + 1, kind * RANKS + rank
            score[child] = hazard * rest[node + 1] * (score[node] if node >= 0 else np.float32(1))
            rest[node + 1] *= np.float32(1) - hazard
            children[node + 1] += 1
            count += 1
            is_new = True
        node = child
    if node != begin and level[node] < depth and end[node] == 0:
        end[node] = 1
    return count, is_new
