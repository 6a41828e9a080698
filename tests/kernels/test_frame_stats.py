"""Normaliser and best token of a frame, against fp64 and between Triton and torch."""

import pytest
import torch

from vllm_ctc_spec.kernels.frame_stats import TILE, frame_stats, frame_stats_reference, frame_stats_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_logits(
    num_tokens: int, dtype: torch.dtype = torch.float32, batch: int = 2, num_frames: int = 3
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return (torch.randn(batch, num_frames, num_tokens, generator=generator) * 5).to(dtype)


def hard_logits(num_tokens: int) -> torch.Tensor:
    """One frame each: nothing but -inf, one finite token, a late block only, ties over blocks, large values."""
    logits = torch.full((5, 1, num_tokens), -torch.inf)
    logits[1, 0, num_tokens // 2] = 3.0
    logits[2, 0, -2:] = torch.tensor([-1.0, -2.0])
    logits[3, 0] = 0.0
    logits[3, 0, [num_tokens // 3, num_tokens - 1]] = 7.0
    logits[4, 0] = torch.linspace(-1e4, 1e4, num_tokens)
    return logits


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_against_fp64(dtype: torch.dtype) -> None:
    logits = random_logits(1000, dtype)
    logsumexp, best, best_logit, _ = frame_stats(logits)
    torch.testing.assert_close(logsumexp.double(), torch.logsumexp(logits.double(), -1), rtol=1e-6, atol=1e-6)
    assert (logits.float().gather(2, best[..., None])[..., 0] == logits.float().amax(-1)).all()
    assert (best_logit == logits.float().amax(-1)).all()
    assert (logsumexp.dtype, best.dtype, best_logit.dtype) == (torch.float32, torch.int64, torch.float32)


def test_ties_go_to_the_lowest_index_and_empty_frames_are_minus_infinity() -> None:
    logsumexp, best, best_logit, _ = frame_stats(hard_logits(999))
    assert best[:, 0].tolist() == [0, 499, 997, 333, 998]
    assert logsumexp[0, 0] == best_logit[0, 0] == -torch.inf
    assert not torch.isnan(logsumexp).any()


def assert_triton_equals_reference(logits: torch.Tensor, device: str) -> None:
    logsumexp, best, best_logit, tile_best = (x.cpu() for x in frame_stats_triton(logits.to(device)))
    expected_logsumexp, expected_best, expected_best_logit, _ = frame_stats_reference(logits)
    torch.testing.assert_close(logsumexp, expected_logsumexp, rtol=2e-6, atol=2e-6)
    assert torch.equal(best, expected_best)
    assert torch.equal(best_logit, expected_best_logit)
    tiles = torch.nn.functional.pad(logits, (0, -logits.shape[2] % TILE), value=-torch.inf).unflatten(2, (-1, TILE))
    assert torch.equal(tile_best, tiles.amax(3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 300, 8192, 9001])
def test_triton(num_tokens: int, dtype: torch.dtype, triton_device: str) -> None:
    assert_triton_equals_reference(random_logits(num_tokens, dtype), triton_device)


@pytest.mark.parametrize("num_tokens", [40, 9001])
def test_triton_on_hard_frames(num_tokens: int, triton_device: str) -> None:
    assert_triton_equals_reference(hard_logits(num_tokens), triton_device)


def test_triton_on_a_slice_of_frames(triton_device: str) -> None:
    logits = random_logits(500, batch=3, num_frames=6).to(triton_device)[:, 1:5]
    for got, expected in zip(frame_stats_triton(logits)[:3], frame_stats_reference(logits), strict=False):
        torch.testing.assert_close(got, expected)


def test_triton_refuses_logits_that_are_strided_in_the_vocabulary(triton_device: str) -> None:
    with pytest.raises(ValueError, match="contiguous in the vocabulary"):
        frame_stats_triton(random_logits(6).to(triton_device).mT)
