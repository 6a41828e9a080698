"""Serves a GPU, in Triton: attention over a part of the context, and the merge of the parts."""

import functools

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels.contract import TreeRows

_LEAST_POSITIONS = 256  # of the longest possible context, for each split
# The maximum before the first position. Finite, so that a part in which a row sees nothing gives exp2(0) and not NaN.
_NOTHING_SEEN = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)


def tree_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: TreeRows,
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
        at_once = _num_multiprocessors(query.device) * (8 // num_warps)  # what their registers allow
        num_splits = _choose_splits(num_requests * num_kv_heads * num_tiles, max_blocks * block_size, at_once)
    partial, statistics = None, None
    if num_splits > 1:
        scratch = (num_requests, max_rows, num_heads, num_splits)
        partial = torch.empty(*scratch, head_size, dtype=torch.float32, device=query.device)
        statistics = torch.empty(*scratch, 2, dtype=torch.float32, device=query.device)
    attend_kernel[(num_requests, num_kv_heads, num_tiles * num_splits)](
        query, *query.stride()[:2], key_cache, *key_cache.stride()[:3], value_cache, *value_cache.stride()[:3],
        output, *output.stride()[:2], partial, statistics, block_table, block_table.stride(0),
        seq_lens, *rows, scale, max_rows, num_splits,
        GROUP=group, BLOCK_SIZE=block_size, D=head_size, BLOCK_D=block_d,
        BLOCK_M=block_m, BLOCK_N=block_n, SPLIT=num_splits > 1, num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    if num_splits > 1:
        block_s = triton.next_power_of_2(num_splits)
        merge_kernel[(num_requests, max_rows, num_heads)](
            partial, statistics, output, *output.stride()[:2], rows.anchor_rows, rows.num_rows, num_splits,
            D=head_size, BLOCK_D=block_d, BLOCK_S=block_s, BLOCK_C=min(block_s, 16), num_warps=1,
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


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    """132, as on a Hopper GPU, where there is no device: for compilation ahead of time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _choose_splits(num_programs: int, max_positions: int, at_once: int) -> int:
    """As many as run at once. Where that is one, and leaves a third of the GPU idle or more: three, in two waves."""
    splits = at_once // num_programs
    if splits == 1 and 3 * num_programs <= 2 * at_once:
        splits = 3
    return max(1, min(splits, max_positions // _LEAST_POSITIONS))


@triton.jit
def _load_entries(
    cache_ptr,  # of one KV head
    stride_block,
    stride_position,
    block,  # [BLOCK_N] int64
    place,  # [BLOCK_N]
    valid,  # [BLOCK_N]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D], zero where not valid: the memory there may hold NaN, and 0 * NaN is NaN."""
    column = tl.arange(0, BLOCK_D)
    pointers = cache_ptr + (block * stride_block + place.to(tl.int64) * stride_position)[:, None] + column[None, :]
    if MASKED:
        return tl.load(pointers, mask=valid[:, None] & (column < D)[None, :], other=0.0)
    if D < BLOCK_D:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend(
    query,  # [BLOCK_M, BLOCK_D]
    best,  # [BLOCK_M] fp32, the largest score so far
    total,  # [BLOCK_M] fp32, the sum of exp2(score - best)
    weighted,  # [BLOCK_M, BLOCK_D] fp32, the same sum over values
    first,
    anchor_position,
    seq_len,
    bits,  # [BLOCK_M] int64
    key_ptr,
    key_stride_block,
    key_stride_position,
    value_ptr,
    value_stride_block,
    value_stride_position,
    blocks_ptr,
    scale,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax over the positions `first .. first + BLOCK_N`; all visible unless MASKED."""
    position = first + tl.arange(0, BLOCK_N)
    valid = position < seq_len
    if MASKED:
        block = tl.load(blocks_ptr + position // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    else:
        block = tl.load(blocks_ptr + position // BLOCK_SIZE).to(tl.int64)
    place = position % BLOCK_SIZE
    key = _load_entries(key_ptr, key_stride_block, key_stride_position, block, place, valid, D, BLOCK_D, MASKED)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        # A shift by more than 63 is undefined; a node behind the last bit does not exist.
        bit = tl.minimum(tl.maximum(position - anchor_position - 1, 0), 63).to(tl.int64)
        on_path = ((bits[:, None] >> bit[None, :]) & 1) != 0
        visible = valid[None, :] & ((position <= anchor_position)[None, :] | on_path)
        score = tl.where(visible, score, -float("inf"))
    new_best = tl.maximum(best, tl.max(score, axis=1))
    rescale = tl.exp2(best - new_best)
    weight = tl.exp2(score - new_best[:, None])
    value = _load_entries(value_ptr, value_stride_block, value_stride_position, block, place, valid, D, BLOCK_D, MASKED)
    total = total * rescale + tl.sum(weight, axis=1)
    weighted = tl.dot(weight.to(value.dtype), value, weighted * rescale[:, None], input_precision="ieee")
    return new_best, total, weighted


@triton.jit(do_not_specialize=["max_rows", "num_splits"])
def attend_kernel(
    query_ptr,  # [num_tokens, Hq, D]
    query_stride_row,
    query_stride_head,
    key_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    key_stride_block,
    key_stride_position,
    key_stride_head,
    value_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    value_stride_block,
    value_stride_position,
    value_stride_head,
    output_ptr,  # [num_tokens, Hq, D]
    output_stride_row,
    output_stride_head,
    partial_ptr,  # [R, max_rows, Hq, num_splits, D] fp32, the weighted sum of the values of a part
    statistics_ptr,  # [R, max_rows, Hq, num_splits, 2] fp32, its largest score and its sum of weights
    block_table_ptr,  # [R, max_blocks] int32
    block_table_stride,
    seq_lens_ptr,  # [R] int32
    anchor_rows_ptr,  # [R] int32
    num_rows_ptr,  # [R] int32
    ancestors_ptr,  # [num_tokens] int64
    scale,
    max_rows,
    num_splits,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Attention of a tile of queries over a part of the context. Grid (R, Hkv, tiles * num_splits).

    A query is a pair (row, head of the group), so that the heads of a group share a tile of keys. The parts are runs
    of tiles of positions, as equal as may be; a part may be empty. Scores are in base 2.
    """
    request, kv_head = tl.program_id(0), tl.program_id(1)
    tile, split = tl.program_id(2) // num_splits, tl.program_id(2) % num_splits
    num_rows = tl.load(num_rows_ptr + request)
    if tile * BLOCK_M >= num_rows * GROUP:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    anchor_position = seq_len - num_rows
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    used = pair < num_rows * GROUP
    row = (tl.load(anchor_rows_ptr + request) + pair // GROUP).to(tl.int64)
    head = (kv_head * GROUP + pair % GROUP).to(tl.int64)
    bits = tl.load(ancestors_ptr + row, mask=used, other=0)
    column = tl.arange(0, BLOCK_D)
    query_mask = used[:, None] & (column < D)[None, :]
    query_pointers = query_ptr + (row * query_stride_row + head * query_stride_head)[:, None] + column[None, :]
    query = tl.load(query_pointers, mask=query_mask, other=0.0)

    key_ptr += kv_head.to(tl.int64) * key_stride_head
    value_ptr += kv_head.to(tl.int64) * value_stride_head
    blocks_ptr = block_table_ptr + request.to(tl.int64) * block_table_stride
    scale *= _LOG2_E
    best = tl.full((BLOCK_M,), _NOTHING_SEEN, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    length = tl.cdiv(tl.cdiv(seq_len, BLOCK_N), num_splits) * BLOCK_N
    start = split * length
    end = tl.minimum(start + length, seq_len)
    # Everything before the tile with the first node is visible to every row.
    nodes = (anchor_position + 1) // BLOCK_N * BLOCK_N
    for first in range(start, tl.minimum(end, nodes), BLOCK_N):
        best, total, weighted = _attend(
            query, best, total, weighted, first, anchor_position, seq_len, bits,
            key_ptr, key_stride_block, key_stride_position, value_ptr, value_stride_block, value_stride_position,
            blocks_ptr, scale, BLOCK_SIZE, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for first in range(tl.maximum(start, nodes), end, BLOCK_N):
        best, total, weighted = _attend(
            query, best, total, weighted, first, anchor_position, seq_len, bits,
            key_ptr, key_stride_block, key_stride_position, value_ptr, value_stride_block, value_stride_position,
            blocks_ptr, scale, BLOCK_SIZE, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip

    if SPLIT:
        num_heads = tl.num_programs(1) * GROUP
        part = ((request * max_rows + pair // GROUP).to(tl.int64) * num_heads + head) * num_splits + split
        tl.store(statistics_ptr + part * 2, best, mask=used)
        tl.store(statistics_ptr + part * 2 + 1, total, mask=used)
        tl.store(partial_ptr + part[:, None] * D + column[None, :], weighted, mask=query_mask)
    else:
        pointers = output_ptr + (row * output_stride_row + head * output_stride_head)[:, None] + column[None, :]
        tl.store(pointers, (weighted / total[:, None]).to(output_ptr.dtype.element_ty), mask=query_mask)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    partial_ptr,  # [R, max_rows, Hq, num_splits, D] fp32
    statistics_ptr,  # [R, max_rows, Hq, num_splits, 2] fp32
    output_ptr,  # [num_tokens, Hq, D]
    output_stride_row,
    output_stride_head,
    anchor_rows_ptr,  # [R] int32
    num_rows_ptr,  # [R] int32
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`sum_s 2^(best_s - best) weighted_s / sum_s 2^(best_s - best) total_s`. Grid (R, max_rows, Hq).

    The parts are read BLOCK_C at a time, to have that many loads under way.
    """
    request, node, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if node >= tl.load(num_rows_ptr + request):
        return
    part = ((request * tl.num_programs(1) + node).to(tl.int64) * tl.num_programs(2) + head) * num_splits
    split = tl.arange(0, BLOCK_S)
    statistics = statistics_ptr + (part + split) * 2
    best = tl.load(statistics, mask=split < num_splits, other=_NOTHING_SEEN)
    total = tl.load(statistics + 1, mask=split < num_splits, other=0.0)
    overall = tl.max(best, axis=0)
    denominator = tl.sum(tl.exp2(best - overall) * total, axis=0)
    column = tl.arange(0, BLOCK_D)
    weighted = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_splits, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        valid = chunk < num_splits
        weight = tl.exp2(tl.load(statistics_ptr + (part + chunk) * 2, mask=valid, other=_NOTHING_SEEN) - overall)
        pointers = partial_ptr + (part + chunk)[:, None] * D + column[None, :]
        values = tl.load(pointers, mask=valid[:, None] & (column < D)[None, :], other=0.0)
        weighted += tl.sum(weight[:, None] * values, axis=0)
    row = (tl.load(anchor_rows_ptr + request) + node).to(tl.int64)
    output_ptr += row * output_stride_row + head.to(tl.int64) * output_stride_head
    tl.store(output_ptr + column, (weighted / denominator).to(output_ptr.dtype.element_ty), mask=column < D)
