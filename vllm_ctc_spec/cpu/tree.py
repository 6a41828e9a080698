"""Tree attention and compaction on a CPU, where the paged cache has a layout of its own.

vLLM's CPU kernels take no mask, and keep the keys of a block transposed: `[num_kv_heads, head_size, block_size]`
(float32 on x86: instruction sets "vec" and "vec16"); values lie in rows. `check_layout` writes keys and looks.
"""

from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_ctc_spec.tree.compaction import PathCompaction
from vllm_ctc_spec.tree.state import TreeStep
from vllm_ctc_spec.tree.support import refused


def attend_tree_rows(
    implementation: Any,
    step: TreeStep,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
) -> None:
    """As `vllm_ctc_spec.tree.attention.attend_tree_rows`, a request at a time and a block at a time: no copy of keys
    or values, four small products for a context of two blocks."""
    layer.ctc_rows = key, value  # what compaction moves
    keys, values = views(kv_cache)
    num_kv_heads, head_size, block_size = keys.shape[1:]
    if getattr(attn_metadata, "ctc_requests", None) is None:  # the first layer of a step prepares for all of them
        attn_metadata.ctc_requests = _requests(step, attn_metadata, block_size, implementation.num_queries_per_kv)
    for root, num_rows, spans, bias in attn_metadata.ctc_requests:
        rows = slice(root, root + num_rows)
        heads = query[rows].view(num_rows, num_kv_heads, -1, head_size).transpose(0, 1)
        q = heads.reshape(num_kv_heads, -1, head_size) * implementation.scale  # [Hkv, rows * group, d]
        scores = torch.cat([torch.bmm(q, keys[block, :, :, : stop - start]) for block, start, stop in spans], 2)
        scores[:, :, -num_rows:].add_(bias)
        weights = torch.softmax(scores, 2)
        out = None
        for block, start, stop in spans:
            part = torch.bmm(weights[:, :, start:stop], values[block, :, : stop - start])
            out = part if out is None else out.add_(part)
        output[rows] = out.view(num_kv_heads, num_rows, -1, head_size).transpose(0, 1).flatten(1, 2)


def _requests(step: TreeStep, attn_metadata: Any, block_size: int, group: int) -> list[tuple]:
    """Row of the anchor, tree rows, spans (block, first position, position behind the last) and bias
    [rows * group, rows] of each request with a tree."""
    requests = []
    rows = zip(step.roots.tolist(), step.num_rows.tolist(), attn_metadata.seq_lens.tolist(), strict=False)
    for (root, num_rows, seq_len), blocks in zip(rows, attn_metadata.block_table.tolist(), strict=False):
        starts = range(0, seq_len, block_size)
        spans = [(block, start, min(start + block_size, seq_len)) for block, start in zip(blocks, starts, strict=False)]
        visible = visible_rows(step.ancestors[root : root + num_rows])
        bias = torch.where(visible, 0.0, -torch.inf).repeat_interleave(group, 0)
        requests.append((root, num_rows, spans, bias))
    return requests


def visible_rows(ancestors: torch.Tensor) -> torch.Tensor:
    """Ancestor sets [n] of the rows of one tree to [n, n] bool: which rows a row attends."""
    bits = torch.arange(ancestors.shape[0] - 1)
    seen = (ancestors[:, None] >> bits) & 1 == 1
    return torch.cat([seen.new_ones(len(ancestors), 1), seen], 1)


def check_layout(layer: Any) -> None:
    """Refuse a CPU whose kernels keep keys in another order than `attend_tree_rows` reads (DrafterConfigError)."""
    cache = layer.kv_cache[:1].clone()
    _, num_kv_heads, block_size, _ = cache.shape
    key, value = torch.randn(2, block_size, num_kv_heads, layer.head_size)
    layer.impl.do_kv_cache_update(layer, key, value, cache, torch.arange(block_size))
    keys, values = views(cache)
    if not (torch.equal(keys[0], key.permute(1, 2, 0)) and torch.equal(values[0], value.transpose(0, 1))):
        raise refused(f"the instruction set {layer.isa!r} of this CPU in vLLM")


def views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[num_blocks, num_kv_heads, block_size, 2 * head_size]` to keys `[num_blocks, num_kv_heads, head_size,
    block_size]` and values `[num_blocks, num_kv_heads, block_size, head_size]`."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    halves = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1)
    keys = halves[:, :, :block_size].view(num_blocks, num_kv_heads, -1, block_size)
    return keys, halves[:, :, block_size:]


class CpuPathCompaction(PathCompaction):
    """The accepted rows' keys and values, which this step's forward had in hand, are written again where they belong:
    by vLLM's own operation, which knows the layout."""

    def bind(self, kv_cache_config: KVCacheConfig) -> None:
        for layer in self.layers.values():
            check_layout(layer)
        self._group_ids = {
            name: group_id
            for group_id, group in enumerate(kv_cache_config.kv_cache_groups)
            for name in group.layer_names
            if name in self.layers and self.layers[name].kv_sharing_target_layer_name is None
        }

    def run(self, step: TreeStep) -> None:
        sources, targets = [], []
        roots = step.roots[: step.num_reqs].tolist()
        for root, count, path in zip(roots, step.num_sampled.tolist(), step.path.tolist(), strict=True):
            moved = [k for k in range(1, count) if path[k] != k]
            sources += [root + path[k] for k in moved]
            targets += [root + k for k in moved]
        if sources:
            for name, group_id in self._group_ids.items():
                layer = self.layers[name]
                key, value = layer.ctc_rows
                slots = step.slot_mappings[group_id][targets]
                layer.impl.do_kv_cache_update(layer, key[sources], value[sources], layer.kv_cache, slots)
