"""How far the kernels of verification (mask, layout, attention, walk, compaction) are from exact, at a shape."""

import random
from typing import NamedTuple

import torch

from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree, TreeRows
from vllm_ctc_spec.kernels.history_tree import CLASSES, RANKS, USUAL_GROWTH, Texts
from vllm_ctc_spec.kernels.history_tree.gpu import history_tree_triton
from vllm_ctc_spec.kernels.history_tree.reference import history_tree_reference
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv_reference, compact_kv_triton
from vllm_ctc_spec.kernels.tree_attention import tree_attention_triton
from vllm_ctc_spec.kernels.tree_layout import tree_layout_reference, tree_layout_triton
from vllm_ctc_spec.kernels.tree_mask import tree_mask_triton
from vllm_ctc_spec.kernels.tree_merge.gpu import tree_merge_triton
from vllm_ctc_spec.kernels.tree_merge.reference import tree_merge_reference
from vllm_ctc_spec.kernels.tree_walk import tree_walk_reference, tree_walk_triton

from ..oracle.trees import node_path, random_tree, starts, tree_tables
from .exact import Case

Error = tuple[float, float]  # what was found, and how much is right
BLOCK_SIZE, NEVER = 16, 7.5
CONTEXT = {"cuda": 3000, "cpu": 40}  # the longest one before a tree
HEADS = {"cuda": (2, 4, 128), "cpu": (1, 2, 16)}  # KV heads, query heads of each, size
ATTENTION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Forest(NamedTuple):
    """A tree a request; of each the first `counts[b]` rows are scheduled, its anchor's included."""

    trees: list[list[int]]  # parents
    counts: list[int]
    parents: torch.Tensor  # [B, 1 + N] int32, as in `DraftTree`
    depths: torch.Tensor  # [B, 1 + N] int32
    ancestors: torch.Tensor  # [B, 1 + N] int64


def random_forest(case: Case) -> Forest:
    """The first tree is full and scheduled as a whole."""
    rng, nodes = random.Random(case.seed), case.shape.nodes
    trees = [random_tree(rng.randint(0, nodes) if row else nodes, rng) for row in range(case.shape.batch)]
    counts = [rng.randint(0, len(tree)) if row else len(tree) for row, tree in enumerate(trees)]
    return Forest(trees, counts, *tree_tables(trees, 1 + nodes))


def differences(found: list[torch.Tensor] | tuple[torch.Tensor, ...], expected: list | tuple) -> int:
    return sum(int((a.cpu() != b).sum()) for a, b in zip(found, expected, strict=True))


def mask_error(case: Case) -> Error:
    forest = random_forest(case)
    return differences(tree_mask_triton(forest.parents.to(case.device)), [forest.depths, forest.ancestors]), 0.0


def layout_error(case: Case) -> Error:
    """Prompts before the trees, and room behind that a CUDA graph would pad."""
    forest, draw = random_forest(case), case.generator()
    num_requests, room = len(forest.counts), 37
    prompts = torch.randint(0, 4, (num_requests,), generator=draw).tolist()
    query_start = starts([prompt + count for prompt, count in zip(prompts, forest.counts)])
    total = int(query_start[-1])
    positions = torch.randint(10_000, (total,), generator=draw)
    slots = torch.randperm(num_requests, generator=draw).int()
    of_slot = slots.long().argsort()
    inputs = positions, query_start, starts(forest.counts), slots, forest.depths[of_slot], forest.ancestors[of_slot]
    results = []
    for run, device in ((tree_layout_reference, "cpu"), (tree_layout_triton, case.device)):
        positions_found, ancestors = (torch.full((total + room,), 12345, device=device) for _ in range(2))
        of_requests = (torch.full((num_requests + room,), 12345, dtype=torch.int32, device=device) for _ in range(2))
        rows = TreeRows(*of_requests, ancestors)
        run(*(x.to(device) for x in inputs), positions_found, rows)
        results.append([positions_found, *rows])
    expected, found = results
    return differences(found, expected), 0.0


def walk_error(case: Case) -> Error:
    """Few tokens, so that the target often draws one of the children; children of a node differ."""
    forest, drafts = random_forest(case), []
    for tree, count in zip(forest.trees, forest.counts):
        children: dict[int, int] = {}
        for parent in tree:
            children[parent] = children.get(parent, -1) + 1
            drafts.append(children[parent])
        del drafts[len(drafts) - len(tree) + count :]
    draft = torch.tensor(drafts)
    target = torch.randint(0, 3, draft.shape, generator=case.generator())
    slots = torch.arange(len(forest.counts), dtype=torch.int32)
    inputs = target, draft, forest.parents, slots, starts(forest.counts)
    loose = torch.rand(draft.shape, generator=case.generator()) < 0.3
    found, expected = [], []
    for tensors in (inputs, (*inputs, loose)):
        found += tree_walk_triton(*(x.to(case.device) for x in tensors))
        expected += tree_walk_reference(*tensors)
    return differences(found, expected), 0.0


def tree_error(found: DraftTree, expected: DraftTree) -> float:
    """How far scores are off, and 1 for everything else that differs."""
    off = (found.scores.cpu() - expected.scores).nan_to_num(0.0, posinf=1.0).abs().max().item()
    names = [name for name in DTYPES if name != "scores"]
    pairs = [getattr(found, name) for name in names], [getattr(expected, name) for name in names]
    return off + differences(*pairs) + int((found.scores.cpu().isinf() != expected.scores.isinf()).sum())


def merge_error(case: Case) -> Error:
    """Trees of few tokens, so that many nodes are in both."""
    draw, forests = case.generator(), [random_forest(case._replace(seed=case.seed + s)) for s in range(2)]
    tokens, scores = [], []
    for forest in forests:
        tokens.append(torch.zeros_like(forest.ancestors))
        scores.append(torch.full(tokens[-1].shape, -torch.inf))
        for row, tree in enumerate(forest.trees):
            scores[-1][row, 0] = 0
            for node in range(1, len(tree)):
                tokens[-1][row, node] = tree[:node].count(tree[node])
                scores[-1][row, node] = scores[-1][row, tree[node]] - torch.rand((), generator=draw)
    parents = torch.stack([forest.parents for forest in forests], 1)
    log_weights = torch.randn(len(parents), 2, generator=draw).log_softmax(1)
    inputs = torch.stack(tokens, 1), parents, torch.stack(scores, 1), log_weights
    found, expected = tree_merge_triton(*(x.to(case.device) for x in inputs)), tree_merge_reference(*inputs)
    used = expected.tree.parents >= 0
    return tree_error(found.tree, expected.tree) + differences([found.rows.cpu()[used]], [expected.rows[used]]), 1e-4


def history_error(case: Case) -> Error:
    """Texts of few tokens, of many lengths, beyond one block of the scan on a GPU; the last request is inert."""
    draw, batch = case.generator(), min(case.shape.batch, 6)
    longest, num_tokens = (3000, 40) if case.device == "cuda" else (60, 6)
    text = torch.randint(0, num_tokens, (batch, longest), generator=draw, dtype=torch.int32)
    lengths = torch.randint(longest // 2, longest + 1, (batch,), generator=draw, dtype=torch.int32)
    requests, anchor = torch.arange(batch), torch.randint(0, num_tokens, (batch,), generator=draw)
    requests[-1] = -1
    hazards = 0.05 + 0.9 * torch.rand(CLASSES, RANKS, generator=draw)
    numbers = case.shape.nodes, case.shape.nodes, None, None, USUAL_GROWTH
    expected = history_tree_reference(Texts(text, lengths, text, lengths), requests, anchor, hazards, *numbers)
    text, lengths = text.to(case.device), lengths.to(case.device)
    inputs = (x.to(case.device) for x in (requests, anchor, hazards))
    found = history_tree_triton(Texts(text, lengths, text, lengths), *inputs, *numbers)
    return tree_error(found.tree, expected.tree) + differences([found.edges], [expected.edges]), 1e-4


def compaction_error(case: Case) -> Error:
    """All of the caches is compared, so that an entry that must stay is seen as well."""
    forest, draw = random_forest(case), case.generator()
    first = starts(forest.counts)
    blocks = -(-int(first[-1]) // BLOCK_SIZE) + 1
    caches = [torch.randn(blocks, 2, BLOCK_SIZE, 48, generator=draw).to(case.dtype) for _ in range(3)]
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=draw)[: int(first[-1])]
    path, num_sampled = torch.arange(forest.parents.shape[1]).repeat(len(forest.counts), 1).int(), []
    for row, (tree, count) in enumerate(zip(forest.trees, forest.counts)):
        longest = max((node_path(tree, node) for node in range(count)), key=len, default=[])
        nodes = [0, *longest][:count]
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
        num_sampled.append(len(nodes))
    step = slots, first[:-1], path, torch.tensor(num_sampled, dtype=torch.int32)
    moved = [cache.clone().to(case.device) for cache in caches]
    compact_kv_triton(CachePointers(moved), *(x.to(case.device) for x in step))
    compact_kv_reference(CachePointers(caches), *step)
    return differences(moved, caches), 0.0


def attention_error(case: Case) -> Error:
    """Grouped heads, contexts of all lengths; whatever may not be read is NaN, and what may not be written stays."""
    few = case.shape._replace(batch=min(case.shape.batch, 6))
    forest, draw = random_forest(case._replace(shape=few)), case.generator()
    counts, (kv_heads, group, size), longest = forest.counts, HEADS[case.device], CONTEXT[case.device]
    contexts = [0, *torch.randint(longest, (len(counts) - 1,), generator=draw).tolist()]
    per_request = -(-(longest + forest.parents.shape[1]) // BLOCK_SIZE)
    table = torch.randperm(len(counts) * per_request, generator=draw).int().view(len(counts), -1)
    entries = torch.full((2, table.numel(), BLOCK_SIZE, kv_heads, size), torch.nan)
    for row, (context, count) in enumerate(zip(contexts, counts)):
        for position in range(context + count):
            block, offset = table[row, position // BLOCK_SIZE], position % BLOCK_SIZE
            entries[:, block, offset] = torch.randn(2, kv_heads, size, generator=draw)
    first, total = starts(counts), sum(counts)
    query = torch.randn(total + 2, kv_heads * group, size, generator=draw).to(case.dtype)
    entries = entries.to(case.dtype)
    scheduled = [forest.ancestors[row, :count] for row, count in enumerate(counts)]
    output = torch.full_like(query, NEVER).to(case.device)
    seq_lens = torch.tensor([a + b for a, b in zip(contexts, counts)], dtype=torch.int32)
    rows = TreeRows(
        first[:-1], torch.tensor(counts, dtype=torch.int32), torch.cat([*scheduled, torch.zeros(2, dtype=torch.int64)])
    )
    tree_attention_triton(
        query.to(case.device), *entries.to(case.device).unbind(0), output, table.to(case.device),
        seq_lens.to(case.device), TreeRows(*(x.to(case.device) for x in rows)), size**-0.5, forest.parents.shape[1],
    )  # fmt: skip
    exact = torch.full(query.shape, NEVER, dtype=torch.float64)
    for row, (context, count) in enumerate(zip(contexts, counts)):
        positions = torch.arange(context + count)
        blocks, offsets = table[row, positions // BLOCK_SIZE].long(), positions % BLOCK_SIZE
        keys, values = entries[:, blocks, offsets].double()  # [positions, Hkv, d]
        for node in range(count):
            seen = [*range(context + 1), *(context + other for other in node_path(forest.trees[row], node))]
            q = query[first[row] + node].double().view(kv_heads, group, size)
            weights = torch.softmax(torch.einsum("hgd,shd->hgs", q, keys[seen]) * size**-0.5, -1)
            exact[first[row] + node] = torch.einsum("hgs,shd->hgd", weights, values[seen]).flatten(0, 1)
    return (output.cpu() - exact).abs().max().item(), ATTENTION[case.dtype]


CHECKS = {
    "tree_mask": mask_error,
    "tree_layout": layout_error,
    "tree_attention": attention_error,
    "tree_walk": walk_error,
    "tree_merge": merge_error,
    "history_tree": history_error,
    "kv_compaction": compaction_error,
}
