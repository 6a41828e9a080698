"""Attention of the rows of draft trees over a paged KV cache."""

import torch

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_attention.gpu import tree_attention_triton
from vllm_ctc_spec.kernels.tree_attention.reference import tree_attention_reference


def tree_attention(
    query: torch.Tensor,  # [num_tokens, Hq, d] fp16, bf16 or fp32
    key_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, d]
    value_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, d]
    output: torch.Tensor,  # [num_tokens, Hq, d], written
    block_table: torch.Tensor,  # [R, max_blocks] int32
    seq_lens: torch.Tensor,  # [R] int32
    rows: TreeRows,
    scale: float,
    max_rows: int,
) -> None:
    """Node `i` of a tree sees the context, the anchor, and the nodes on its own path, itself included. Its key and
    value already stand in the cache at position `a + i`; the anchor's is `a = seq_lens[r] - num_rows[r]`:

        row = anchor_rows[r] + i
        visible(i) = {j : 0 <= j <= a} + {a + m : m >= 1, bit m - 1 of ancestors[row] is set}
        output[row, h] = sum_j softmax_j(scale * query[row, h] . key[j, h // G]) value[j, h // G]

    with `j` over visible(i) and `G = Hq / Hkv`. Position `j` lies in block `block_table[r, j // block_size]` at
    `j % block_size`. A tree that is a chain gives causal attention, and num_rows = 1 plain decoding.

    Arguments:
        query, output: [num_tokens, Hq, d], contiguous in d. Only rows of trees are written.
        key_cache, value_cache: [num_blocks, block_size, Hkv, d] views of one dtype with `query`, any strides with d
            contiguous, block_size a power of two. Nothing past `seq_lens[r]` is read.
        block_table: [R, max_blocks] int32, contiguous in max_blocks.
        seq_lens: [R] int32.
        rows: `TreeRows`. A request with num_rows = 0 is skipped.
        max_rows: at most 65; no request has more rows. How much is launched follows from it: a tight one is fast.

    Why custom: attention of vLLM knows one causal order for the rows of a request. Here siblings must not see each
    other, and every request has its own tree, in one 64-bit word for each row. A tree is short and its context long:
    one pass reads keys and values of a KV head once for all rows and all G query heads of a tile, and only the last
    positions look at the mask. The context is split over programs (flash-decoding) where the batch alone does not
    fill the GPU. How often is decided by shapes, so that a CUDA graph can hold the launches.
    """
    run = tree_attention_triton if query.is_cuda else tree_attention_reference
    run(query, key_cache, value_cache, output, block_table, seq_lens, rows, scale, max_rows)
