"""The candidates of frames are the tokens that a stable sort finds, among equal logits too."""

import pytest
import torch

from vllm_ctc_spec.kernels.best_tokens import best_tokens, best_tokens_reference, best_tokens_triton
from vllm_ctc_spec.kernels.frame_stats import frame_stats_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(num_tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(2, 3, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) * 5).to(dtype)


def test_the_reference_takes_the_lower_of_equals_in_the_order_of_tokens() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0, 3.0, 2.0], [0.0, 0.0, 9.0, 0.0, -torch.inf]]])
    assert best_tokens(logits, 3).tolist() == [[0, 1, 1, 2, 2, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (40, 40), (40, 5), (600, 64), (9001, 32), (9001, 3), (2000, 128)]
)
def test_triton_equals_a_stable_sort(num_tokens: int, width: int, dtype: torch.dtype, triton_device: str) -> None:
    logits = random_logits(num_tokens, dtype)
    given = logits.to(triton_device)
    expected = best_tokens_reference(logits, width)
    assert torch.equal(best_tokens_triton(given, width).cpu(), expected)
    assert torch.equal(best_tokens_triton(given, width, frame_stats_triton(given).tile_best).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_where_most_logits_are_equal(dtype: torch.dtype, triton_device: str) -> None:
    """More equals than candidates: of a few values, of nothing but -inf, of both zeros, of one finite token."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randint(-2, 2, (1500,), generator=generator).float()
    zeros = torch.zeros(1500) * few
    none = torch.full_like(few, -torch.inf)
    one = none.clone()
    one[1003] = -1.0
    logits = torch.stack([few, zeros, none, one, few * 1e-3 + 7])[:, None].to(dtype)
    assert torch.equal(best_tokens_triton(logits.to(triton_device), 48).cpu(), best_tokens_reference(logits, 48))


def test_triton_the_best_tokens_are_crowded_in_one_tile_or_spread(triton_device: str) -> None:
    logits = random_logits(3000).clamp(max=4.0)
    logits[0, 0, 640:704] += 50  # a whole tile
    logits[0, 1, 7::64] += 50  # one token of each
    logits[1, 2, -3:] += 50  # the last ones
    assert torch.equal(best_tokens_triton(logits.to(triton_device), 32).cpu(), best_tokens_reference(logits, 32))


def test_triton_tokens_are_real_where_logits_are_no_numbers(triton_device: str) -> None:
    logits = random_logits(100)
    logits[0] = torch.nan
    logits[1, 0, 7] = -torch.nan
    tokens = best_tokens_triton(logits.to(triton_device), 20).cpu()
    assert ((tokens >= 0) & (tokens < 100)).all()
    for row in tokens:
        assert len(row.unique(return_counts=True)[1]) >= 20


def test_triton_on_a_slice_of_frames(triton_device: str) -> None:
    logits = random_logits(500)[:, 1:]
    assert torch.equal(best_tokens_triton(logits.to(triton_device), 9).cpu(), best_tokens_reference(logits, 9))
