"""Serves a GPU, in Triton: a scan and a step of growth for each round."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_ctc_spec.kernels._best_nodes import best_nodes
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
)

_NO_TOKEN, _BEFORE_TEXT = tl.constexpr(NO_TOKEN), tl.constexpr(BEFORE_TEXT)
_NO_LEADER = tl.constexpr(-2)
# Of one word: the number of places of each class in a block of at most 1024, behind at most `scanned` before it.
_BITS = 12
_BLOCK = 1024


def history_tree_triton(
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
    requests, anchor, hazards = requests.contiguous(), anchor.contiguous(), hazards.contiguous()
    batch, leaders = len(requests), growth.leaders
    tree = DraftTree(**{name: anchor.new_empty(batch, 1 + num_nodes, dtype=dtype) for name, dtype in DTYPES.items()})
    edges = anchor.new_empty(batch, 1 + num_nodes)
    frozen_size, num_frozen, frozen_length = (0, 0, 1) if frozen is None else frozen.shape
    block_u = triton.next_power_of_2(growth.nodes)
    words = anchor.new_empty(batch, 6, block_u, dtype=torch.int32)  # of each node: the rows of `_grow_kernel`
    numbers = hazards.new_empty(batch, 2, block_u)
    counts = anchor.new_empty(batch, 2, dtype=torch.int32)  # nodes, and children of the anchor
    rest = hazards.new_empty(batch)  # the mass of none of the anchor's children
    leader_nodes = anchor.new_empty(batch, leaders, dtype=torch.int32)
    ahead = anchor.new_empty(batch, leaders, MATCH, dtype=torch.int32)
    places = anchor.new_empty(batch, leaders, CLASSES, growth.scanned, dtype=torch.int32)
    place_counts = anchor.new_empty(batch, leaders, CLASSES, dtype=torch.int32)
    for current in range(growth.rounds + 1):
        is_last = current == growth.rounds
        warps = 1 if is_last and (num_frozen or block_u <= 64) else 2  # what spills no registers on sm_90
        if current:
            _scan_kernel[(batch, leaders)](
                texts.text, texts.text.stride(0), texts.text_lengths, requests, leader_nodes, ahead, places,
                place_counts, growth.leader, LEADERS=leaders, SCANNED=growth.scanned, BY_MATCH=growth.by_match,
                MATCH=MATCH, CLASSES=CLASSES, BITS=_BITS, BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
        _grow_kernel[(batch,)](
            texts.text, texts.text.stride(0), texts.text_lengths, texts.context, texts.context.stride(0),
            texts.context_lengths, texts.context_starts, requests, anchor, hazards,
            None if chain_only is None else chain_only.contiguous().view(torch.int8), frozen,
            words, numbers, counts, rest, leader_nodes, ahead, places, place_counts,
            tree.tokens, tree.parents, tree.depths, tree.scores, tree.ancestors, edges, depth,
            frozen_size,
            FIRST=current == 0, LAST=is_last, LEADERS=leaders, SCANNED=growth.scanned,
            FOLLOWERS=growth.followers, LENGTH=growth.length, NODES=growth.nodes, BY_MATCH=growth.by_match,
            MATCH=MATCH, CLASSES=CLASSES, RANKS=RANKS, FROZEN=num_frozen, FROZEN_LENGTH=frozen_length,
            N=num_nodes, BLOCK_N=triton.next_power_of_2(num_nodes), BLOCK_U=block_u, num_warps=warps,
        )  # fmt: skip
    tree.scores.log_()
    return HistoryTree(tree, edges)


@triton.jit
def _class_of(agree):
    """`match_class` of 1 or more."""
    return (
        1
        + (agree >= 2).to(tl.int32)
        + (agree >= 3).to(tl.int32)
        + (agree >= 5).to(tl.int32)
        + (agree >= 8).to(tl.int32)
    )


@triton.jit
def _scan_kernel(
    text_ptr,  # [S, L] int32
    text_stride,
    text_lengths_ptr,  # [S] int32
    requests_ptr,  # [B] int64
    leader_nodes_ptr,  # [B, LEADERS] int32
    ahead_ptr,  # [B, LEADERS, MATCH] int32, the last tokens of each leader's context, its own first
    places_ptr,  # [B, LEADERS, CLASSES, SCANNED] int32, written: 16 * place + tokens that agree
    place_counts_ptr,  # [B, LEADERS, CLASSES] int32, written
    leader_length,
    LEADERS: tl.constexpr,
    SCANNED: tl.constexpr,
    BY_MATCH: tl.constexpr,
    MATCH: tl.constexpr,
    CLASSES: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The most recent places of each class. Grid (B, LEADERS).

    Blocks come from the text's end. A place's number in its class is a sum over the lanes before it, of all classes at
    once: each has some bits of a word.
    """
    request = tl.load(requests_ptr + tl.program_id(0)).to(tl.int64)
    leader = tl.program_id(0).to(tl.int64) * LEADERS + tl.program_id(1)
    exists = (request >= 0) & (tl.load(leader_nodes_ptr + leader) != _NO_LEADER)
    request = tl.maximum(request, 0)
    end = tl.where(exists, tl.load(text_lengths_ptr + request) - 1, 0)  # the last token has no follower
    text_ptr += request * text_stride
    ahead_ptr += leader * MATCH
    places_ptr += leader * CLASSES * SCANNED
    lane = tl.arange(0, BLOCK)
    counted = tl.full((), 0, tl.int64)
    while end > 0:
        place = end - 1 - lane
        agrees = place >= 0
        agree = tl.zeros((BLOCK,), tl.int32)
        for k in tl.static_range(MATCH):
            inside = agrees & (place >= k)
            token = tl.load(text_ptr + place - k, mask=inside, other=_BEFORE_TEXT)
            agrees = agrees & (token == tl.load(ahead_ptr + k))
            agree += agrees.to(tl.int32)
        kind = _class_of(agree) if BY_MATCH else tl.full((BLOCK,), 1, tl.int32)
        shift = ((kind - 1) * BITS).to(tl.int64)
        is_found = (agree >= leader_length) & (agree > 0)
        word = tl.where(is_found, tl.full((BLOCK,), 1, tl.int64) << shift, 0)
        number = ((counted + tl.cumsum(word, axis=0) - word) >> shift) & ((1 << BITS) - 1)
        tl.store(
            places_ptr + kind * SCANNED + number.to(tl.int32), place * 16 + agree, mask=is_found & (number < SCANNED)
        )
        total = counted + tl.sum(word, axis=0)
        counted = tl.full((), 0, tl.int64)
        for k in tl.static_range(CLASSES - 1):
            counted |= tl.minimum((total >> (BITS * k)) & ((1 << BITS) - 1), SCANNED) << (BITS * k)
        end -= BLOCK
    for k in tl.static_range(CLASSES - 1):
        number = ((counted >> (BITS * k)) & ((1 << BITS) - 1)).to(tl.int32)
        tl.store(place_counts_ptr + leader * CLASSES + k + 1, number)


@triton.jit
def _at(values, lane, place, otherwise):
    """The value of one lane; `otherwise` for the anchor, -1."""
    return tl.where(place >= 0, tl.sum(tl.where(lane == place, values, 0), axis=0), otherwise)


@triton.jit
def _grow_kernel(
    text_ptr,  # [S, L] int32
    text_stride,
    text_lengths_ptr,  # [S] int32
    context_ptr,  # [S, L'] int32
    context_stride,
    context_lengths_ptr,  # [S] int32
    context_starts_ptr,  # [S] int32, or None
    requests_ptr,  # [B] int64
    anchor_ptr,  # [B] int64
    hazards_ptr,  # [CLASSES, RANKS] fp32
    chain_only_ptr,  # [B] int8, or None
    frozen_ptr,  # [V, FROZEN, FROZEN_LENGTH] int32, or None
    words_ptr,  # [B, 6, BLOCK_U] int32: token, parent, depth, edge, number of children, end of each node
    numbers_ptr,  # [B, 2, BLOCK_U] fp32: probability, and the mass of none of the children
    counts_ptr,  # [B, 2] int32: nodes, and children of the anchor
    rest_ptr,  # [B] fp32: the mass of none of the anchor's children
    leader_nodes_ptr,  # [B, LEADERS] int32, -1 is the anchor
    ahead_ptr,  # [B, LEADERS, MATCH] int32
    places_ptr,  # [B, LEADERS, CLASSES, SCANNED] int32
    place_counts_ptr,  # [B, LEADERS, CLASSES] int32
    tree_tokens_ptr,  # [B, 1 + N] int64, the DraftTree
    tree_parents_ptr,  # [B, 1 + N] int32
    tree_depths_ptr,  # [B, 1 + N] int32
    tree_scores_ptr,  # [B, 1 + N] fp32
    tree_ancestors_ptr,  # [B, 1 + N] int64
    edges_ptr,  # [B, 1 + N] int64
    max_depth,
    frozen_size,
    FIRST: tl.constexpr,  # nothing is scanned yet: the anchor is the leader
    LAST: tl.constexpr,  # the tree is written, and no leaders
    LEADERS: tl.constexpr,
    SCANNED: tl.constexpr,
    FOLLOWERS: tl.constexpr,
    LENGTH: tl.constexpr,
    NODES: tl.constexpr,
    BY_MATCH: tl.constexpr,
    MATCH: tl.constexpr,
    CLASSES: tl.constexpr,
    RANKS: tl.constexpr,
    FROZEN: tl.constexpr,
    FROZEN_LENGTH: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """The followers of this round's leaders become nodes, and the best ends of followers the next leaders. Grid (B,).

    All nodes are in registers, one lane each; whether a parent has a child is one comparison of all lanes.
    """
    row = tl.program_id(0).to(tl.int64)
    request = tl.load(requests_ptr + row).to(tl.int64)
    is_inert = request < 0
    request = tl.maximum(request, 0)
    lane = tl.arange(0, BLOCK_U)
    text_ptr += request * text_stride
    text_length = tl.load(text_lengths_ptr + request)
    context_ptr += request * context_stride
    context_length = tl.load(context_lengths_ptr + request)
    start, before = 0, _NO_TOKEN
    if context_starts_ptr is not None:
        start = tl.load(context_starts_ptr + request)
        before = _BEFORE_TEXT
    words_ptr += row * 6 * BLOCK_U
    numbers_ptr += row * 2 * BLOCK_U
    leader_nodes_ptr += row * LEADERS
    ahead_ptr += row * LEADERS * MATCH
    places_ptr += row * LEADERS * CLASSES * SCANNED
    place_counts_ptr += row * LEADERS * CLASSES

    if FIRST:
        token = tl.zeros((BLOCK_U,), tl.int32)
        parent = tl.full((BLOCK_U,), -2, tl.int32)
        depth = tl.zeros((BLOCK_U,), tl.int32)
        edge = tl.full((BLOCK_U,), -1, tl.int32)
        children = tl.zeros((BLOCK_U,), tl.int32)
        end = tl.zeros((BLOCK_U,), tl.int32)
        score = tl.zeros((BLOCK_U,), tl.float32)
        rest = tl.zeros((BLOCK_U,), tl.float32) + 1.0
        count, anchor_children, anchor_rest = 0, 0, 1.0
    else:
        token = tl.load(words_ptr + lane)
        parent = tl.load(words_ptr + BLOCK_U + lane)
        depth = tl.load(words_ptr + 2 * BLOCK_U + lane)
        edge = tl.load(words_ptr + 3 * BLOCK_U + lane)
        children = tl.load(words_ptr + 4 * BLOCK_U + lane)
        end = tl.load(words_ptr + 5 * BLOCK_U + lane)
        score = tl.load(numbers_ptr + lane)
        rest = tl.load(numbers_ptr + BLOCK_U + lane)
        count = tl.load(counts_ptr + row * 2)
        anchor_children = tl.load(counts_ptr + row * 2 + 1)
        anchor_rest = tl.load(rest_ptr + row)
        for number in range(LEADERS):
            leader = tl.load(leader_nodes_ptr + number)
            taken = 0
            leader_token = tl.load(ahead_ptr + number * MATCH)
            # Entries of the text by class, then those of the table.
            for entry in range((CLASSES - 1) * SCANNED + FROZEN):
                kind = CLASSES - 1 - entry // SCANNED
                slot = entry % SCANNED
                of_text = kind > 0
                found = tl.where(
                    of_text, slot < tl.load(place_counts_ptr + number * CLASSES + tl.maximum(kind, 1)), False
                )
                packed = tl.load(
                    places_ptr + (number * CLASSES + tl.maximum(kind, 1)) * SCANNED + slot, mask=found, other=0
                )
                place, agree = packed // 16, packed % 16
                table_row = entry - (CLASSES - 1) * SCANNED
                if FROZEN > 0:
                    found = found | ((kind <= 0) & (leader_token >= 0) & (leader_token < frozen_size))
                if found & (leader != _NO_LEADER) & (taken < FOLLOWERS):
                    node, is_new, k = leader, 0, 0
                    reach = tl.minimum(LENGTH, 1 + 2 * agree) if BY_MATCH else LENGTH
                    length = tl.where(of_text, reach, FROZEN_LENGTH)
                    while k < length:
                        label = tl.load(
                            text_ptr + place + 1 + k, mask=of_text & (place + 1 + k < text_length), other=_NO_TOKEN
                        )
                        if FROZEN > 0:
                            common = tl.load(
                                frozen_ptr + (leader_token.to(tl.int64) * FROZEN + table_row) * FROZEN_LENGTH + k,
                                mask=kind <= 0, other=_NO_TOKEN,
                            )  # fmt: skip
                            label = tl.where(of_text, label, common)
                        above = _at(depth, lane, node, 0)
                        child = tl.min(tl.where((parent == node) & (token == label), lane, count), axis=0)
                        goes_on = (label >= 0) & (above < max_depth) & (child < NODES)
                        if goes_on & (child == count):
                            num_children = _at(children, lane, node, anchor_children)
                            agreed = _class_of(tl.minimum(agree + k, MATCH)) if BY_MATCH else 1
                            own_kind = tl.where(of_text, agreed, 0)
                            own_edge = own_kind * RANKS + tl.minimum(num_children, RANKS - 1)
                            hazard = tl.load(hazards_ptr + own_edge)
                            own_score = hazard * _at(rest, lane, node, anchor_rest) * _at(score, lane, node, 1.0)
                            here, is_parent = lane == count, lane == node
                            token = tl.where(here, label, token)
                            parent = tl.where(here, node, parent)
                            depth = tl.where(here, above + 1, depth)
                            edge = tl.where(here, own_edge, edge)
                            score = tl.where(here, own_score, score)
                            children = tl.where(is_parent, children + 1, children)
                            rest = tl.where(is_parent, rest * (1 - hazard), rest)
                            anchor_children += tl.where(node < 0, 1, 0)
                            anchor_rest *= tl.where(node < 0, 1 - hazard, 1.0)
                            count += 1
                            is_new = 1
                        node = tl.where(goes_on, child, node)
                        k = tl.where(goes_on, k + 1, length)
                    is_end = (lane == node) & (node != leader) & (depth < max_depth) & (end == 0)
                    end = tl.where(is_end, 1, end)
                    taken += is_new

    if LAST:
        is_chain = 0
        if chain_only_ptr is not None:
            is_chain = tl.load(chain_only_ptr + row).to(tl.int32)
        out = row * (1 + N)
        lanes = best_nodes(
            token.to(tl.int64), parent, score, is_chain, tl.load(anchor_ptr + row), tree_tokens_ptr + out,
            tree_parents_ptr + out, tree_depths_ptr + out, tree_scores_ptr + out, tree_ancestors_ptr + out, 1.0,
            0.0, N, BLOCK_N, BLOCK_U,
        )  # fmt: skip
        tl.store(words_ptr + 3 * BLOCK_U + lane, edge)
        tl.debug_barrier()  # the edges of all lanes are written
        node_lane = tl.arange(0, BLOCK_N)
        kept = tl.load(words_ptr + 3 * BLOCK_U + tl.maximum(lanes, 0), mask=lanes >= 0, other=-1)
        tl.store(edges_ptr + out + 1 + node_lane, kept.to(tl.int64), mask=node_lane < N)
        tl.store(edges_ptr + out, -1)
    else:
        for number in range(LEADERS):
            if FIRST:
                has_leader = (number == 0) & (is_inert == 0) & (context_length > start)
                node = tl.where(has_leader, -1, _NO_LEADER)
            else:
                is_open = (end == 1) & (score > 0)
                best = tl.max(tl.where(is_open, score, 0.0), axis=0)
                node = tl.min(tl.where(is_open & (score == best), lane, BLOCK_U), axis=0)
                node = tl.where(node < BLOCK_U, node, _NO_LEADER)
                end = tl.where(lane == node, 2, end)
            tl.store(leader_nodes_ptr + number, node)
            at, behind = node, context_length - 1
            for k in range(MATCH):
                old = tl.load(context_ptr + behind, mask=behind >= start, other=before)
                tl.store(ahead_ptr + number * MATCH + k, _at(token, lane, at, old))
                behind -= tl.where(at < 0, 1, 0)
                at = _at(parent, lane, at, -1)
        tl.store(words_ptr + lane, token)
        tl.store(words_ptr + BLOCK_U + lane, parent)
        tl.store(words_ptr + 2 * BLOCK_U + lane, depth)
        tl.store(words_ptr + 3 * BLOCK_U + lane, edge)
        tl.store(words_ptr + 4 * BLOCK_U + lane, children)
        tl.store(words_ptr + 5 * BLOCK_U + lane, end)
        tl.store(numbers_ptr + lane, score)
        tl.store(numbers_ptr + BLOCK_U + lane, rest)
        tl.store(counts_ptr + row * 2, count)
        tl.store(counts_ptr + row * 2 + 1, anchor_children)
        tl.store(rest_ptr + row, anchor_rest)
