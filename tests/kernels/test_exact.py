"""Every Triton kernel against fp64 or exact integers: on a GPU at served shapes, in the interpreter at a small one.

The other tests compare with references on inputs that break careless code. These are the shapes that are served, with
inputs of `--seed`.
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from . import exact_frames, exact_trees
from .conftest import INTERPRETED
from .exact import Case, Shape

CHECKS = exact_frames.CHECKS | exact_trees.CHECKS
SMALL = Shape(600, 5, 2, 8, 16)
SERVED = [
    Shape(32_000, 12, 4, 16, 64), Shape(151_936, 12, 6, 64, 64), Shape(128_256, 24, 3, 32, 64),
    Shape(999, 8, 64, 64, 32), Shape(256_000, 12, 2, 8, 256),
]  # fmt: skip
SHAPES = [SMALL, *SERVED] if torch.cuda.is_available() and not INTERPRETED else [SMALL]
# Triton's interpreter multiplies matrices of bf16 as if they were integers.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


@pytest.fixture(autouse=True)
def poisoned_memory(triton_device: str) -> Iterator[None]:
    """What torch.empty gives starts as NaN or as the largest integer: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=triton_device).isnan().all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_a_kernel_is_exact(check: str, shape: Shape, dtype: torch.dtype, input_seed: int, triton_device: str) -> None:
    error, tolerance = CHECKS[check](Case(shape, dtype, triton_device, input_seed))
    assert error <= tolerance  # NaN is no number that is right


def scores_off(result, arguments) -> None:
    result.scores[:, 1:] += 0.01  # all of them: still sorted


# For each kernel: where a check finds it, and what is changed of its result or of its arguments.
SLIPS = {
    "frame_stats": (exact_frames, "frame_stats_triton", lambda r, a: r[0].mul_(1.0001)),
    "best_tokens": (exact_frames, "best_tokens_triton", lambda r, a: r[0, -1:].sub_(1)),
    "collapse": (exact_frames, "collapse_triton", lambda r, a: r[1].sub_(1)),
    "prefix_chain": (exact_frames, "prefix_chain_triton", lambda r, a: r[0][0, 0].add_(1).remainder_(600)),
    "prefix_search": (exact_frames, "prefix_search_triton", scores_off),
    "ctc_transform": (exact_frames, "ctc_transform_triton", scores_off),
    "tree_mask": (exact_trees, "tree_mask_triton", lambda r, a: r[1][:, 1].bitwise_xor_(2)),
    "tree_layout": (exact_trees, "tree_layout_triton", lambda r, a: a[6][-1:].fill_(1)),
    "tree_attention": (exact_trees, "tree_attention_triton", lambda r, a: a[3][0].add_(0.01)),
    "tree_walk": (exact_trees, "tree_walk_triton", lambda r, a: r[2][0, -1].sub_(1)),
    "tree_merge": (exact_trees, "tree_merge_triton", lambda r, a: scores_off(r.tree, a)),
    "history_tree": (exact_trees, "history_tree_triton", lambda r, a: scores_off(r.tree, a)),
    "kv_compaction": (exact_trees, "compact_kv_triton", lambda r, a: a[0].layers()[-1][0, 0, 0].zero_()),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_a_kernel_that_is_a_little_off_is_found(
    check: str, input_seed: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, slip = SLIPS[check.partition(",")[0]]
    right: Callable = getattr(module, name)

    def wrong(*arguments):
        result = right(*arguments)
        slip(result, arguments)
        return result

    monkeypatch.setattr(module, name, wrong)
    error, tolerance = CHECKS[check](Case(SMALL, torch.float32, triton_device, input_seed))
    assert not error <= tolerance
