"""Attention of the rows of draft trees over a paged KV cache."""

import torch
import triton

from vllm_ctc_spec.kernels.tree_attention_split import attend_kernel, merge_kernel

# Enough programs for two on each multiprocessor of a Hopper GPU. More splits only add partial results.
_PROGRAMS = 264
_LEAST_POSITIONS = 256  # of the longest possible context, for each split


def tree_attention(
    query: torch.Tensor,  # [num_tokens, Hq, d] fp16, bf16 or fp32
    key_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, d]
    value_cache: torch.Tensor,  # [num_blocks, block_size, Hkv, d]
    output: torch.Tensor,  # [num_tokens, Hq, d], written
    block_table: torch.Tensor,  # [R, max_blocks] int32
    seq_lens: torch.Tensor,  # [R] int32
    roots: torch.Tensor,  # [R] int32
    num_rows: torch.Tensor,  # [R] int32
    ancestors: torch.Tensor,  # [num_tokens] int64
    scale: float,
    max_rows: int,
) -> None:
    """Row `roots[r] + i` is node `i` of the tree of request `r`, `i < num_rows[r]`, and its key and value already
    stand in the cache at position `root + i`, `root = seq_lens[r] - num_rows[r]`. The row sees the context, the root,
    and the nodes on its own path, itself included:

        visible(i) = {j : 0 <= j <= root} + {root + m : m >= 1, bit m - 1 of ancestors[roots[r] + i] is set}
        output[roots[r] + i, h] = sum_j softmax_j(scale * query[roots[r] + i, h] . key[j, h // G]) value[j, h // G]

    with `j` over visible(i) and `G = Hq / Hkv`. Position `j` lies in block `block_table[r, j // block_size]` at
    `j % block_size`. A tree that is a chain gives causal attention, and num_rows = 1 plain decoding.

    Arguments:
        query, output: [num_tokens, Hq, d], contiguous in d. Only rows of trees are written.
        key_cache, value_cache: [num_blocks, block_size, Hkv, d] views of one dtype with `query`, any strides with d
            contiguous, block_size a power of two. Nothing past `seq_lens[r]` is read.
        block_table: [R, max_blocks] int32, contiguous in max_blocks.
        seq_lens, roots, num_rows: [R] int32. A request with num_rows = 0 is skipped.
        ancestors: [num_tokens] int64, as in `DraftTree`.
        max_rows: at most 65; no request has more rows.

    Why custom: attention of vLLM knows one causal order for the rows of a request. Here siblings must not see each
    other, and every request has its own tree, in one 64-bit word for each row. A tree is short and its context long:
    one pass reads keys and values of a KV head once for all rows and all G query heads of a tile, and only the last
    positions look at the mask. The context is split over programs (flash-decoding) where the batch alone does not
    fill the GPU. How often is decided by shapes, so that a CUDA graph can hold the launches.
    """
    run = tree_attention_triton if query.is_cuda else tree_attention_reference
    run(
        query, key_cache, value_cache, output, block_table, seq_lens, roots, num_rows, ancestors, scale, max_rows
    )  # fmt: skip


def tree_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    roots: torch.Tensor,
    num_rows: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    max_rows: int,
) -> None:
    """Dense masked attention in fp32, one request after the other."""
    block_size = key_cache.shape[1]
    bits = torch.arange(max_rows - 1, device=query.device)
    is_grouped = query.shape[1] != key_cache.shape[2]
    requests = zip(seq_lens.tolist(), roots.tolist(), num_rows.tolist())
    for r, (seq_len, root, count) in enumerate(requests):
        if count == 0:
            continue
        blocks = block_table[r, : triton.cdiv(seq_len, block_size)]
        rows = slice(root, root + count)
        mask = None
        if count > 1:
            mask = torch.ones(count, seq_len, dtype=torch.bool, device=query.device)
            mask[:, seq_len - count + 1 :] = (ancestors[rows, None] >> bits[: count - 1]) & 1
        q, k, v = (
            entries.transpose(0, 1)[None].float()
            for entries in (
                query[rows],
                key_cache[blocks].flatten(0, 1)[:seq_len],
                value_cache[blocks].flatten(0, 1)[:seq_len],
            )
        )
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=is_grouped)
        output[rows] = seen[0].transpose(0, 1)


def tree_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    roots: torch.Tensor,
    num_rows: torch.Tensor,
    ancestors: torch.Tensor,
    scale: float,
    max_rows: int,
    num_splits: int | None = None,  # None: from the shapes
) -> None:
    tensors = (query, key_cache, value_cache, output, block_table)
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("tree_attention needs tensors that are contiguous in their last dimension")
    num_requests, max_blocks = block_table.shape
    _, num_heads, head_size = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    group = num_heads // num_kv_heads
    block_d = max(16, triton.next_power_of_2(head_size))
    capability = _compute_capability(query.device)
    block_m, block_n, num_warps = _tile(max_rows * group, block_d, query.element_size(), capability)
    num_tiles = triton.cdiv(max_rows * group, block_m)
    if num_splits is None:
        num_splits = _choose_splits(num_requests * num_kv_heads * num_tiles, max_blocks * block_size)
    partial, statistics = None, None
    if num_splits > 1:
        scratch = (num_requests, max_rows, num_heads, num_splits)
        partial = torch.empty(*scratch, head_size, dtype=torch.float32, device=query.device)
        statistics = torch.empty(*scratch, 2, dtype=torch.float32, device=query.device)
    attend_kernel[(num_requests, num_kv_heads, num_tiles * num_splits)](
        query, *query.stride()[:2], key_cache, *key_cache.stride()[:3], value_cache, *value_cache.stride()[:3],
        output, *output.stride()[:2], partial, statistics, block_table, block_table.stride(0),
        seq_lens, roots, num_rows, ancestors, scale, num_splits,
        MAX_ROWS=max_rows, GROUP=group, BLOCK_SIZE=block_size, D=head_size, BLOCK_D=block_d,
        BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=num_splits > 1, num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    if num_splits > 1:
        block_s = triton.next_power_of_2(num_splits)
        merge_kernel[(num_requests, max_rows, num_heads)](
            partial, statistics, output, *output.stride()[:2], roots, num_rows, num_splits,
            MAX_ROWS=max_rows, D=head_size, BLOCK_D=block_d, BLOCK_S=block_s, BLOCK_C=min(block_s, 16), num_warps=1,
        )  # fmt: skip


def _compute_capability(device: torch.device) -> int:
    """The major one of a GPU: 8 for Ampere, 9 for Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _tile(num_queries: int, block_d: int, element_size: int, capability: int) -> tuple[int, int, int]:
    """Queries (row, head of the group) and positions of a tile, and warps: the largest that spill no registers.
    16 is the least that a tensor core multiplies; fp32 is multiplied exactly, without tensor cores."""
    if element_size == 4:
        return 32, 32 if block_d < 128 else 16, 8
    most, positions = (128, 64) if block_d <= 128 else (64, 32)
    if capability < 9 and block_d == 128:  # tensor cores before Hopper read their operands from registers
        positions = 32
    queries = max(16, min(most, triton.next_power_of_2(num_queries)))
    return queries, positions, 8 if queries == most else 4


def _choose_splits(num_programs: int, max_positions: int) -> int:
    return max(1, min(_PROGRAMS // num_programs, max_positions // _LEAST_POSITIONS))
