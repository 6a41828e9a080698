"""The kernels of the CTC transform against its oracle, and against its torch reference."""

import pytest
import torch

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform_reference, ctc_transform_triton

from ..oracle.ctc_transform import assert_is_the_cut, transform
from ..oracle.frames import HARD, hard_frames, random_frames


def assert_triton_is_right(
    frames: Frames, budget: Budget, device: str, chain_only: torch.Tensor | None = None
) -> DraftTree:
    """Scores and depths are those of the reference, and rows that are no chains are the oracle's."""
    batch, _, num_tokens = frames.logits.shape
    expected = ctc_transform_reference(frames, budget, chain_only)
    inputs = frames.to(device)
    before = [x.clone() for x in inputs[:4]]
    tree = ctc_transform_triton(inputs, budget, None if chain_only is None else chain_only.to(device))
    assert all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(inputs, before))
    tree = DraftTree(**{name: values.cpu() for name, values in vars(tree).items()})
    tree.check(num_tokens)
    torch.testing.assert_close(tree.scores, expected.scores, rtol=1e-6, atol=1e-4)
    assert torch.equal(tree.num_nodes, expected.num_nodes)
    assert torch.equal(tree.tokens[tree.parents < 0], expected.tokens[tree.parents < 0])
    for row in range(batch):
        if chain_only is not None and chain_only[row]:
            assert torch.equal(tree.tokens[row], expected.tokens[row])
            assert torch.equal(tree.parents[row], expected.parents[row])
        else:
            assert_is_the_cut(tree, row, transform(frames, row, *budget))
    return tree


@pytest.mark.parametrize("width", [1, 2, 10, 64])
@pytest.mark.parametrize("num_nodes", [1, 8, 64])
def test_triton_on_random_frames(num_nodes: int, width: int, triton_device: str) -> None:
    frames = random_frames(1, 4, 90, seed=num_nodes + width, scale=1.5)
    assert_triton_is_right(frames, Budget(num_nodes, width, 4), triton_device)


@pytest.mark.parametrize("name", HARD)
def test_triton_on_hard_frames(name: str, triton_device: str) -> None:
    assert_triton_is_right(hard_frames(name, 1, 5, 37), Budget(11, 5, 5), triton_device)


@pytest.mark.parametrize("num_frames, num_nodes, width", [(1, 64, 3), (1, 1, 1), (12, 16, 10), (17, 5, 200)])
def test_triton_for_any_number_of_frames(num_frames: int, num_nodes: int, width: int, triton_device: str) -> None:
    frames = random_frames(1, num_frames, 3, seed=num_frames, scale=0.5)
    assert_triton_is_right(frames, Budget(num_nodes, width, 12), triton_device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_with_half_precision(dtype: torch.dtype, triton_device: str) -> None:
    frames = random_frames(2, 4, 300, seed=7)
    assert_triton_is_right(frames._replace(logits=frames.logits.to(dtype)), Budget(8, 10, 4), triton_device)


@pytest.mark.parametrize("depth", [1, 3])
def test_triton_cuts_at_the_depth(depth: int, triton_device: str) -> None:
    frames = random_frames(1, 6, 30, seed=5)
    tree = assert_triton_is_right(frames, Budget(12, 6, depth), triton_device)
    assert tree.depths.max() == depth


def test_triton_chain_only_rows(triton_device: str) -> None:
    frames = random_frames(3, 6, 5, seed=4, scale=2.0)
    chain_only = torch.arange(3) % 2 == 0
    tree = assert_triton_is_right(frames, Budget(6, 4, 8), triton_device, chain_only)
    assert (tree.parents[chain_only, 1:] <= tree.num_nodes[chain_only, None] - 1).all()
    assert torch.equal(tree.depths[chain_only].amax(1), tree.num_nodes[chain_only].int())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_triton_on_frames_that_are_not_numbers(which: int, triton_device: str) -> None:
    frames = random_frames(3, 4, 9, seed=1)
    frames[which][1, 3] = torch.nan
    tree = assert_triton_is_right(frames, Budget(8, 4, 4), triton_device)
    assert tree.num_nodes.tolist() == [8, 0, 8]


def test_triton_on_views(triton_device: str) -> None:
    wide = random_frames(3, 6, 50, seed=3)
    frames = Frames(*(x[::2, 1:-1] for x in wide[:3]), wide.anchor[::2])
    assert_triton_is_right(frames, Budget(8, 5, 4), triton_device)
