"""The kernels of verification: masks, layout, attention, walk, compaction."""

import random
from typing import Any

import torch

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv_reference, compact_kv_triton
from vllm_ctc_spec.kernels.tree_attention import tree_attention_triton
from vllm_ctc_spec.kernels.tree_layout import tree_layout_reference, tree_layout_triton
from vllm_ctc_spec.kernels.tree_mask import tree_mask_triton
from vllm_ctc_spec.kernels.tree_walk import tree_walk_reference, tree_walk_triton

BLOCK_SIZE, NEVER = 16, 7.5
SMALL_CONTEXT, CONTEXT = 40, 3000  # the longest one before a tree
ATTENTION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random_forest(case: Any) -> tuple[torch.Tensor, list[int]]:
    """Parents [B, 1 + N] as in `DraftTree`, and the rows of each request that are scheduled, its anchor included."""
    rng = random.Random(case.generator.initial_seed())
    width = 1 + case.shape.nodes
    parents, counts = torch.full((case.shape.batch, width), -1, dtype=torch.int32), []
    for row in range(case.shape.batch):
        used = rng.randint(1, width) if row else width
        for node in range(1, used):
            parents[row, node] = rng.randrange(node) if row % 3 else node - 1  # every third is a chain
        counts.append(rng.randint(0, used) if row else width)
    return parents, counts


def paths_of(parents: list[int]) -> list[list[int]]:
    """The nodes from below the anchor to each node."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*paths[parent], node] if parent >= 0 else [])
    return paths


def bits_of(path: list[int]) -> int:
    word = sum(1 << (node - 1) for node in path)
    return word - 2**64 if word >= 2**63 else word


def tables_of(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths and ancestors, in Python's integers."""
    paths = [paths_of(row) for row in parents.tolist()]
    depths = torch.tensor([[len(path) for path in row] for row in paths], dtype=torch.int32)
    return depths, torch.tensor([[bits_of(path) for path in row] for row in paths])


def starts_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def mask_error(case: Any) -> tuple[float, float]:
    parents, _ = random_forest(case)
    found = tree_mask_triton(parents.to(case.device))
    return sum(int((a.cpu() != b).sum()) for a, b in zip(found, tables_of(parents))), 0.0


def layout_error(case: Any) -> tuple[float, float]:
    """Prompts before the trees, and room behind that a CUDA graph would pad."""
    parents, counts = random_forest(case)
    depths, ancestors = tables_of(parents)
    prompts = torch.randint(0, 4, (len(counts),), generator=case.generator).tolist()
    query_start = starts_of([prompt + count for prompt, count in zip(prompts, counts)])
    total, room = int(query_start[-1]), 37
    positions = torch.randint(10_000, (total,), generator=case.generator)
    slots = torch.randperm(len(counts), generator=case.generator).int()
    row_of_slot = slots.long().argsort()
    inputs = positions, query_start, starts_of(counts), slots, depths[row_of_slot], ancestors[row_of_slot]
    results = []
    for run, device in ((tree_layout_reference, torch.device("cpu")), (tree_layout_triton, case.device)):
        rows = [torch.full((total + room,), 12345, device=device) for _ in range(2)]
        requests = [torch.full((len(counts) + room,), 12345, dtype=torch.int32, device=device) for _ in range(2)]
        run(*(x.to(device) for x in inputs), rows[0], TreeRows(*requests, rows[1]))
        results.append([x.cpu() for x in (*rows, *requests)])
    return sum(int((a != b).sum()) for a, b in zip(*results)), 0.0


def walk_error(case: Any) -> tuple[float, float]:
    """Few tokens, so that the target often draws one of the children; children of a node differ."""
    parents, counts = random_forest(case)
    starts, width = starts_of(counts), parents.shape[1]
    drafts = torch.zeros(len(counts), width, dtype=torch.int64)
    for row, above in enumerate(parents.tolist()):
        children: dict[int, int] = {}
        for node, parent in enumerate(above):
            children[parent] = children.get(parent, -1) + 1
            drafts[row, node] = children[parent]
    draft = torch.cat([drafts[row, :count] for row, count in enumerate(counts)])
    target = torch.randint(0, 3, draft.shape, generator=case.generator)
    slots = torch.arange(len(counts), dtype=torch.int32)
    inputs = target, draft, parents, slots, starts
    expected, found = tree_walk_reference(*inputs), tree_walk_triton(*(x.to(case.device) for x in inputs))
    return sum(int((a.cpu() != b).sum()) for a, b in zip(found, expected)), 0.0


def compaction_error(case: Any) -> tuple[float, float]:
    """All of the caches is compared, so that an entry that must stay is seen as well."""
    parents, counts = random_forest(case)
    starts = starts_of(counts)
    blocks = -(-int(starts[-1]) // BLOCK_SIZE) + 1
    caches = [torch.randn(blocks, 2, BLOCK_SIZE, 48, generator=case.generator).to(case.dtype) for _ in range(3)]
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=case.generator)[: int(starts[-1])]
    path, num_sampled = torch.arange(parents.shape[1]).repeat(len(counts), 1).int(), []
    for row, count in enumerate(counts):
        nodes = [0, *max(paths_of(parents[row].tolist())[: max(count, 1)], key=len)][:count]
        path[row, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
        num_sampled.append(len(nodes))
    step = slots, starts[:-1], path, torch.tensor(num_sampled, dtype=torch.int32)
    moved = [cache.to(case.device) for cache in caches]
    if case.device.type == "cpu":
        moved = [cache.clone() for cache in caches]
    compact_kv_triton(CachePointers(moved), *(x.to(case.device) for x in step))
    compact_kv_reference(CachePointers(caches), *step)
    return sum(int((a.cpu() != b).sum()) for a, b in zip(moved, caches)), 0.0


def attention_error(case: Any) -> tuple[float, float]:
    """Grouped heads, contexts of all lengths; whatever may not be read is NaN, and what may not be written stays."""
    parents, counts = random_forest(case)
    counts, parents = counts[:6], parents[:6]
    kv_heads, group, size = (2, 4, 128) if case.device.type == "cuda" else (1, 2, 16)
    longest = CONTEXT if case.device.type == "cuda" else SMALL_CONTEXT
    contexts = [0, *torch.randint(longest, (len(counts) - 1,), generator=case.generator).tolist()]
    per_request = -(-(longest + parents.shape[1]) // BLOCK_SIZE)
    table = torch.randperm(len(counts) * per_request, generator=case.generator).int().view(len(counts), -1)
    entries = torch.full((2, table.numel(), BLOCK_SIZE, kv_heads, size), torch.nan)
    for row, (context, count) in enumerate(zip(contexts, counts)):
        for position in range(context + count):
            block, offset = table[row, position // BLOCK_SIZE], position % BLOCK_SIZE
            entries[:, block, offset] = torch.randn(2, kv_heads, size, generator=case.generator)
    starts, total = starts_of(counts), sum(counts)
    query = torch.randn(total + 2, kv_heads * group, size, generator=case.generator).to(case.dtype)
    entries = entries.to(case.dtype)
    _, ancestors = tables_of(parents)
    flat = torch.cat([ancestors[row, :count] for row, count in enumerate(counts)] + [torch.zeros(2, dtype=torch.int64)])
    seq_lens = torch.tensor([a + b for a, b in zip(contexts, counts)], dtype=torch.int32)
    rows = starts[:-1], torch.tensor(counts, dtype=torch.int32), flat
    output = torch.full_like(query, NEVER).to(case.device)
    tree_attention_triton(
        query.to(case.device), *entries.to(case.device).unbind(0), output, table.to(case.device),
        seq_lens.to(case.device), TreeRows(*(x.to(case.device) for x in rows)), size**-0.5, parents.shape[1],
    )  # fmt: skip
    exact = torch.full(query.shape, NEVER, dtype=torch.float64)
    for row, (context, count) in enumerate(zip(contexts, counts)):
        paths = paths_of(parents[row].tolist())
        positions = torch.arange(context + count)
        blocks, offsets = table[row, positions // BLOCK_SIZE].long(), positions % BLOCK_SIZE
        keys, values = entries[:, blocks, offsets].double()  # [positions, Hkv, d]
        for node in range(count):
            seen = [*range(context + 1), *(context + other for other in paths[node])]
            q = query[starts[row] + node].double().view(kv_heads, group, size)
            weights = torch.softmax(torch.einsum("hgd,shd->hgs", q, keys[seen]) * size**-0.5, -1)
            exact[starts[row] + node] = torch.einsum("hgs,shd->hgd", weights, values[seen]).flatten(0, 1)
    return (output.cpu() - exact).abs().max().item(), ATTENTION[case.dtype]


CHECKS = {
    "tree_mask": mask_error,
    "tree_layout": layout_error,
    "tree_attention": attention_error,
    "tree_walk": walk_error,
    "kv_compaction": compaction_error,
}
