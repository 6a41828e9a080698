"""The CTC transform: its oracle against exact prefix probabilities, then the torch reference against the oracle."""

import math

import pytest
import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels.collapse import collapse
from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform

from ..oracle.ctc_transform import assert_is_the_cut, raw_tree, transform, tree_nodes
from ..oracle.enumeration import alignment_masses
from ..oracle.frames import ANCHOR, HARD, from_odds, hard_frames, log_probs, random_frames


def checked_transform(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    """Valid, the inputs as they were, unused rows filled with the anchor."""
    num_tokens = frames.logits.shape[2]
    anchor = frames.anchor.clamp(max=num_tokens - 1)
    before = [x.clone() for x in frames[:3]]
    tree = ctc_transform(frames._replace(anchor=anchor), budget, chain_only)
    assert all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(frames, before))
    assert (anchor == min(ANCHOR, num_tokens - 1)).all()
    tree.check(num_tokens)
    assert (tree.tokens[tree.parents < 0] == anchor[0]).all()
    assert (tree.depths <= budget.depth).all()
    return tree


def assert_equals_the_oracle(frames: Frames, budget: Budget) -> None:
    tree = checked_transform(frames, budget)
    for row in range(len(frames.logits)):
        assert_is_the_cut(tree, row, transform(frames, row, *budget))


def prefix_log_prob(frames: Frames, labels: tuple[int, ...]) -> float:
    """By the forward vectors of oracle.py, of request 0."""
    log_p = log_probs(frames, 0)
    prefix = oracle.Prefix.root(log_p)
    for label in labels:
        prefix = prefix.extend(log_p, label)
    return prefix.log_prob.item()


# The oracle, and the reference, where the beam of 64 drops nothing.


@pytest.mark.parametrize("num_tokens, num_frames", [(1, 1), (1, 6), (2, 1), (2, 3), (3, 3), (7, 2), (63, 1)])
def test_without_pruning_scores_are_prefix_probabilities(num_tokens: int, num_frames: int) -> None:
    frames = random_frames(1, num_frames, num_tokens, seed=num_tokens, scale=1.5)
    starts, _ = alignment_masses(log_probs(frames, 0))
    exact = {labels: math.log(mass) for labels, mass in starts.items() if labels}
    budget = Budget(64, num_tokens + 1, num_frames)
    nodes = transform(frames, 0, *budget)
    assert nodes == pytest.approx(exact, rel=1e-5, abs=1e-5)
    found = tree_nodes(checked_transform(frames, budget), 0)
    assert found == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_the_beam_keeps_the_best_paths_and_its_scores_are_lower_bounds() -> None:
    frames = random_frames(1, 6, 5, seed=1, scale=1.0)
    levels, _ = raw_tree(frames, 0, 8, 4)
    assert [len(level) for level in levels] == [4, 8, 8, 8, 8, 8]
    assert all(level == sorted(level, reverse=True) for level in levels)
    for labels, score in transform(frames, 0, 8, 4, 6).items():
        assert score < prefix_log_prob(frames, labels) + 1e-5


# The collapse.


def forced(alignment: str) -> Frames:
    """Frames that give each symbol of the alignment, "-" for the blank, nearly all probability."""
    logits, odds = torch.zeros(1, len(alignment), 5), torch.full((1, len(alignment)), -9.0)
    for t, symbol in enumerate(alignment):
        if symbol == "-":
            odds[0, t] = 9.0
        else:
            logits[0, t, "abcde".index(symbol)] = 12.0
    return from_odds(logits, odds)


@pytest.mark.parametrize(
    "alignment, labels",
    [
        ("aa-a", "aa"),
        ("a-a", "aa"),
        ("aaaa", "a"),
        ("--a--a--", "aa"),
        ("----", ""),
        ("b", "b"),
        ("bbb", "b"),  # b is the anchor
        ("ab-ba", "abba"),
        ("aab-bb-c", "abbc"),
        ("abab", "abab"),
    ],
)
@pytest.mark.parametrize("chain_only", [False, True])
def test_collapse_of_a_certain_alignment(alignment: str, labels: str, chain_only: bool) -> None:
    tree = checked_transform(forced(alignment), Budget(16, 4, len(alignment)), torch.tensor([chain_only]))
    expected = tuple("abcde".index(label) for label in labels)
    likely = [labels for labels, score in tree_nodes(tree, 0).items() if score > -1]
    assert likely == [expected[:length] for length in range(1, len(expected) + 1)]
    assert not chain_only or tree.num_nodes.item() == len(labels)


def test_equal_prefixes_are_one_node() -> None:
    # Two frames over one token: a-, aa, -a all begin with a, and only 1/4 for each; nothing else has a label.
    half = torch.full((1, 2), 0.5).log()
    tree = ctc_transform(Frames(torch.zeros(1, 2, 1), half, half, torch.tensor([0])), Budget(8, 2, 2))
    assert tree_nodes(tree, 0) == pytest.approx({(0,): torch.tensor(0.75).log().item()})


# The reference against the oracle.


@pytest.mark.parametrize("width", [1, 2, 10, 64])
@pytest.mark.parametrize("num_nodes", [1, 8, 64])
@pytest.mark.parametrize("batch, num_frames", [(1, 1), (3, 12)])
def test_random_frames(batch: int, num_frames: int, num_nodes: int, width: int) -> None:
    frames = random_frames(batch, num_frames, 90, seed=num_nodes + width, scale=1.5)
    assert_equals_the_oracle(frames, Budget(num_nodes, width, 12))


@pytest.mark.parametrize("num_nodes, width", [(16, 10), (13, 3), (64, 64)])
@pytest.mark.parametrize("name", HARD)
def test_hard_frames(name: str, num_nodes: int, width: int) -> None:
    assert_equals_the_oracle(hard_frames(name, 1, 12, 37), Budget(num_nodes, width, 12))


@pytest.mark.parametrize("num_tokens, scale", [(2, 0.3), (3, 0.3), (3, 1.0), (40, 15.0)])
def test_frames_with_many_equal_prefixes_and_with_few(num_tokens: int, scale: float) -> None:
    for seed in range(5):
        assert_equals_the_oracle(random_frames(2, 9, num_tokens, seed=seed, scale=scale), Budget(24, 5, 9))


@pytest.mark.parametrize("depth", [1, 2, 4, 40])
def test_depth(depth: int) -> None:
    frames, budget = random_frames(2, 12, 30, seed=5), Budget(20, 6, depth)
    frames = frames._replace(log_blank=frames.log_blank - 4)  # little blank: the best nodes are deep
    assert_equals_the_oracle(frames, budget)
    depths = checked_transform(frames, budget).depths
    assert depths.max() == depth if depth < 40 else depths.max() > 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    frames = random_frames(2, 12, 300, seed=7)
    assert_equals_the_oracle(frames._replace(logits=frames.logits.to(dtype)), Budget(16, 10, 12))


def test_frames_that_are_views() -> None:
    wide = random_frames(3, 14, 50, seed=3)
    frames = Frames(*(x[::2, 1:-1] for x in wide[:3]), wide.anchor[::2])
    assert_equals_the_oracle(frames, Budget(16, 10, 12))


def test_long_frames_and_more_symbols_than_there_are() -> None:
    assert_equals_the_oracle(random_frames(1, 32, 40, seed=2), Budget(32, 5000, 32))


@pytest.mark.parametrize("width", [1, 5])
def test_without_tokens_there_are_no_nodes(width: int) -> None:
    frames = random_frames(2, 6, 9, seed=1) if width == 1 else hard_frames("all blank", 2, 6, 9)
    assert checked_transform(frames, Budget(8, width, 6)).num_nodes.tolist() == [0, 0]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_frame_that_is_not_a_number_empties_its_row_only(which: int) -> None:
    clean, broken, budget = random_frames(3, 6, 9, seed=1), random_frames(3, 6, 9, seed=1), Budget(8, 4, 6)
    broken[which][1, 3] = torch.nan
    tree = checked_transform(broken, budget)
    expected = checked_transform(clean, budget)
    assert tree.num_nodes.tolist() == [8, 0, 8]
    assert torch.equal(tree.tokens[::2], expected.tokens[::2])
    assert torch.equal(tree.scores[::2], expected.scores[::2])


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("width", [1, 2, 10])
def test_chain_only_rows_are_the_collapsed_best_alignment(width: int, depth: int) -> None:
    frames = random_frames(6, 12, 5, seed=4, scale=2.0)
    chain_only, budget = torch.arange(6) % 3 > 0, Budget(16, width, depth)
    tree = checked_transform(frames, budget, chain_only)
    p = torch.cat([frames.logits + frames.log_scale[..., None], frames.log_blank[..., None]], 2)
    if width == 1:
        p[..., :5] = -torch.inf
    labels, lengths = collapse(p.argmax(2), 5, frames.anchor, depth)
    free = checked_transform(frames, budget)
    for row in range(6):
        if chain_only[row]:
            length = lengths[row].item()
            assert tree.num_nodes[row] == length
            assert tree.path(row, length) == labels[row, :length].tolist()
            assert tree.parents[row, : length + 1].tolist() == list(range(-1, length))
        else:
            assert torch.equal(tree.tokens[row], free.tokens[row])
            assert torch.equal(tree.parents[row], free.parents[row])


@pytest.mark.parametrize("num_nodes", [0, 65])
def test_budgets_that_do_not_fit_are_refused(num_nodes: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 nodes"):
        ctc_transform(random_frames(1, 3, 4, seed=0), Budget(num_nodes, 4, 3))
