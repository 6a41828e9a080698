"""For tests: the definition in plain Python, one request at a time, in fp32 as the kernels compute. `followers` is the
scan of one leader."""

import math

import numpy as np
import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree
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


def history_tree_reference(
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
    tree = {name: torch.zeros(batch, 1 + num_nodes, dtype=dtype) for name, dtype in DTYPES.items()}
    tree["tokens"] += anchor[:, None]
    tree["parents"] -= 1
    tree["scores"][:, 1:] = -torch.inf
    edges = torch.full((batch, 1 + num_nodes), -1)
    for b, request in enumerate(requests.tolist()):
        if request < 0 or not int(texts.context_lengths[request]):
            continue
        text, context = texts_of(texts, request)
        table = hazards.numpy()
        scores, kinds = grow(text, context, table, depth, frozen, growth)
        chosen: list[tuple[int, ...]] = [()]
        while len(chosen) <= num_nodes:
            above = chosen[-1:] if chain_only is not None and chain_only[b] else chosen
            open_ = [p for p in scores if p and p not in chosen and p[:-1] in above and scores[p] > 0]
            if not open_:
                break
            path = max(open_, key=scores.__getitem__)  # the first among equals
            row, parent = len(chosen), chosen.index(path[:-1])
            chosen.append(path)
            tree["tokens"][b, row], tree["parents"][b, row], tree["depths"][b, row] = path[-1], parent, len(path)
            tree["scores"][b, row] = math.log(scores[path])
            tree["ancestors"][b, row] = tree["ancestors"][b, parent] | (1 << (row - 1) if row < 64 else -(1 << 63))
            edges[b, row] = kinds[path]
    return HistoryTree(DraftTree(**tree), edges)


def texts_of(texts: Texts, request: int) -> tuple[list[int], list[int]]:
    """The text, and the context with what stands before it."""
    text = texts.text[request, : int(texts.text_lengths[request])].tolist()
    context = texts.context[request, : int(texts.context_lengths[request])].tolist()
    if texts.context_starts is None:
        return text, [NO_TOKEN] * MATCH + context
    return text, [BEFORE_TEXT] * MATCH + context[int(texts.context_starts[request]) :]


def followers(text: list[int], context: list[int], growth: Growth) -> list[tuple[int, int]]:
    """(place, tokens that agree) of the leader `context[-1]` in the text, in the order of `history_tree`."""
    places: list[list[tuple[int, int]]] = [[] for _ in range(CLASSES)]
    for place in range(len(text) - 2, -1, -1):
        agree = 0
        while agree < MATCH:
            token = text[place - agree] if place >= agree else BEFORE_TEXT
            if token != context[-1 - agree]:
                break
            agree += 1
        if agree >= growth.leader:
            kind = match_class(agree) if growth.by_match else 1
            places[kind].append((place, agree if growth.by_match else 1))
    return [found for kind in reversed(places) for found in kind[: growth.scanned]]


def grow(
    text: list[int], context: list[int], hazards: np.ndarray, depth: int, frozen: Tensor | None, growth: Growth
) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], int]]:
    """Probabilities and edges of all nodes, by path, in the order in which they were found. () is the anchor."""
    scores: dict[tuple[int, ...], float] = {(): np.float32(1)}
    edges: dict[tuple[int, ...], int] = {}
    rest: dict[tuple[int, ...], float] = {(): np.float32(1)}
    ends: list[tuple[int, ...]] = []
    expanded: set[tuple[int, ...]] = set()
    for current in range(growth.rounds):
        leaders = [()] if not current else sorted(
            (p for p in scores if p in ends and p not in expanded and scores[p] > 0), key=lambda p: -scores[p]
        )[: growth.leaders]  # fmt: skip
        for leader in leaders:
            expanded.add(leader)
            of_text = [
                (text[place + 1 : place + 1 + growth.reach(agree)], agree)
                for place, agree in followers(text, context + list(leader), growth)
            ]
            token = (context + list(leader))[-1]
            common = [] if frozen is None or token < 0 else frozen[token].tolist()
            of_table = [([t for t in row if t >= 0], None) for row in common]
            taken = 0
            for follower, agree in of_text + of_table:
                if taken == growth.followers:
                    break
                path, is_new = leader, False
                for k, label in enumerate(follower):
                    if len(path) == depth or ((*path, label) not in scores and len(scores) > growth.nodes):
                        break
                    parent, path = path, (*path, label)
                    if path not in scores:
                        kind = 0 if agree is None else match_class(agree + k) if growth.by_match else 1
                        rank = min(sum(p[:-1] == parent for p in scores if p), RANKS - 1)
                        h = hazards[kind, rank]
                        scores[path] = h * rest[parent] * scores[parent]
                        rest[parent] *= 1 - h
                        rest[path], edges[path], is_new = np.float32(1), kind * RANKS + rank, True
                if path != leader and len(path) < depth:
                    ends.append(path)
                taken += is_new
    return scores, edges
