"""The collapse, against the definition over every small alignment."""

import itertools

import pytest
import torch

from vllm_ctc_spec.kernels.collapse import _collapse_kernel, collapse, collapse_reference, collapse_triton

ANCHOR = 77


def by_definition(alignment: list[int], blank: int, num_labels: int) -> tuple[list[int], int]:
    labels = [symbol for symbol, _ in itertools.groupby(alignment) if symbol != blank][:num_labels]
    fill = labels[-1] if labels else ANCHOR
    return labels + [fill] * (num_labels - len(labels)), len(labels)


def every_alignment(num_frames: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=num_frames)))


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize("num_labels", [1, 3, 6])
def test_reference_on_every_alignment(num_frames: int, blank: int, num_labels: int) -> None:
    alignment = every_alignment(num_frames)
    labels, lengths = collapse(alignment, blank, torch.full((len(alignment),), ANCHOR), num_labels)
    assert (labels.dtype, lengths.dtype) == (torch.int64, torch.int32)
    expected = [by_definition(row, blank, num_labels) for row in alignment.tolist()]
    assert labels.tolist() == [row for row, _ in expected]
    assert lengths.tolist() == [length for _, length in expected]


@pytest.mark.parametrize("num_frames", [1, 4])
@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("num_labels", [1, 3, 6])
def test_triton_on_every_alignment(num_frames: int, blank: int, num_labels: int, triton_device: str) -> None:
    alignment = every_alignment(num_frames).to(triton_device)
    anchor = torch.arange(len(alignment), device=triton_device) + 2**40
    labels, lengths = collapse_triton(alignment, blank, anchor, num_labels)
    expected_labels, expected_lengths = collapse_reference(alignment, blank, anchor, num_labels)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(lengths, expected_lengths)


def test_triton_on_a_real_alphabet(triton_device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    symbols = torch.randint(0, 4, (9, 23), generator=generator)
    alignment = torch.tensor([151_936, 5, 5, 151_935])[symbols].to(triton_device)
    anchor = torch.arange(9, device=triton_device)
    labels, lengths = collapse_triton(alignment, 151_936, anchor, 16)
    expected_labels, expected_lengths = collapse_reference(alignment, 151_936, anchor, 16)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(lengths, expected_lengths)


def test_triton_writes_nothing_past_the_row(triton_device: str) -> None:
    alignment = torch.tensor([[1, 2, 1, 2, 1]], device=triton_device)
    labels = torch.full((5,), 99, device=triton_device)
    lengths = torch.empty(1, dtype=torch.int32, device=triton_device)
    anchor = torch.tensor([ANCHOR], device=triton_device)
    _collapse_kernel[(1,)](alignment, 0, anchor, labels, lengths, 5, 2, BLOCK_T=8, BLOCK_N=2)
    assert labels.tolist() == [1, 2, 99, 99, 99]
    assert lengths.tolist() == [2]
