"""How much tree attention launches for the trees that are scheduled: tiles are full of queries that exist."""

from math import prod

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_attention import gpu
from vllm_ctc_spec.serving.options import TREE_SIZES

KV_HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE = 8, 4, 128, 16


class Recorder:
    """Stands in for a kernel, and keeps the grid and the options of its last launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        self.grid = grid
        return self

    def __call__(self, *args: object, **options: int) -> None:
        self.options = options


@pytest.fixture
def attend(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(gpu, "attend_kernel", recorder)
    return recorder


@pytest.fixture
def merge(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(gpu, "merge_kernel", recorder)
    return recorder


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(num_requests: int, max_rows: int, num_splits: int | None = None) -> None:
    cache = empty(64, KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=torch.bfloat16)
    keys, values = cache.transpose(1, 2).split(HEAD_SIZE, -1)
    query = empty(num_requests * max_rows, KV_HEADS * GROUP, HEAD_SIZE, dtype=torch.bfloat16)
    blocks = empty(num_requests, 4096 // BLOCK_SIZE, dtype=torch.int32)
    of_requests = empty(num_requests, dtype=torch.int32)
    rows = TreeRows(of_requests, of_requests, empty(num_requests * max_rows, dtype=torch.int64))
    gpu.tree_attention_triton(query, keys, values, query, blocks, of_requests, rows, 1.0, max_rows, num_splits)


@pytest.mark.parametrize("nodes", TREE_SIZES)
def test_tiles_are_full_of_the_queries_of_a_scheduled_tree(nodes, attend, merge):
    launch(num_requests=1, max_rows=1 + nodes, num_splits=1)
    tiles = attend.grid[2]
    assert (1 + nodes) * GROUP / (tiles * attend.options["BLOCK_M"]) > 0.75


def test_one_node_more_takes_another_tile_of_which_little_is_used(attend, merge):
    """So the sizes of a schedule are no power of two."""
    for nodes in TREE_SIZES:
        launch(num_requests=1, max_rows=2 + nodes, num_splits=1)
        assert (2 + nodes) * GROUP / (attend.grid[2] * attend.options["BLOCK_M"]) < 0.75


@pytest.mark.parametrize("multiprocessors", [78, 132])
@pytest.mark.parametrize("nodes", TREE_SIZES)
def test_the_context_is_split_over_what_a_gpu_runs_at_once(nodes, multiprocessors, attend, merge, monkeypatch):
    monkeypatch.setattr(gpu, "_num_multiprocessors", lambda device: multiprocessors)
    for num_requests in (1, 2, 4):
        launch(num_requests, max_rows=1 + nodes)
        at_once = multiprocessors * (8 // attend.options["num_warps"])
        most = 4096 // 256 * KV_HEADS * num_requests * (1 if nodes < 63 else 2)  # a part has some positions
        assert min(at_once / 2, most) <= prod(attend.grid) <= at_once


@pytest.mark.parametrize(("num_requests", "splits"), [(8, 2), (9, 3), (11, 3), (12, 1), (16, 1), (17, 1)])
def test_two_waves_of_thirds_are_shorter_than_one_that_leaves_half_of_the_gpu_idle(num_requests, splits, attend, merge):
    """Eight programs a request, 132 at once: two waves of three splits take two thirds of the time of one without."""
    launch(num_requests, max_rows=32)
    assert attend.grid == (num_requests, KV_HEADS, splits)


def test_more_requests_than_a_gpu_runs_at_once_are_not_split(attend, merge):
    launch(num_requests=64, max_rows=64)
    assert attend.grid == (64, KV_HEADS, 2) and not attend.options["SPLIT"] and not hasattr(merge, "grid")


def test_what_is_merged_are_the_rows_that_a_request_has_at_most(attend, merge):
    launch(num_requests=2, max_rows=8, num_splits=3)
    assert attend.grid == (2, KV_HEADS, 3) and merge.grid == (2, 8, KV_HEADS * GROUP)
