"""The accepted path's keys and values move to the front of the rows that the tree took in the cache."""

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_ctc_spec.kernels.kv_compaction import compact_kv, group_equal
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict


class PathCompaction:
    """One launch over all of the target's layers that share a block table (a KV cache group) and have equal caches.

    Until it has run, the rows behind the anchor hold the tree. Nothing reads or hashes them before: vLLM's scheduler
    commits a request's blocks up to the tokens that it knows of, the anchor at most, and the next forward and the
    drafter are enqueued later on the same stream.
    """

    def __init__(self, layers: dict[str, Attention]):
        self.layers = layers

    def bind(self, kv_cache_config: KVCacheConfig) -> None:
        """The cache tensors exist now."""
        self._launches = [
            (group_id, equal)
            for group_id, caches in self.caches_by_group(kv_cache_config).items()
            for equal in group_equal(caches)
        ]

    def caches_by_group(self, kv_cache_config: KVCacheConfig) -> dict[int, list[torch.Tensor]]:
        """The caches of the target's layers by KV cache group; layers that share a cache count once."""
        result = {}
        for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
            caches = [self.layers[name].kv_cache for name in group.layer_names if name in self.layers]
            distinct = {cache.data_ptr(): cache for cache in caches}
            if distinct:
                result[group_id] = list(distinct.values())
        return result

    def run(self, layout: TreeLayout, verdict: Verdict) -> None:
        anchor_rows = layout.anchor_rows[: len(verdict.path)]
        for group_id, caches in self._launches:
            compact_kv(caches, layout.slot_mappings[group_id], anchor_rows, *verdict)
