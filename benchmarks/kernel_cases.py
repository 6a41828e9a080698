"""Inputs of every kernel at a shape, its reference, and the least number of bytes that it must read and write.

The formula at each case counts every input and every output once. On shapes that fit into a cache, a kernel may
therefore be faster than memory allows.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from vllm_ctc_spec.draft.ctc import SAMPLED_WIDTH, default_width
from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels.best_tokens import best_tokens, best_tokens_reference
from vllm_ctc_spec.kernels.collapse import collapse, collapse_reference
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, DraftTree, Frames, TreeRows
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform, ctc_transform_reference
from vllm_ctc_spec.kernels.frame_stats import TILE, frame_stats, frame_stats_reference
from vllm_ctc_spec.kernels.history_tree import CLASSES, RANKS, Texts, history_tree
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv
from vllm_ctc_spec.kernels.prefix_chain import prefix_chain
from vllm_ctc_spec.kernels.prefix_search import greedy_chain, prefix_search
from vllm_ctc_spec.kernels.tree_attention import tree_attention, tree_attention_reference
from vllm_ctc_spec.kernels.tree_layout import tree_layout, tree_layout_reference
from vllm_ctc_spec.kernels.tree_mask import tree_mask, tree_mask_reference
from vllm_ctc_spec.kernels.tree_merge import tree_merge
from vllm_ctc_spec.kernels.tree_walk import tree_walk, tree_walk_reference

RANK = 64  # of the label-conditional head
BLOCK_SIZE = 16
TREE_BYTES = 8 + 4 + 4 + 4 + 8  # a row of a DraftTree
LARGEST_ON_HOST = 2**26  # logits; a search of more of them on the host takes seconds


class Shape(NamedTuple):
    vocabulary: int  # V
    frames: int  # T
    batch: int  # B
    nodes: int  # N, of a tree; a chain has at most T labels

    def __str__(self) -> str:
        return f"V {self.vocabulary}, T {self.frames}, B {self.batch}, N {self.nodes}"


class Model(NamedTuple):
    """The shape of the target, as far as trees depend on it."""

    context: int  # positions before the root of each request
    heads: int
    kv_heads: int
    head_size: int
    layers: int


SERVED = Model(context=1024, heads=32, kv_heads=8, head_size=128, layers=32)
SMALL = Model(context=128, heads=4, kv_heads=2, head_size=32, layers=4)


class Case(NamedTuple):
    name: str
    least_bytes: int
    run: Callable[[], object]
    reference: Callable[[], object] | None = None  # None where the reference itself runs on this device, or nowhere
    on_host: bool = False  # the reference runs on a CPU, with its inputs there already


class LabelBias:
    """Row `last` of the head's bias `[V, V]`, which is too large to keep."""

    def __init__(self, markov: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.w_in, self.w_out = (w.float() for w in markov)

    def __getitem__(self, last: int) -> torch.Tensor:
        return self.w_out @ self.w_in[last]


def cases(shape: Shape, model: Model, device: torch.device) -> list[Case]:
    """One case or more for each kernel."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        *frame_cases(shape, dtype, device), *tree_cases(shape, model, dtype, device), *source_cases(shape, device),
    ]  # fmt: skip


def frame_cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """From logits to labels or a tree."""
    (v, t, b, n), e, on_gpu = shape, dtype.itemsize, device.type == "cuda"
    logits = (torch.randn(b, t, v, device=device) * 3).to(dtype)
    odds = torch.randn(b, t, device=device)
    anchor = torch.randint(v, (b,), device=device)
    frames = Frames(
        logits=logits,
        log_scale=torch.nn.functional.logsigmoid(-odds) - frame_stats(logits)[0],
        log_blank=torch.nn.functional.logsigmoid(odds),
        anchor=anchor,
        markov=tuple((torch.randn(v, RANK, device=device) * 0.1).to(dtype) for _ in range(2)),
    )
    alignment = torch.randint(v + 1, (b, t), device=device)
    labels = min(n, t)
    sampling = ChainSampling(
        temperature=torch.ones(b, device=device),
        seeds=torch.arange(b, device=device),
        positions=torch.arange(b, device=device),
        requests=torch.arange(b, device=device),
        draft_logits=torch.empty(b, labels, v, device=device),
    )
    small = 8 * b * t + 8 * b  # log_scale, log_blank, anchor
    head = 2 * RANK * e * b * n  # the rows of W_in and W_out at the nodes at least
    tree = small + e * b * t * v + TREE_BYTES * b * (1 + n)
    budget, width = Budget(n, default_width(n), min(8, t)), min(default_width(n), v)
    oracle = None if on_gpu else partial(oracle_chains, frames, labels)
    search_reference = partial(oracle_trees, frames, budget)
    if on_gpu:
        search_reference = None
        if logits.numel() <= LARGEST_ON_HOST:
            search_reference = partial(prefix_search, frames.to("cpu"), budget)
    return [
        Case(
            "collapse", 8 * b * t + 8 * b + 8 * b * labels + 4 * b,  # alignment, anchor; labels, lengths
            partial(collapse, alignment, v, anchor, labels),
            partial(collapse_reference, alignment, v, anchor, labels) if on_gpu else None,
        ),
        Case(
            "frame_stats", e * b * t * v + 16 * b * t,  # logits; logsumexp, best, best_logit
            partial(frame_stats, logits), partial(frame_stats_reference, logits) if on_gpu else None,
        ),
        Case(
            "best_tokens", e * b * t * v / TILE + 8 * b * t * width,  # the best logits of the tiles; tokens
            partial(best_tokens, logits, width, frame_stats(logits).tile_best),
            partial(best_tokens_reference, logits, width) if on_gpu else None,
        ),
        Case(
            "prefix_search, chain", tree + head,  # the search of a tree of as many nodes
            partial(greedy_chain, frames, labels, default_width(labels)), oracle,
        ),
        Case(
            "prefix_chain", tree + head + 4 * labels * b * v,  # and draft_logits
            partial(prefix_chain, frames, labels, SAMPLED_WIDTH, sampling), None,
        ),
        Case(
            "prefix_search", tree + head,  # logits once, for the candidates; the tree
            partial(prefix_search, frames, budget), search_reference, on_host=on_gpu,
        ),
        Case(
            "ctc_transform", tree,
            partial(ctc_transform, frames, budget),
            partial(ctc_transform_reference, frames, budget) if on_gpu else None,
        ),
    ]  # fmt: skip


def oracle_chains(frames: Frames, num_labels: int) -> None:
    """oracle.py, request by request."""
    for log_probs, anchor in oracle_rows(frames):
        oracle.chain(log_probs, num_labels, label_bias=LabelBias(frames.markov), anchor=anchor)


def oracle_trees(frames: Frames, budget: Budget) -> None:
    for log_probs, anchor in oracle_rows(frames):
        bias = LabelBias(frames.markov)
        oracle.best_prefixes(log_probs, budget.nodes, depth=budget.depth, label_bias=bias, anchor=anchor)


def oracle_rows(frames: Frames) -> list:
    log_label = frames.logits.float() + frames.log_scale[..., None]
    return list(zip(torch.cat([log_label, frames.log_blank[..., None]], -1), frames.anchor.tolist()))


def tree_cases(shape: Shape, model: Model, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Verification of complete binary trees; the target accepts their leftmost path."""
    b, n, e, on_gpu = shape.batch, shape.nodes, dtype.itemsize, device.type == "cuda"
    width, rows, host = 1 + n, b * (1 + n), torch.device("cpu")
    node = torch.arange(width)
    parents = torch.where(node > 0, (node - 1) // 2, -1).int().expand(b, -1).contiguous()
    depths, ancestors = tree_mask_reference(parents)
    requests = torch.arange(b, dtype=torch.int32)
    starts = torch.arange(b + 1, dtype=torch.int32) * width
    draft = node.repeat(b)
    target = torch.where(2 * node + 1 < width, 2 * node + 1, -1).repeat(b)
    _, num_sampled, path = tree_walk_reference(target, draft, parents, requests, starts)
    moves = int(((path != node) & (node < num_sampled[:, None])).sum())
    positions = torch.arange(rows)

    def layout(where: torch.device) -> tuple:
        inputs = [x.to(where) for x in (positions, starts, starts, requests, depths, ancestors)]
        of_requests = [torch.zeros(b, dtype=torch.int32, device=where) for _ in range(2)]
        of_rows = [torch.zeros(rows, dtype=torch.int64, device=where) for _ in range(2)]
        return *inputs, of_rows[0], TreeRows(*of_requests, of_rows[1])

    walk = target, draft, parents, requests, starts
    attention = attention_arguments(shape, model, dtype, device, ancestors)
    blocks = -(-width // BLOCK_SIZE)  # those of the tree: nothing else of a cache is looked at
    entry = model.kv_heads * 2 * model.head_size
    storage = [
        torch.zeros(b * blocks, model.kv_heads, BLOCK_SIZE, 2 * model.head_size, dtype=dtype, device=device)
        for _ in range(model.layers)
    ]
    caches = CachePointers(storage)
    slot_mapping = (torch.arange(b)[:, None] * blocks * BLOCK_SIZE + node).flatten()
    move = [x.to(device) for x in (slot_mapping, starts[:-1].contiguous(), path, num_sampled)]
    on_device = parents.to(device)
    return [
        Case(
            "tree_mask", 16 * rows,  # parents; depths, ancestors
            partial(tree_mask, on_device), partial(tree_mask_reference, on_device) if on_gpu else None,
        ),
        Case(
            # positions, depths, ancestors, starts twice, requests; positions, ancestors, anchor_rows, num_rows
            "tree_layout", (8 + 4 + 8 + 16) * rows + 20 * b + 8,
            partial(tree_layout, *layout(device)), partial(tree_layout_reference, *layout(host)) if on_gpu else None,
            on_host=True,
        ),
        Case(
            # keys and values; query, output; ancestors
            "tree_attention",
            e * b * (model.context + width) * entry + rows * (2 * e * model.heads * model.head_size + 8),
            partial(tree_attention, **attention), partial(tree_attention_reference, **attention) if on_gpu else None,
        ),
        Case(
            # tokens of target and draft, parents, requests, starts; sampled, path, num_sampled
            "tree_walk", (8 + 8 + 4 + 8 + 4) * rows + 12 * b + 4,
            partial(tree_walk, *(x.to(device) for x in walk)),
            partial(tree_walk_reference, *walk) if on_gpu else None, on_host=True,
        ),
        Case(
            # every moved entry read and written, in all layers; slots, path, anchor_rows, num_sampled
            "kv_compaction", 2 * moves * model.layers * entry * e + 16 * moves + 4 * moves + 8 * b,
            partial(compact, storage, caches, *move), partial(compact_in_torch, storage, *move) if on_gpu else None,
        ),
    ]  # fmt: skip


def source_cases(shape: Shape, device: torch.device) -> list[Case]:
    """Two full trees, half of which is common, become one; a tree of what followed in a text of 2048 tokens that the
    last token of each request is found in once in 64."""
    b, n = shape.batch, shape.nodes
    node = torch.arange(1 + n, device=device).expand(b, -1)
    parents = torch.where(node > 0, (node - 1) // 2, -1).int()
    zeros = torch.zeros_like(parents)
    trees = [
        DraftTree(torch.where(node > n // 2, node + s * n, node), parents, zeros, -node.float(), zeros.long())
        for s in range(2)
    ]
    log_weights = torch.full((b, 2), 0.5, device=device).log()
    text = torch.randint(0, 64, (b, 2048), dtype=torch.int32, device=device)
    lengths, requests = torch.full((b,), 2048, dtype=torch.int32, device=device), torch.arange(b, device=device)
    hazards = torch.full((CLASSES, RANKS), 0.3, device=device)
    history = Texts(text, lengths, text, lengths), requests, requests, hazards, n, n
    return [
        # tokens, parents and scores of both; the tree, and where its nodes stand
        Case("tree_merge", b * (1 + n) * (2 * 16 + 28 + 16), partial(tree_merge, trees, log_weights)),
        # the text in each of three rounds, for one leader and then for four
        Case("history_tree", b * (9 * 4 * 2048 + (1 + n) * 36), partial(history_tree, *history)),
    ]


def attention_arguments(
    shape: Shape, model: Model, dtype: torch.dtype, device: torch.device, ancestors: torch.Tensor
) -> dict:
    b, width = shape.batch, 1 + shape.nodes
    blocks = -(-(model.context + width) // BLOCK_SIZE)
    cache = torch.randn(b * blocks, model.kv_heads, BLOCK_SIZE, 2 * model.head_size, device=device).to(dtype)
    keys, values = cache.transpose(1, 2).split(model.head_size, -1)
    query = torch.randn(b * width, model.heads, model.head_size, device=device).to(dtype)
    return {
        "query": query,
        "key_cache": keys,
        "value_cache": values,
        "output": torch.empty_like(query),
        "block_table": torch.arange(b * blocks, dtype=torch.int32, device=device).view(b, blocks),
        "seq_lens": torch.full((b,), model.context + width, dtype=torch.int32, device=device),
        "rows": TreeRows(
            anchor_rows=torch.arange(b, dtype=torch.int32, device=device) * width,
            num_rows=torch.full((b,), width, dtype=torch.int32, device=device),
            ancestors=ancestors.flatten().to(device),
        ),
        "scale": model.head_size**-0.5,
        "max_rows": width,
    }


def compact(storage: list[torch.Tensor], caches: CachePointers, *step: torch.Tensor) -> None:
    """`storage` is an argument to stay alive: the pointers do not keep it."""
    compact_kv(caches, *step)


def compact_in_torch(
    storage: list[torch.Tensor],
    slot_mapping: torch.Tensor,
    anchor_rows: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    """The CPU's reference in torch: a gather and a scatter for each layer. The host must know the number of moves."""
    k = torch.arange(path.shape[1], device=path.device)
    request, place = ((path != k) & (k < num_sampled[:, None])).nonzero(as_tuple=True)
    source = slot_mapping[anchor_rows[request] + path[request, place]]
    target = slot_mapping[anchor_rows[request] + place]
    for cache in storage:
        entries = cache[source // BLOCK_SIZE, :, source % BLOCK_SIZE]
        cache[target // BLOCK_SIZE, :, target % BLOCK_SIZE] = entries
