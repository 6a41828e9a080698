"""The kernels of the prefix search against what serves a CPU, which test_prefix_search.py holds to the oracle."""

import pytest
import torch

from vllm_ctc_spec.kernels.contract import Budget, Frames
from vllm_ctc_spec.kernels.prefix_search.cpu import prefix_search_cpu
from vllm_ctc_spec.kernels.prefix_search.gpu import prefix_search_triton

from ..oracle.frames import (
    HARD,
    TRANSITIONS,
    anchors,
    from_odds,
    hard_frames,
    markov_head,
    random_frames,
    token_frames,
    transitions_between,
)
from .searches import assert_same_nodes, certain_frames, nodes_of, realistic_frames


def assert_triton_equals_cpu(
    frames: Frames, budget: Budget, device: str, chain_only: torch.Tensor | None = None
) -> None:
    batch, _, num_tokens = frames.logits.shape
    trees = []
    for run, where in ((prefix_search_cpu, "cpu"), (prefix_search_triton, device)):
        chains = None if chain_only is None else chain_only.to(where)
        inputs = frames.to(where)
        before = [x.clone() for x in inputs[:4]]
        tree = run(inputs, budget, chains)
        torch.testing.assert_close(list(inputs[:4]), before, rtol=0, atol=0, equal_nan=True)
        tree.check(num_tokens)
        trees.append(tree)
    tree, triton_tree = trees
    assert torch.equal(triton_tree.num_nodes.cpu(), tree.num_nodes)
    for row in range(batch):
        assert_same_nodes(nodes_of(triton_tree, row), nodes_of(tree, row), atol=2e-5)
        used = int(tree.num_nodes[row])
        assert triton_tree.tokens[row, used + 1 :].tolist() == tree.tokens[row, used + 1 :].tolist()


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("name", HARD)
def test_triton_on_hard_frames(name: str, rank: int, triton_device: str) -> None:
    frames = hard_frames(name, 1, 5, 20)._replace(markov=markov_head(20, rank))
    assert_triton_equals_cpu(frames, Budget(8, 20, 4), triton_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [5, 64])
def test_triton_with_a_markov_head(rank: int, dtype: torch.dtype, triton_device: str) -> None:
    frames = realistic_frames(2, 6, 300, seed=rank)
    markov = tuple(x.to(dtype) for x in markov_head(300, rank, scale=2.0))
    frames = frames._replace(logits=frames.logits.to(dtype), markov=markov)
    assert_triton_equals_cpu(frames, Budget(8, 8, 4), triton_device)


@pytest.mark.parametrize(
    "num_frames, num_nodes, width, depth", [(1, 1, 1, 1), (1, 8, 3, 4), (3, 5, 9, 8), (17, 8, 4, 2)]
)
def test_triton_for_any_shape(num_frames: int, num_nodes: int, width: int, depth: int, triton_device: str) -> None:
    frames = random_frames(3, num_frames, 50, seed=num_frames)._replace(markov=markov_head(50, 3))
    assert_triton_equals_cpu(frames, Budget(num_nodes, width, depth), triton_device)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("num_frames, width", [(1, 20), (5, 3), (8, 20)])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_triton_with_transitions(name: str, num_frames: int, width: int, rank: int, triton_device: str) -> None:
    frames = token_frames(3, num_frames, 20, seed=2)._replace(
        markov=markov_head(20, rank), transitions=transitions_between(name, 3, num_frames)
    )
    chain_only = torch.tensor([False, True, False])
    assert_triton_equals_cpu(frames, Budget(8, width, 5), triton_device, chain_only)


def test_triton_with_all_64_nodes(triton_device: str) -> None:
    frames = realistic_frames(1, 12, 500, seed=3)._replace(markov=markov_head(500, 64))
    assert_triton_equals_cpu(frames, Budget(64, 64, 8), triton_device)


def test_triton_with_32_frames(triton_device: str) -> None:
    assert_triton_equals_cpu(realistic_frames(1, 32, 100, seed=4), Budget(16, 16, 32), triton_device)


@pytest.mark.parametrize("num_nodes, depth", [(3, 9), (9, 3)])
def test_triton_chain_rows_in_a_mixed_batch(num_nodes: int, depth: int, triton_device: str) -> None:
    frames = random_frames(3, 6, 40, seed=6)._replace(markov=markov_head(40, 5))
    chain_only = torch.tensor([True, False, True])
    assert_triton_equals_cpu(frames, Budget(num_nodes, 40, depth), triton_device, chain_only)


def test_triton_rows_are_cut_to_the_tree_of_a_smaller_budget(triton_device: str) -> None:
    frames = realistic_frames(1, 6, 60, seed=5).to(triton_device)
    whole, cut = (prefix_search_triton(frames, Budget(num_nodes, 8, 4)) for num_nodes in (16, 7))
    for field in ("tokens", "parents", "depths", "scores", "ancestors"):
        assert torch.equal(getattr(cut, field), getattr(whole, field)[:, :8])


def test_triton_ties_go_to_the_shallower_then_to_the_first_parent_then_to_the_lower_token(triton_device: str) -> None:
    logits, half = torch.full((1, 2, 2), 0.25).log(), torch.full((1, 2), 0.5).log()
    frames, budget = Frames(logits, torch.zeros(1, 2), half, anchors(1)), Budget(9, 9, 9)
    tree = prefix_search_triton(frames.to(triton_device), budget)
    assert [labels for labels, _ in nodes_of(tree, 0)] == [(0,), (1,), (0, 1), (1, 0)]
    # Two slots of two tokens each.
    slots = frames._replace(logits=logits * 0.5, log_blank=half * torch.inf, transitions=torch.eye(3, 2)[None])
    tree = prefix_search_triton(slots.to(triton_device), budget)
    assert [labels for labels, _ in nodes_of(tree, 0)] == [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]


def test_triton_no_child_outranks_its_parent(triton_device: str) -> None:
    for transitions in (None, transitions_between("slots", 1, 6)):
        frames = certain_frames(6)._replace(transitions=transitions)
        assert_triton_equals_cpu(frames, Budget(8, 6, 8), triton_device)


@pytest.mark.parametrize("odds", [-1.0, 1.5, 2.5, 18.0, 50.0])
def test_triton_mass_outside_of_the_candidates(odds: float, triton_device: str) -> None:
    """The less a frame's labels weigh, the more of their mass a difference from 1 would lose."""
    frames = from_odds(realistic_frames(1, 5, 40, seed=4).logits, torch.full((1, 5), odds))
    frames = frames._replace(markov=markov_head(40, 5, scale=2.0))
    assert_triton_equals_cpu(frames, Budget(8, 3, 3), triton_device)


def test_triton_frames_that_are_not_numbers_give_no_nodes(triton_device: str) -> None:
    frames, budget = random_frames(4, 4, 9, seed=1), Budget(4, 3, 4)
    frames.log_blank[0], frames.logits[1], frames.log_blank[2, -1] = torch.nan, torch.nan, torch.nan
    frames.log_scale[1] = torch.nan
    for markov in (None, markov_head(9, 5)):
        assert_triton_equals_cpu(frames._replace(markov=markov), budget, triton_device)
    transitions = transitions_between("spread", 4, 4).index_fill(0, torch.tensor([1]), torch.nan)
    frames = token_frames(4, 4, 9, seed=1)._replace(transitions=transitions)
    assert_triton_equals_cpu(frames, budget, triton_device)
    not_a_head = (torch.full((9, 5), torch.nan), torch.ones(9, 5))
    assert_triton_equals_cpu(random_frames(1, 4, 9, seed=1)._replace(markov=not_a_head), budget, triton_device)


def test_triton_on_a_slice_of_frames(triton_device: str) -> None:
    frames, budget = random_frames(2, 6, 40, seed=11).to(triton_device), Budget(8, 8, 4)
    sliced = Frames(*(x[:, 1:5] for x in frames[:3]), frames.anchor)
    got = prefix_search_triton(sliced, budget)
    expected = prefix_search_triton(Frames(*(x.contiguous() for x in sliced[:4])), budget)
    assert torch.equal(got.tokens, expected.tokens) and torch.equal(got.scores, expected.scores)


def test_triton_refuses_strided_inputs(triton_device: str) -> None:
    frames, budget = random_frames(1, 4, 4, seed=0).to(triton_device), Budget(2, 2, 2)
    with pytest.raises(ValueError, match="contiguous in the vocabulary"):
        prefix_search_triton(frames._replace(logits=frames.logits.mT), budget)
    with pytest.raises(ValueError, match="contiguous Markov weights"):
        weights = torch.zeros(3, 4, device=triton_device).T
        prefix_search_triton(frames._replace(markov=(weights, weights)), budget)
