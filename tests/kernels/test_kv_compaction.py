"""KV compaction, against a loop over moves, heads and elements; and what it refuses."""

import weakref

import pytest
import torch

from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv, compact_kv_triton, group_equal

from ..oracle.trees import starts

BLOCK_SIZE, NUM_BLOCKS = 4, 16
# Accepted nodes of each request; all paths start at the anchor.
PATHS = {
    "overlapping moves": [[0, 2, 3, 4]],
    "prefixes": [[0, 1, 2, 3], [0], []],
    "several requests": [[0, 3, 4, 9], [0, 1, 4], [0], [0, 9], [], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
}
NUM_ROWS = 10
LAYOUTS = {"HND": (0, 1, 2, 3), "NHD": (0, 2, 1, 3)}


def random_caches(dtype: torch.dtype, layout: str, num_layers: int, num_heads: int = 3, size: int = 8) -> list:
    """Layers [num_blocks, Hkv, block_size, 2 d], stored in the order of `layout`."""
    order = LAYOUTS[layout]
    shape = [(NUM_BLOCKS, num_heads, BLOCK_SIZE, size)[dimension] for dimension in order]
    generator = torch.Generator().manual_seed(num_layers)
    size_in_bytes = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (num_layers, *shape[:-1], size * size_in_bytes), generator=generator).to(torch.uint8)
    inverse = [order.index(dimension) for dimension in range(4)]
    return [layer.view(dtype).permute(inverse) for layer in raw]


def step(paths: list[list[int]], skipped: bool) -> tuple[torch.Tensor, ...]:
    """slot_mapping, anchor_rows, path and num_sampled of requests of NUM_ROWS rows, behind two rows of a prompt."""
    slots = torch.randperm(BLOCK_SIZE * NUM_BLOCKS, generator=torch.Generator().manual_seed(0))
    slots = slots[: 2 + NUM_ROWS * len(paths)]
    if skipped:
        slots[3::4] = -1
    anchor_rows = starts([NUM_ROWS] * len(paths))[:-1] + 2
    path = torch.tensor([nodes + list(range(len(nodes), NUM_ROWS)) for nodes in paths], dtype=torch.int32)
    return slots, anchor_rows, path, torch.tensor([len(nodes) for nodes in paths], dtype=torch.int32)


def move(cache: torch.Tensor, slots: torch.Tensor, anchor_rows: torch.Tensor, paths: list[list[int]]) -> None:
    for root, nodes in zip(anchor_rows.tolist(), paths):
        for k, node in enumerate(nodes):
            source, target = int(slots[root + node]), int(slots[root + k])
            if k > 0 and source >= 0 and target >= 0:
                entry = cache[source // BLOCK_SIZE, :, source % BLOCK_SIZE].clone()
                cache[target // BLOCK_SIZE, :, target % BLOCK_SIZE] = entry


def raw(cache: torch.Tensor) -> torch.Tensor:
    """Bytes: NaN equals NaN."""
    return cache.cpu().contiguous().view(torch.uint8)


def assert_compaction(run, name: str, caches: list[torch.Tensor], skipped: bool, device: str) -> None:
    inputs = step(PATHS[name], skipped)
    expected = [cache.view(torch.uint8).clone().view(cache.dtype) for cache in caches]
    for cache in expected:
        move(cache.view(torch.uint8), *inputs[:2], PATHS[name])
    changed = not torch.equal(raw(expected[0]), raw(caches[0]))
    assert changed == (name != "prefixes")
    moved = [cache.to(device) for cache in caches]
    run(CachePointers(moved), *(value.to(device) for value in inputs))
    for cache, wanted in zip(moved, expected):
        assert torch.equal(raw(cache), raw(wanted))


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_reference_on_paths(name: str, skipped: bool, layout: str, dtype: torch.dtype) -> None:
    assert_compaction(compact_kv, name, random_caches(dtype, layout, 3), skipped, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_triton_on_paths(name: str, skipped: bool, layout: str, triton_device: str) -> None:
    assert_compaction(compact_kv_triton, name, random_caches(torch.bfloat16, layout, 2), skipped, triton_device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_on_dtypes(dtype: torch.dtype, triton_device: str) -> None:
    assert_compaction(compact_kv_triton, "overlapping moves", random_caches(dtype, "NHD", 1), False, triton_device)


def test_triton_on_entries_of_several_blocks(triton_device: str) -> None:
    caches = random_caches(torch.bfloat16, "HND", 1, num_heads=5, size=512)
    assert_compaction(compact_kv_triton, "overlapping moves", caches, False, triton_device)


def assert_unequal_caches_are_compacted(run, device: str) -> None:
    """Layers of two head counts, and one that is stored in another order."""
    kinds = random_caches(torch.bfloat16, "HND", 2), random_caches(torch.bfloat16, "HND", 3, num_heads=2)
    caches = [layer.to(device) for layers in zip(*kinds) for layer in layers]  # in turns, as layers may come
    caches += [layer.to(device) for layer in random_caches(torch.bfloat16, "NHD", 1)]
    inputs = step(PATHS["several requests"], skipped=True)
    expected = [cache.cpu().clone() for cache in caches]
    for cache in expected:
        move(cache, *inputs[:2], PATHS["several requests"])
    groups = group_equal(caches)
    assert [len(group.layers()) for group in groups] == [2, 2, 1]
    for group in groups:
        run(group, *(value.to(device) for value in inputs))
    for cache, wanted in zip(caches, expected):
        assert torch.equal(raw(cache), raw(wanted))


def test_reference_on_unequal_caches() -> None:
    assert_unequal_caches_are_compacted(compact_kv, "cpu")


def test_triton_on_unequal_caches(triton_device: str) -> None:
    assert_unequal_caches_are_compacted(compact_kv_triton, triton_device)


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda cache: cache[1:], "layer 1 has shape"),
        (lambda cache: cache.half(), "layer 1 has dtype"),
        (lambda cache: cache.transpose(1, 2).contiguous().transpose(1, 2), "layer 1 has strides"),
        (lambda cache: cache.to("meta"), "layer 1 has device"),
        (lambda cache: torch.empty(cache.numel() + 1)[1:].view(cache.shape), "aligned to 16 bytes: layer 1"),
    ],
)
def test_unequal_caches_are_refused(change, problem: str) -> None:
    cache = torch.zeros(NUM_BLOCKS, 3, BLOCK_SIZE, 8)
    with pytest.raises(ValueError, match=problem):
        CachePointers([cache, change(cache)])


def test_other_caches_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        CachePointers([])
    with pytest.raises(ValueError, match="contiguous in the last dimension"):
        CachePointers([torch.zeros(NUM_BLOCKS, 8, BLOCK_SIZE, 3).transpose(1, 3)])
    with pytest.raises(ValueError, match="num_blocks, Hkv"):
        CachePointers([torch.zeros(2, NUM_BLOCKS, 3, BLOCK_SIZE, 8)])


def test_the_pointers_keep_no_cache_alive() -> None:
    """vLLM frees a cache that it only profiled with."""
    cache = torch.zeros(2, 1, 16, 8)
    alive = weakref.ref(cache)
    pointers = CachePointers([cache])
    assert len(pointers.layers()) == 1
    del cache
    assert alive() is None
    one_move = torch.arange(3), *(torch.tensor(x, dtype=torch.int32) for x in ([0], [[0, 2]], [2]))
    for run in (compact_kv, compact_kv_triton):
        with pytest.raises(RuntimeError, match="would write into freed memory"):
            run(pointers, *one_move)


def assert_rows_of_states_move(run, device: str) -> None:
    """Hidden states [num_rows, H], as blocks of one entry whose slots are rows; H is no power of two."""
    _, anchor_rows, path, num_sampled = step(PATHS["several requests"], skipped=False)
    num_rows = 2 + NUM_ROWS * len(num_sampled)
    states = torch.randn(5, num_rows, 24)
    expected = states.clone()
    for root, nodes in zip(anchor_rows.tolist(), PATHS["several requests"]):
        for k, node in enumerate(nodes):
            expected[:, root + k] = states[:, root + node]
    moved = [rows[:, None, None] for rows in states.clone().to(device)]
    (pointers,) = group_equal(moved)
    run(pointers, *(value.to(device) for value in (torch.arange(num_rows), anchor_rows, path, num_sampled)))
    assert torch.equal(torch.stack(moved).cpu().view(states.shape), expected) and not torch.equal(expected, states)


def test_reference_on_rows_of_hidden_states() -> None:
    assert_rows_of_states_move(compact_kv, "cpu")


def test_triton_on_rows_of_hidden_states(triton_device: str) -> None:
    assert_rows_of_states_move(compact_kv_triton, triton_device)
