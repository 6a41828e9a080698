"""The chain's kernels against its torch reference."""

import pytest
import torch

from vllm_ctc_spec.kernels.contract import ChainSampling, Frames
from vllm_ctc_spec.kernels.prefix_chain import candidates
from vllm_ctc_spec.kernels.prefix_chain.gpu import prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_chain.reference import prefix_chain_reference

from ..oracle.frames import (
    HARD,
    NEVER,
    TRANSITIONS,
    hard_frames,
    markov_head,
    random_frames,
    sampling_for,
    token_frames,
    transitions_between,
)


def whole_chain_triton(
    frames: Frames, num_labels: int, sampling: ChainSampling
) -> tuple[torch.Tensor, torch.Tensor]:
    return prefix_chain_triton(candidates(frames, frames.logits.shape[2]), frames, num_labels, sampling)


def assert_triton_equals_reference(
    frames: Frames,
    num_labels: int,
    device: str,
    temperature: list[float],
    inert: int | None = None,
    width: int | None = None,
) -> None:
    """width: None for all tokens as candidates."""
    batch, _, num_tokens = frames.logits.shape
    tokens = candidates(frames, num_tokens if width is None else width)
    calls = []
    for run, where in ((prefix_chain_reference, "cpu"), (prefix_chain_triton, device)):
        sampling = sampling_for(batch, num_labels, num_tokens, temperature)
        if inert is not None:
            sampling.requests[inert] = -1
        sampling = ChainSampling(*(x.to(where) for x in sampling))
        labels, lengths = run(tokens.to(where), frames.to(where), num_labels, sampling)
        assert (labels.dtype, lengths.dtype) == (torch.int64, torch.int32)
        assert ((labels >= 0) & (labels < num_tokens)).all()
        calls.append((labels.cpu(), lengths.cpu(), sampling.draft_logits.cpu()))
    (labels, lengths, drafts), (triton_labels, triton_lengths, triton_drafts) = calls
    active = [row for row in range(batch) if row != inert]
    assert torch.equal(triton_labels[active], labels[active])
    assert torch.equal(triton_lengths[active], lengths[active])
    torch.testing.assert_close(triton_drafts, drafts, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [[0.0, 0.0], [1.0, 0.0]])
@pytest.mark.parametrize("name", HARD)
def test_triton_on_hard_frames(name: str, temperature: list[float], triton_device: str) -> None:
    assert_triton_equals_reference(hard_frames(name, 2, 5, 300), 7, triton_device, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("width", [None, 6])
def test_triton_with_a_markov_head(
    rank: int, width: int | None, dtype: torch.dtype, triton_device: str
) -> None:
    frames = random_frames(3, 6, 300, seed=rank)
    # The interpreter's tl.dot multiplies the bit patterns of bfloat16: there the head of bf16 logits is fp16.
    head_dtype = torch.float16 if (dtype, triton_device) == (torch.bfloat16, "cpu") else dtype
    markov = tuple(x.to(head_dtype) for x in markov_head(300, rank, scale=3.0))
    frames = frames._replace(logits=frames.logits.to(dtype), markov=markov)
    assert_triton_equals_reference(frames, 4, triton_device, [0.7, 1.0, 0.0], width=width)


@pytest.mark.parametrize("num_frames, num_labels", [(1, 1), (1, 3), (3, 8), (12, 2), (17, 3), (32, 2)])
def test_triton_for_any_number_of_frames_and_labels(num_frames: int, num_labels: int, triton_device: str) -> None:
    frames = random_frames(2, num_frames, 130, seed=num_frames)
    assert_triton_equals_reference(frames, num_labels, triton_device, [1.0, 0.0])


@pytest.mark.parametrize("width", [None, 6])
@pytest.mark.parametrize("num_frames", [1, 5, 8])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_triton_with_transitions(
    name: str, num_frames: int, width: int | None, triton_device: str
) -> None:
    frames = token_frames(2, num_frames, 70, seed=num_frames)
    frames.log_blank.fill_(torch.nan)  # nobody reads it
    frames = frames._replace(markov=markov_head(70, 5), transitions=transitions_between(name, 2, num_frames))
    assert_triton_equals_reference(frames, 7, triton_device, [1.0, 0.0], width=width)


def test_triton_keeps_zeros_and_ones_of_transitions(triton_device: str) -> None:
    """Slots: what is drafted of frame k is the frame, to the last bit, whatever came before it."""
    frames = token_frames(2, 12, 70, seed=1)._replace(transitions=transitions_between("slots", 2, 12))
    frames = frames.to(triton_device)
    sampling = ChainSampling(*(x.to(triton_device) for x in sampling_for(2, 12, 70, [0.0, 0.0])))
    labels, lengths = whole_chain_triton(frames, 12, sampling)
    assert torch.equal(labels, frames.logits.argmax(2)) and lengths.tolist() == [12, 12]
    first = ChainSampling(*(x.to(triton_device) for x in sampling_for(2, 1, 70, [0.0, 0.0])))
    for k in (3, 11):
        alone = (x[:, k : k + 1] for x in frames[:3])
        whole_chain_triton(Frames(*alone, frames.anchor, transitions=frames.transitions[:, :2, :1]), 1, first)
        assert torch.equal(first.draft_logits[:2, 0], sampling.draft_logits[:2, k])


@pytest.mark.parametrize("temperature", [[0.0, 0.0], [1.0, 0.0]])
@pytest.mark.parametrize("name", ["peaky", "all blank", "empty frames"])
def test_triton_with_an_anchor_that_is_no_label(name: str, temperature: list[float], triton_device: str) -> None:
    """It has a row of W_in alone; "all blank" ends at the root, where a chain is filled with a label all the same."""
    w_in, w_out = markov_head(71, 5)
    frames = hard_frames(name, 2, 5, 70)._replace(anchor=torch.tensor([70, 3]), markov=(w_in, w_out[:70].contiguous()))
    assert_triton_equals_reference(frames, 4, triton_device, temperature)


def test_triton_of_a_larger_batch_with_an_inert_row(triton_device: str) -> None:
    frames = random_frames(18, 3, 70, seed=9)._replace(markov=markov_head(70, 5))
    assert_triton_equals_reference(frames, 2, triton_device, [0.5, 0.0, 1.0] * 6, inert=17)


@pytest.mark.parametrize("inert", [0, 1])
def test_triton_inert_rows_write_nothing(inert: int, triton_device: str) -> None:
    frames = random_frames(2, 4, 300, seed=inert)
    assert_triton_equals_reference(frames, 6, triton_device, [1.0, 1.0], inert)
    # Slot -1 of a view is a slot that can be looked at; six labels in four frames end the chain as well.
    sampling = sampling_for(2, 6, 300, [1.0, 1.0])
    sampling.requests.fill_(-1)
    sampling = ChainSampling(*(x.to(triton_device) for x in sampling))
    before = sampling.draft_logits
    whole_chain_triton(frames.to(triton_device), 6, sampling._replace(draft_logits=before[1:]))
    assert (before == NEVER).all()


def test_triton_on_a_slice_of_frames(triton_device: str) -> None:
    frames = random_frames(2, 6, 40, seed=11)
    sliced, moved = (Frames(*(x[:, 1:5] for x in f[:3]), f.anchor) for f in (frames, frames.to(triton_device)))
    sampling = sampling_for(2, 4, 40, [1.0, 0.0])
    expected = prefix_chain_reference(candidates(sliced, 40), sliced, 4, sampling)
    got = whole_chain_triton(moved, 4, ChainSampling(*(x.to(triton_device) for x in sampling)))
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])


def test_triton_refuses_strided_inputs(triton_device: str) -> None:
    frames = random_frames(1, 4, 4, seed=0).to(triton_device)
    sampling = ChainSampling(*(x.to(triton_device) for x in sampling_for(1, 2, 4, [1.0])))
    with pytest.raises(ValueError, match="contiguous in the vocabulary"):
        whole_chain_triton(frames._replace(logits=frames.logits.mT), 2, sampling)
    with pytest.raises(ValueError, match="contiguous Markov weights"):
        weights = torch.zeros(3, 4, device=triton_device).T
        whole_chain_triton(frames._replace(markov=(weights, weights)), 2, sampling)
