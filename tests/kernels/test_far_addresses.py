"""Tensors of 2^31 elements and more are addressed with 64 bits: a product of an index and a stride that wraps around
reads elsewhere, or faults.

Logits of 1024 requests, 24 frames and 256 000 tokens are 6.3e9 elements. Here a few rows lie as far apart as that, in
memory of which only the touched pages exist, and the result must be the one of the same rows side by side. Which
arguments can be that large, test_compiles_ahead.py knows.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_ctc_spec.kernels.best_tokens import best_tokens_triton
from vllm_ctc_spec.kernels.contract import Budget
from vllm_ctc_spec.kernels.frame_stats import frame_stats_triton
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv_triton
from vllm_ctc_spec.kernels.prefix_chain import candidates, prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_search import prefix_search_triton
from vllm_ctc_spec.kernels.tree_attention import tree_attention_triton

from ..oracle.frames import markov_head, random_frames, sampling_for
from .conftest import INTERPRETED
from .test_tree_attention import NEVER, make_step


class Far:
    """Copies of tensors with one dimension stretched until its last index times its stride is 2^31 or more, while the
    stride itself still fits into 32 bits."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device

    def __call__(self, x: torch.Tensor, dimension: int) -> torch.Tensor:
        strides = list(x.contiguous().stride())
        stride = -(-(2**31) // (x.shape[dimension] - 1))
        strides[dimension] = -(-stride // 16) * 16  # as strides of real tensors are: the compiler specialises on it
        assert max(strides[dimension], x.numel()) < 2**31 <= strides[dimension] * (x.shape[dimension] - 1)
        # As much lies in front of the tensor, so that a wrapped product reads zeros there and does not fault.
        length = 2**31 + 1 + sum((size - 1) * step for size, step in zip(x.shape, strides))
        far = self.memory(length, x.dtype).as_strided(x.shape, strides, storage_offset=2**31)
        return far.copy_(x)

    def memory(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        if self.device == "cuda":
            return torch.empty(length, dtype=dtype, device="cuda")
        path = self.folder / f"{len(list(self.folder.iterdir()))}"  # a sparse file
        return torch.from_file(str(path), shared=True, size=length, dtype=dtype)


@pytest.fixture
def far(tmp_path: Path, triton_device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        # The interpreter works on tensors of the CPU in place, and then copies every storage onto itself.
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    yield Far(tmp_path, triton_device)
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.mark.parametrize("dimension", [0, 1])
def test_frame_stats(dimension: int, far: Far, triton_device: str) -> None:
    logits = random_frames(3, 4, 40, seed=0)[0].half().to(triton_device)
    torch.testing.assert_close(frame_stats_triton(far(logits, dimension)), frame_stats_triton(logits), rtol=0, atol=0)


@pytest.mark.parametrize("dimension", [0, 1])
def test_best_tokens(dimension: int, far: Far, triton_device: str) -> None:
    logits = random_frames(3, 4, 40, seed=0)[0].half().to(triton_device)
    tile_best = frame_stats_triton(logits).tile_best
    expected = best_tokens_triton(logits, 5, tile_best)
    assert torch.equal(best_tokens_triton(far(logits, dimension), 5, tile_best), expected)


@pytest.mark.parametrize("what", ["logits", "draft_logits"])
@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("rank", [0, 5])
def test_prefix_chain(rank: int, dimension: int, what: str, far: Far, triton_device: str) -> None:
    near = random_frames(3, 4, 40, seed=1)._replace(markov=markov_head(40, rank)).to(triton_device)
    tokens = candidates(near, 5)

    def run(is_far: bool) -> tuple[torch.Tensor, ...]:
        sampling = sampling_for(3, 4, 40, [1.0, 0.0, 0.7])
        sampling = type(sampling)(*(x.to(triton_device) for x in sampling))
        frames = near
        if is_far and what == "logits":
            frames = near._replace(logits=far(near.logits, dimension))
        elif is_far:
            sampling = sampling._replace(draft_logits=far(sampling.draft_logits, dimension))
        labels, lengths = prefix_chain_triton(tokens, frames, 4, sampling)
        return labels, lengths, sampling.draft_logits.clone()

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


@pytest.mark.parametrize("dimension", [0, 1])
def test_prefix_search(dimension: int, far: Far, triton_device: str) -> None:
    near = random_frames(3, 4, 40, seed=2).to(triton_device)
    both = near, near._replace(logits=far(near.logits, dimension))
    trees = [vars(prefix_search_triton(frames, Budget(8, 40, 4))) for frames in both]
    torch.testing.assert_close(trees[1], trees[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "dimension", "num_splits"),
    [
        *(("query", dimension, 1) for dimension in (0, 1)),
        *(("output", dimension, num_splits) for dimension in (0, 1) for num_splits in (1, 2)),
        *((cache, dimension, 1) for cache in ("key_cache", "value_cache") for dimension in (0, 1, 2)),
    ],
)
def test_tree_attention(name: str, dimension: int, num_splits: int, far: Far, triton_device: str) -> None:
    arguments = make_step([(40, 3), (5, 4)], heads=(6, 3), device=triton_device).arguments
    tree_attention_triton(**arguments, num_splits=num_splits)
    expected = arguments["output"].clone()
    arguments["output"].fill_(NEVER)
    arguments[name] = far(arguments[name], dimension)
    tree_attention_triton(**arguments, num_splits=num_splits)
    assert torch.equal(arguments["output"], expected)


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_kv_compaction(dimension: int, far: Far, triton_device: str) -> None:
    cache = torch.randn(6, 3, 4, 16, device=triton_device)
    slots = torch.tensor([0, 5, 9, 23, 2, 22], device=triton_device)
    roots, count = torch.tensor([0], device=triton_device).int(), torch.tensor([3], device=triton_device).int()
    path = torch.tensor([[0, 3, 5, 3]], dtype=torch.int32, device=triton_device)
    moved = far(cache, dimension)
    for each in (cache, moved):
        compact_kv_triton(CachePointers([each]), slots, roots, path, count)
    assert torch.equal(moved, cache)
