"""Tree attention and compaction on a CPU, where the paged cache has a layout of its own.

vLLM's CPU kernels take no mask, and keep the keys of a block transposed: `[num_kv_heads, head_size, block_size]`
(float32 on x86: instruction sets "vec" and "vec16"); values lie in rows. `check_layout` writes keys to verify this.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_ctc_spec.kernels.kv_compaction import moved_slots
from vllm_ctc_spec.serving.limits import refused_with_trees
from vllm_ctc_spec.serving.tree.compaction import PathCompaction
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict


class Rows(NamedTuple):
    """The tree rows of one request, with the values that all layers of a step share."""

    rows: slice
    blocks: list[tuple[int, int]]  # block of the cache, positions in it that hold something
    bias: list[torch.Tensor]  # by block [rows * group, positions]: 0, or -inf where a row may not look
    scores: torch.Tensor  # [Hkv, rows * group, positions of all blocks], scratch
    by_block: list[torch.Tensor]  # views of it


def attend_tree_rows(
    implementation: Any,
    layout: TreeLayout,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
) -> None:
    """As `serving.tree.attention.attend_tree_rows`, a request at a time and a block at a time: keys and values are read
    in place. The call of a torch operation costs as much as its work here, so layers share what they can."""
    keys, values = views(kv_cache)
    num_kv_heads, head_size, block_size = keys.shape[1:]
    group = implementation.num_queries_per_kv
    if getattr(attn_metadata, "ctc_rows", None) is None:  # the first layer of a step
        attn_metadata.ctc_rows = _tree_rows(layout, attn_metadata, block_size, num_kv_heads, group)
    for tree in attn_metadata.ctc_rows:
        num_rows = tree.rows.stop - tree.rows.start
        q = query[tree.rows].transpose(0, 1)  # [Hkv * group, rows, d]
        if group > 1:
            q = q.reshape(num_kv_heads, group * num_rows, head_size)
        for (block, width), bias, scores in zip(tree.blocks, tree.bias, tree.by_block, strict=True):
            torch.baddbmm(bias, q, keys[block, :, :, :width], alpha=implementation.scale, out=scores)
        torch.softmax(tree.scores, 2, out=tree.scores)
        out = q.new_zeros(num_kv_heads, group * num_rows, head_size)
        for (block, width), weights in zip(tree.blocks, tree.by_block, strict=True):
            torch.baddbmm(out, weights, values[block, :, :width], out=out)
        output[tree.rows] = out.view(-1, num_rows, head_size).transpose(0, 1)


def _tree_rows(layout: TreeLayout, attn_metadata: Any, block_size: int, num_kv_heads: int, group: int) -> list[Rows]:
    result = []
    requests = zip(layout.anchor_rows.tolist(), layout.num_rows.tolist(), attn_metadata.seq_lens.tolist(), strict=False)
    for (anchor_row, num_rows, seq_len), table in zip(requests, attn_metadata.block_table.tolist(), strict=False):
        rows = slice(anchor_row, anchor_row + num_rows)
        widths = [min(block_size, seq_len - start) for start in range(0, seq_len, block_size)]
        bias = torch.zeros(num_rows, seq_len)
        visible = visible_rows(layout.ancestors[rows])
        bias[:, seq_len - num_rows :].masked_fill_(~visible, -torch.inf)
        bias = bias.repeat(group, 1)  # rows of one head of the group after those of another
        scores = bias.new_empty(num_kv_heads, group * num_rows, seq_len)
        blocks = list(zip(table, widths, strict=False))
        result.append(Rows(rows, blocks, list(bias.split(widths, 1)), scores, scores.split(widths, 2)))
    return result


def visible_rows(ancestors: torch.Tensor) -> torch.Tensor:
    """Ancestor sets [n] of the rows of one tree to [n, n] bool: which rows a row attends."""
    bits = torch.arange(ancestors.shape[0] - 1)
    seen = (ancestors[:, None] >> bits) & 1 == 1
    return torch.cat([seen.new_ones(len(ancestors), 1), seen], 1)


def check_layout(layer: Any) -> None:
    """Refuse a CPU whose kernels keep keys in another order than `attend_tree_rows` reads (DrafterConfigError)."""
    cache = layer.kv_cache[:1].clone()
    _, num_kv_heads, block_size, _ = cache.shape
    size = (2, block_size, num_kv_heads, layer.head_size)
    key, value = torch.arange(np.prod(size), dtype=torch.float32).view(size)
    layer.impl.do_kv_cache_update(layer, key, value, cache, torch.arange(block_size))
    keys, values = views(cache)
    if not (torch.equal(keys[0], key.permute(1, 2, 0)) and torch.equal(values[0], value.transpose(0, 1))):
        raise refused_with_trees(f"the instruction set {layer.isa!r} of this CPU in vLLM")


def views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[num_blocks, num_kv_heads, block_size, 2 * head_size]` to keys `[num_blocks, num_kv_heads, head_size,
    block_size]` and values `[num_blocks, num_kv_heads, block_size, head_size]`."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1)
    keys = halves[:, :, :block_size].view(num_blocks, num_kv_heads, -1, block_size)
    return keys, halves[:, :, block_size:]


class CpuPathCompaction(PathCompaction):
    """The same moves in the CPU's layout, with numpy, whose calls cost a third of torch's."""

    def bind(self, kv_cache_config: KVCacheConfig) -> None:
        self._caches: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for layer in self.layers.values():
            check_layout(layer)
        for group_id, caches in self.caches_by_group(kv_cache_config).items():
            self._caches[group_id] = [tuple(half.numpy() for half in views(cache)) for cache in caches]

    def run(self, layout: TreeLayout, verdict: Verdict) -> None:
        anchor_rows = layout.anchor_rows[: len(verdict.path)]
        for group_id, caches in self._caches.items():
            targets, sources = moved_slots(layout.slot_mappings[group_id], anchor_rows, *verdict)
            if not targets.size:
                continue
            block_size = caches[0][1].shape[2]
            from_block, from_offset = np.divmod(sources, block_size)
            to_block, to_offset = np.divmod(targets, block_size)
            for keys, values in caches:  # all entries are read before any is written
                keys[to_block, :, :, to_offset] = keys[from_block, :, :, from_offset]
                values[to_block, :, to_offset] = values[from_block, :, from_offset]
