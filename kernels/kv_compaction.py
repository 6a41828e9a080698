"""Compaction of the KV cache along an accepted path, and of all that is stored by slots like it. Triton serves a GPU,
the numpy reference a CPU."""

import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl

# Entries are copied as integers of the element's size, because not every operation knows every dtype.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALIGNMENT = 16  # bytes; promised to the compiler, which then copies 16 bytes at once
_MAX_COLUMNS = 2048


class CachePointers:
    """The caches of L layers, all of one shape, dtype, strides and device, as one tensor of addresses.

    Built once from the list. The caches must stay where they are; nothing here keeps them alive. Compaction in a cache
    that is gone is refused: its addresses may belong to another tensor by then.
    """

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        if not caches:
            raise ValueError("KV compaction needs the cache of at least one layer.")
        first = caches[0]
        for layer, cache in enumerate(caches):
            for name, value, wanted in (
                ("shape", tuple(cache.shape), tuple(first.shape)),
                ("dtype", cache.dtype, first.dtype),
                ("strides", cache.stride(), first.stride()),
                ("device", cache.device, first.device),
            ):
                if value != wanted:
                    problem = f"layer {layer} has {name} {value}, not {wanted}"
                    raise ValueError(f"KV compaction needs equal caches: {problem}.")
            if cache.data_ptr() % _ALIGNMENT:
                raise ValueError(f"KV compaction needs caches aligned to {_ALIGNMENT} bytes: layer {layer} is not.")
        if first.dim() != 4 or first.stride(3) != 1:
            raise ValueError(
                "KV compaction needs caches [num_blocks, Hkv, block_size, 2 d] that are contiguous in the last "
                f"dimension, not {tuple(first.shape)} with strides {first.stride()}."
            )
        self.integer = _INTEGERS[first.element_size()]
        self.shape, self.strides = first.shape, first.stride()
        # From pinned memory, because the host would wait for the GPU otherwise.
        addresses = torch.tensor([cache.data_ptr() for cache in caches], pin_memory=first.is_cuda)
        self.addresses = addresses.to(first.device, non_blocking=True)  # [L] int64
        self._caches = [weakref.ref(cache) for cache in caches]  # vLLM decides how long a cache lives

    def layers(self) -> list[torch.Tensor]:
        """The caches as integers, each [num_blocks, Hkv, block_size, 2 d]."""
        return [cache.view(self.integer) for cache in self.alive()]

    def alive(self) -> list[torch.Tensor]:
        """The caches. RuntimeError if one is gone."""
        caches = [cache() for cache in self._caches]
        if any(cache is None for cache in caches):
            raise RuntimeError("KV compaction would write into freed memory: a cache is gone, keep a reference to it.")
        return caches


def group_equal(caches: Iterable[torch.Tensor]) -> list[CachePointers]:
    """The caches of one block table by what a launch takes for all of them: shape, strides, dtype and device. Targets
    whose layers differ in heads or sizes have several (`UniformTypeKVCacheSpecs` in vllm/v1/kv_cache_interface.py)."""
    groups: dict[tuple, list[torch.Tensor]] = {}
    for cache in caches:
        groups.setdefault((cache.shape, cache.stride(), cache.dtype, cache.device), []).append(cache)
    return [CachePointers(equal) for equal in groups.values()]


def compact_kv(
    caches: CachePointers,  # of L tensors [num_blocks, Hkv, block_size, 2 d]
    slot_mapping: torch.Tensor,  # [num_tokens] int64
    anchor_rows: torch.Tensor,  # [R] int32
    path: torch.Tensor,  # [R, 1 + N] int32
    num_sampled: torch.Tensor,  # [R] int32
) -> None:
    """The k-th accepted node of request `r` was computed in row `a + path[r, k]`, `a = anchor_rows[r]`, at the position
    `k` after the anchor's, and belongs where row `a + k` was written. In every layer, `k = 1 .. num_sampled[r] - 1`:

        entry(slot_mapping[a + k]) = entry(slot_mapping[a + path[r, k]])
        entry(slot) = cache[slot // block_size, :, slot % block_size, :], all heads, keys and values

    Keys hold the rotary embedding of the node's depth, so nothing needs to be rotated again. A path increases:
    `path[k] >= k`, and in ascending order no entry is overwritten before it has moved.

    Arguments:
        caches: `CachePointers` of L caches [num_blocks, Hkv, block_size, 2 d], any strides, contiguous in the last
            dimension, any dtype. Written.
        slot_mapping: [num_tokens] int64, slot = block * block_size + offset. A move from or to a negative slot is
            skipped.
        anchor_rows, num_sampled: [R] int32. num_sampled 0 and 1 move nothing.
        path: [R, 1 + N] int32, contiguous, as `tree_walk` returns it.

    Why custom: one launch for all layers. In torch it is a gather and a scatter for each layer, and the ragged list of
    moves takes a host synchronisation.
    """
    run = compact_kv_triton if slot_mapping.is_cuda else compact_kv_reference
    run(caches, slot_mapping, anchor_rows, path, num_sampled)


def compact_kv_reference(
    caches: CachePointers,
    slot_mapping: torch.Tensor,
    anchor_rows: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    """Serves a CPU. Reads all entries before it writes any, which is the same as ascending order."""
    targets, sources = moved_slots(slot_mapping, anchor_rows, path, num_sampled)
    block_size = caches.shape[2]
    from_block, from_offset = np.divmod(sources, block_size)
    to_block, to_offset = np.divmod(targets, block_size)
    for layer in caches.layers():
        cache = layer.numpy()
        cache[to_block, :, to_offset] = cache[from_block, :, from_offset]


def path_moves(
    roots: torch.Tensor, path: torch.Tensor, num_sampled: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moves that put accepted rows first: rows [R, 1 + N] int64 to write, and rows to read for them.

    Row `roots[r] + k` becomes row `roots[r] + path[r, k]` for k < num_sampled[r]; in place of the other moves the
    root's row becomes itself. roots, num_sampled [R], path [R, 1 + N]. Fixed shapes, nothing is read on the host.
    """
    first = roots.long().unsqueeze(1)
    offset = torch.arange(path.shape[1], device=path.device)
    accepted = offset < num_sampled.unsqueeze(1)
    return torch.where(accepted, first + offset, first), torch.where(accepted, first + path, first)


def moved_slots(
    slot_mapping: torch.Tensor, roots: torch.Tensor, path: torch.Tensor, num_sampled: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """On a CPU: the slots that `compact_kv` writes, and the slots that they are read from, M of each."""
    to, source = path_moves(roots, path, num_sampled)
    is_move = to != source
    targets, sources = slot_mapping[to[is_move]], slot_mapping[source[is_move]]
    is_move = (targets != sources) & (targets >= 0) & (sources >= 0)
    return targets[is_move].numpy(), sources[is_move].numpy()


def compact_kv_triton(
    caches: CachePointers,
    slot_mapping: torch.Tensor,
    anchor_rows: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    caches.alive()
    _, num_heads, block_size, entry_size = caches.shape
    element = caches.addresses.new_empty(0, dtype=caches.integer)
    num_columns = num_heads * entry_size
    block = min(_MAX_COLUMNS, triton.next_power_of_2(num_columns))
    grid = (path.shape[0], len(caches.addresses), triton.cdiv(num_columns, block))
    _compact_kv_kernel[grid](
        element, caches.addresses, *caches.strides[:3], slot_mapping, anchor_rows, path, num_sampled,
        PATH_WIDTH=path.shape[1], BLOCK_SIZE=block_size, ENTRY_SIZE=entry_size, NUM_COLUMNS=num_columns,
        BLOCK=block, ALIGNMENT=_ALIGNMENT, num_warps=4,
    )  # fmt: skip


@triton.jit
def _compact_kv_kernel(
    element_ptr,  # an empty tensor of the caches' element type
    addresses_ptr,  # [L] int64
    cache_stride_block,
    cache_stride_head,
    cache_stride_offset,
    slot_mapping_ptr,  # [num_tokens] int64
    anchor_rows_ptr,  # [R] int32
    path_ptr,  # [R, PATH_WIDTH] int32
    num_sampled_ptr,  # [R] int32
    PATH_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ENTRY_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """A column is one element of an entry, (head, place in the head). Grid (R, L, cdiv(columns, BLOCK)).

    One program does all moves of its columns, in ascending order, and one thread all moves of a column: a store into
    a slot comes after the load from it in the order of that thread, without a barrier.
    """
    request, layer = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    base = tl.load(addresses_ptr + layer).to(element_ptr.dtype)
    base = tl.multiple_of(base, ALIGNMENT)
    columns = base + (column // ENTRY_SIZE).to(tl.int64) * cache_stride_head + column % ENTRY_SIZE
    anchor_row = tl.load(anchor_rows_ptr + request)
    for k in range(1, tl.load(num_sampled_ptr + request)):
        node = tl.load(path_ptr + request * PATH_WIDTH + k)
        source = tl.load(slot_mapping_ptr + anchor_row + node)
        target = tl.load(slot_mapping_ptr + anchor_row + k)
        if (source != target) & (source >= 0) & (target >= 0):
            source_entry = source // BLOCK_SIZE * cache_stride_block + source % BLOCK_SIZE * cache_stride_offset
            target_entry = target // BLOCK_SIZE * cache_stride_block + target % BLOCK_SIZE * cache_stride_offset
            entry = tl.load(columns + source_entry, mask=column < NUM_COLUMNS)
            tl.store(columns + target_entry, entry, mask=column < NUM_COLUMNS)
