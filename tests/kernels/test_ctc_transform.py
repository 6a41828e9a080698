"""The CTC transform: its oracle against exact prefix probabilities, then the torch reference against the oracle."""

import itertools

import pytest
import torch
from vllm_ctc_spec.kernels.collapse import collapse
from vllm_ctc_spec.kernels.contract import DraftTree
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform

from vllm_ctc_spec import ctc

from .ctc_transform_oracle import assert_is_the_cut, raw_tree, transform, tree_nodes
from .frames import ANCHOR, HARD, anchors, hard_frames, random_frames


def checked_transform(frames: tuple, num_nodes: int, width: int, depth: int, **kwargs) -> DraftTree:
    """Valid, the inputs as they were, unused rows filled with the anchor."""
    before = [x.clone() for x in frames]
    anchor = anchors(len(frames[0])).clamp(max=frames[0].shape[2] - 1)
    tree = ctc_transform(*frames, anchor, num_nodes, width, depth, **kwargs)
    assert all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(frames, before))
    assert (anchor == min(ANCHOR, frames[0].shape[2] - 1)).all()
    tree.check(frames[0].shape[2])
    assert (tree.tokens[tree.parents < 0] == anchor[0]).all()
    assert (tree.depths <= depth).all()
    return tree


def assert_equals_the_oracle(frames: tuple, num_nodes: int, width: int, depth: int) -> None:
    tree = checked_transform(frames, num_nodes, width, depth)
    for row in range(len(frames[0])):
        assert_is_the_cut(tree, row, transform(frames, row, num_nodes, width, depth))


def prefix_log_prob(frames: tuple, labels: tuple[int, ...]) -> float:
    """By the forward vectors of ctc.py, of request 0."""
    logits, log_label, log_blank = (x[0].double() for x in frames)
    log_p = torch.cat([logits + log_label[:, None], log_blank[:, None]], 1)
    prefix = ctc.Prefix.root(log_p)
    for label in labels:
        prefix = prefix.extend(log_p, label)
    return prefix.log_prob.item()


# The oracle, and the reference, where the beam of 64 drops nothing.


@pytest.mark.parametrize("num_tokens, num_frames", [(1, 1), (1, 6), (2, 1), (2, 3), (3, 3), (7, 2), (63, 1)])
def test_without_pruning_scores_are_prefix_probabilities(num_tokens: int, num_frames: int) -> None:
    frames = random_frames(1, num_frames, num_tokens, seed=num_tokens, scale=1.5)
    exact = {}
    for alignment in itertools.product(range(num_tokens + 1), repeat=num_frames):
        labels = tuple(ctc.collapse(alignment, num_tokens))
        for length in range(1, len(labels) + 1):
            exact[labels[:length]] = prefix_log_prob(frames, labels[:length])
    nodes = transform(frames, 0, 64, num_tokens + 1, num_frames)
    assert nodes == pytest.approx(exact, rel=1e-5, abs=1e-5)
    found = tree_nodes(checked_transform(frames, 64, num_tokens + 1, num_frames), 0)
    assert found == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_the_beam_keeps_the_best_paths_and_its_scores_are_lower_bounds() -> None:
    frames = random_frames(1, 6, 5, seed=1, scale=1.0)
    levels, _ = raw_tree(frames, 0, 8, 4)
    assert [len(level) for level in levels] == [4, 8, 8, 8, 8, 8]
    assert all(level == sorted(level, reverse=True) for level in levels)
    for labels, score in transform(frames, 0, 8, 4, 6).items():
        assert score < prefix_log_prob(frames, labels) + 1e-5


# The collapse.


def forced(alignment: str) -> tuple:
    """Frames that give each symbol of the alignment, "-" for the blank, nearly all probability."""
    logits, odds = torch.zeros(1, len(alignment), 5), torch.full((1, len(alignment)), -9.0)
    for t, symbol in enumerate(alignment):
        if symbol == "-":
            odds[0, t] = 9.0
        else:
            logits[0, t, "abcde".index(symbol)] = 12.0
    log_label = torch.nn.functional.logsigmoid(-odds) - logits.logsumexp(-1)
    return logits, log_label, torch.nn.functional.logsigmoid(odds)


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
    tree = checked_transform(forced(alignment), 16, 4, len(alignment), chain_only=torch.tensor([chain_only]))
    expected = tuple("abcde".index(label) for label in labels)
    likely = [labels for labels, score in tree_nodes(tree, 0).items() if score > -1]
    assert likely == [expected[:length] for length in range(1, len(expected) + 1)]
    assert not chain_only or tree.num_nodes.item() == len(labels)


def test_equal_prefixes_are_one_node() -> None:
    # Two frames over one token: a-, aa, -a all begin with a, and only 1/4 for each; nothing else has a label.
    frames = (torch.zeros(1, 2, 1), torch.full((1, 2), 0.5).log(), torch.full((1, 2), 0.5).log())
    tree = ctc_transform(*frames, torch.tensor([0]), 8, 2, 2)
    assert tree_nodes(tree, 0) == pytest.approx({(0,): torch.tensor(0.75).log().item()})


# The reference against the oracle.


@pytest.mark.parametrize("width", [1, 2, 10, 64])
@pytest.mark.parametrize("num_nodes", [1, 8, 64])
@pytest.mark.parametrize("batch, num_frames", [(1, 1), (3, 12)])
def test_random_frames(batch: int, num_frames: int, num_nodes: int, width: int) -> None:
    frames = random_frames(batch, num_frames, 90, seed=num_nodes + width, scale=1.5)
    assert_equals_the_oracle(frames, num_nodes, width, 12)


@pytest.mark.parametrize("num_nodes, width", [(16, 10), (13, 3), (64, 64)])
@pytest.mark.parametrize("name", HARD)
def test_hard_frames(name: str, num_nodes: int, width: int) -> None:
    assert_equals_the_oracle(hard_frames(name, 1, 12, 37), num_nodes, width, 12)


@pytest.mark.parametrize("num_tokens, scale", [(2, 0.3), (3, 0.3), (3, 1.0), (40, 15.0)])
def test_frames_with_many_equal_prefixes_and_with_few(num_tokens: int, scale: float) -> None:
    for seed in range(5):
        assert_equals_the_oracle(random_frames(2, 9, num_tokens, seed=seed, scale=scale), 24, 5, 9)


@pytest.mark.parametrize("depth", [1, 2, 4, 40])
def test_depth(depth: int) -> None:
    logits, log_label, log_blank = random_frames(2, 12, 30, seed=5)
    frames = (logits, log_label, log_blank - 4)  # little blank: the best nodes are deep
    assert_equals_the_oracle(frames, 20, 6, depth)
    depths = checked_transform(frames, 20, 6, depth).depths
    assert depths.max() == depth if depth < 40 else depths.max() > 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    logits, log_label, log_blank = random_frames(2, 12, 300, seed=7)
    frames = (logits.to(dtype), log_label, log_blank)
    assert_equals_the_oracle(frames, 16, 10, 12)


def test_frames_that_are_views() -> None:
    wide = random_frames(3, 14, 50, seed=3)
    frames = tuple(x[::2, 1:-1] for x in wide)
    assert_equals_the_oracle(frames, 16, 10, 12)


def test_long_frames_and_more_symbols_than_there_are() -> None:
    assert_equals_the_oracle(random_frames(1, 32, 40, seed=2), 32, 5000, 32)


@pytest.mark.parametrize("width", [1, 5])
def test_without_tokens_there_are_no_nodes(width: int) -> None:
    frames = random_frames(2, 6, 9, seed=1) if width == 1 else hard_frames("all blank", 2, 6, 9)
    assert checked_transform(frames, 8, width, 6).num_nodes.tolist() == [0, 0]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_frame_that_is_not_a_number_empties_its_row_only(which: int) -> None:
    clean = random_frames(3, 6, 9, seed=1)
    frames = tuple(x.clone() for x in clean)
    frames[which][1, 3] = torch.nan
    tree = checked_transform(frames, 8, 4, 6)
    expected = checked_transform(clean, 8, 4, 6)
    assert tree.num_nodes.tolist() == [8, 0, 8]
    assert torch.equal(tree.tokens[::2], expected.tokens[::2])
    assert torch.equal(tree.scores[::2], expected.scores[::2])


@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("width", [1, 2, 10])
def test_chain_only_rows_are_the_collapsed_best_alignment(width: int, depth: int) -> None:
    frames = random_frames(6, 12, 5, seed=4, scale=2.0)
    logits, log_label, log_blank = frames
    chain_only = torch.arange(6) % 3 > 0
    tree = checked_transform(frames, 16, width, depth, chain_only=chain_only)
    p = torch.cat([logits + log_label[..., None], log_blank[..., None]], 2)
    if width == 1:
        p[..., :5] = -torch.inf
    labels, lengths = collapse(p.argmax(2), 5, anchors(6), depth)
    free = checked_transform(frames, 16, width, depth)
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
        ctc_transform(*random_frames(1, 3, 4, seed=0), anchors(1), num_nodes, 4, 3)
