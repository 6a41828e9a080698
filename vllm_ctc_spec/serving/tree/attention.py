"""Attention of a tree's rows, on the target's layers only: a subclass of each layer's own implementation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_attention import tree_attention
from vllm_ctc_spec.serving.tree.layout import Attend, TreeLayout

AttendTreeRows = Callable[..., None]
"""f(implementation, layout, query, kv_cache, attn_metadata, output): writes the tree rows of `output`.

query, output [num_tokens, num_heads, head_size]; kv_cache [num_blocks, num_kv_heads, block_size, 2 * head_size], which
holds the keys and values of all rows already."""


def use_tree_attention(layers: Iterable[Attention], attend_tree_rows: AttendTreeRows, layout: TreeLayout) -> None:
    """Give each layer's implementation a subclass of its class; the layer, its backend and its attention group stay
    vLLM's. `__class__` may be assigned only a subclass with a single base and without new slots."""
    classes: dict[type, type] = {}
    for layer in layers:
        stock = type(layer.impl)
        if stock not in classes:
            classes[stock] = _with_trees(stock, attend_tree_rows, layout)
        layer.impl.__class__ = classes[stock]


def _with_trees(stock: type, attend_tree_rows: AttendTreeRows, layout: TreeLayout) -> type:
    class TreeAttention(stock):  # type: ignore[misc, valid-type]
        """Rows of trees are ours, all others are the stock implementation's.

        In a batch with other rows the stock implementation runs for all of them first, and tree rows are overwritten:
        its metadata describe the whole batch. Batches with prefill are not what drafting speeds up.
        """

        def forward(
            self,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            attend = Attend.NO_ROWS if attn_metadata is None else layout.attend
            if attend is not Attend.ALL_ROWS:
                super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            if attend is not Attend.NO_ROWS:
                attend_tree_rows(self, layout, query, kv_cache, attn_metadata, output)
            return output

        def fused_output_quant_supported(self, quant_key: Any) -> bool:
            return False

    TreeAttention.__name__ = TreeAttention.__qualname__ = f"Tree{stock.__name__}"
    return TreeAttention


def attend_tree_rows(
    implementation: Any,
    layout: TreeLayout,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
) -> None:
    """On a GPU, for the caches of vLLM's FLASH_ATTN and TRITON_ATTN."""
    keys, values = kv_cache.transpose(1, 2).split(implementation.head_size, dim=-1)
    num_reqs = attn_metadata.seq_lens.shape[0]  # with a CUDA graph's padding
    tree_attention(
        query,
        keys,
        values,
        output,
        attn_metadata.block_table,
        attn_metadata.seq_lens,
        TreeRows(layout.anchor_rows[:num_reqs], layout.num_rows[:num_reqs], layout.ancestors),
        implementation.scale,
        layout.max_rows,
    )
