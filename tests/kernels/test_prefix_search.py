"""The prefix search against the fp64 oracle, which is proved against enumeration in tests/drafter/test_oracle.py."""

import numba
import pytest
import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels import _compiled
from vllm_ctc_spec.kernels.contract import Budget, Frames
from vllm_ctc_spec.kernels.prefix_search import greedy_chain, prefix_search

from ..oracle.frames import (
    ANCHOR,
    HARD,
    TRANSITIONS,
    anchors,
    from_odds,
    hard_frames,
    log_probs,
    log_transitions,
    markov_head,
    random_frames,
    token_frames,
    transitions_between,
    whole_chain,
)
from .searches import Nodes, assert_same_nodes, certain_frames, nodes_of, realistic_frames


def best_nodes(frames: Frames, row: int, num_nodes: int, depth: int, bias_width: int | None = None) -> Nodes:
    """bias_width: the head's bias is 0 outside of the best so many tokens of each frame, as the search defines it."""
    bias = None
    if frames.markov is not None:
        w_in, w_out = frames.markov
        bias = w_in.double() @ w_out.double().T
        if bias_width is not None:
            bias *= torch.zeros(len(bias), dtype=torch.float64).index_fill_(0, candidates(frames, row, bias_width), 1)
    log_p, lattice = log_probs(frames, row), log_transitions(frames, row)
    return oracle.best_prefixes(log_p, num_nodes, depth=depth, label_bias=bias, anchor=ANCHOR, log_transitions=lattice)


def candidates(frames: Frames, row: int, width: int) -> torch.Tensor:
    return frames.logits[row].topk(width).indices.flatten()


def assert_equals_oracle(frames: Frames, budget: Budget, bias_width: int | None = None) -> None:
    batch, _, num_tokens = frames.logits.shape
    tree = prefix_search(frames, budget)
    tree.check(num_tokens)
    assert tree.tokens.shape == (batch, 1 + budget.nodes)
    assert (tree.tokens[:, 0] == ANCHOR).all()
    for row in range(batch):
        assert_same_nodes(nodes_of(tree, row), best_nodes(frames, row, budget.nodes, budget.depth, bias_width))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("num_nodes", [8, 64])
@pytest.mark.parametrize("name", [name for name in HARD if name != "labels below the end of the chain"])
def test_hard_frames(name: str, num_nodes: int, rank: int) -> None:
    frames = hard_frames(name, 1, 12, 37)._replace(markov=markov_head(37, rank))
    assert_equals_oracle(frames, Budget(num_nodes, 37, 8))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("num_nodes", [1, 8, 64])
@pytest.mark.parametrize("batch, num_frames, depth", [(1, 1, 4), (3, 12, 5), (1, 12, 1), (1, 32, 40)])
def test_random_frames(batch: int, num_frames: int, depth: int, num_nodes: int, rank: int) -> None:
    frames = random_frames(batch, num_frames, 23, seed=num_frames)._replace(markov=markov_head(23, rank, scale=2.0))
    assert_equals_oracle(frames, Budget(num_nodes, num_nodes + 22, depth))


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("num_frames, depth", [(1, 4), (5, 3), (12, 40)])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions(name: str, num_frames: int, depth: int, rank: int) -> None:
    frames = token_frames(2, num_frames, 23, seed=num_frames)._replace(
        markov=markov_head(23, rank, scale=2.0), transitions=transitions_between(name, 2, num_frames)
    )
    assert_equals_oracle(frames, Budget(32, 23, depth))


@pytest.mark.parametrize("width", [1, 4])
def test_transitions_with_mass_outside_of_the_candidates(width: int) -> None:
    frames = token_frames(1, 5, 40, seed=4)._replace(
        markov=markov_head(40, 5, scale=2.0), transitions=transitions_between("stops and gaps", 1, 5)
    )
    tree = prefix_search(frames, Budget(16, width, 3))
    tree.check(40)
    among = set(candidates(frames, 0, width).tolist())
    everything = best_nodes(frames, 0, 4000, 3, width)
    expected = [(labels, score) for labels, score in everything if among.issuperset(labels)]
    assert_same_nodes(nodes_of(tree, 0), expected[:16])


def test_slots_are_the_best_products_of_frames() -> None:
    """The cross-entropy twin: a node's score is the sum of its frames' log-probabilities, repeats included."""
    frames = token_frames(1, 4, 6, seed=2)._replace(transitions=transitions_between("slots", 1, 4))
    log_p = (frames.logits + frames.log_scale[..., None])[0]
    scores = {(u,): log_p[0, u].item() for u in range(6)}
    for k in range(1, 4):
        longest = {labels: score for labels, score in scores.items() if len(labels) == k}
        scores |= {(*y, u): score + log_p[k, u].item() for y, score in longest.items() for u in range(6)}
    expected = sorted(scores.items(), key=lambda node: -node[1])[:64]
    tree = prefix_search(frames, Budget(64, 6, 4))
    assert_same_nodes(nodes_of(tree, 0), expected, atol=5e-6)
    assert any(a == b for labels, _ in expected for a, b in zip(labels, labels[1:]))


@pytest.mark.parametrize("seed", [0, 1])
def test_realistic_frames_over_a_large_vocabulary(seed: int) -> None:
    assert_equals_oracle(realistic_frames(1, 12, 2048, seed), Budget(64, 64, 8))


def test_the_head_over_a_large_vocabulary() -> None:
    frames = realistic_frames(1, 12, 2048, seed=2)._replace(markov=markov_head(2048, 64))
    assert_equals_oracle(frames, Budget(64, 64, 8), bias_width=64)
    # Against the full definition only what the head does to the tokens outside of the candidates is missing.
    tree = prefix_search(frames, Budget(64, 64, 8))
    exact, got = dict(best_nodes(frames, 0, 64, 8)), dict(nodes_of(tree, 0))
    common = exact.keys() & got.keys()
    assert len(common) >= 62
    assert max(abs(exact[labels] - got[labels]) for labels in common) < 0.25


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("name", ["realistic", "empty frames", "nearly all blank", "no blank"])
def test_narrow_searches_are_exact_among_the_candidates(name: str, width: int, rank: int) -> None:
    """The other tokens are in no node, but the head's normaliser counts their mass."""
    frames = realistic_frames(1, 5, 40, seed=4)
    if name == "nearly all blank":
        frames = from_odds(frames.logits, torch.full((1, 5), 18.0))
    elif name != "realistic":
        frames = hard_frames(name, 1, 5, 40)
    frames = frames._replace(markov=markov_head(40, rank, scale=2.0))
    tree = prefix_search(frames, Budget(16, width, 3))
    tree.check(40)
    among = set(candidates(frames, 0, width).tolist())
    everything = best_nodes(frames, 0, 1500, 3, width)
    expected = [(labels, score) for labels, score in everything if among.issuperset(labels)]
    assert_same_nodes(nodes_of(tree, 0), expected[:16])


def test_rows_are_cut_to_the_tree_of_a_smaller_budget() -> None:
    frames = realistic_frames(2, 12, 300, seed=5)._replace(markov=markov_head(300, 5))
    whole = prefix_search(frames, Budget(64, 20, 6))
    for num_nodes in (1, 2, 17, 40):
        cut = prefix_search(frames, Budget(num_nodes, 20, 6))
        for field in ("tokens", "parents", "depths", "ancestors"):
            assert torch.equal(getattr(cut, field), getattr(whole, field)[:, : 1 + num_nodes])
        torch.testing.assert_close(cut.scores, whole.scores[:, : 1 + num_nodes])


def test_ties_go_to_the_shallower_then_to_the_first_parent_then_to_the_lower_token() -> None:
    half = torch.full((1, 2), 0.5).log()
    budget = Budget(9, 9, 9)
    tree = prefix_search(Frames(torch.full((1, 2, 2), 0.25).log(), torch.zeros(1, 2), half, anchors(1)), budget)
    assert [labels for labels, _ in nodes_of(tree, 0)] == [(0,), (1,), (0, 1), (1, 0)]
    # One label and no blank: after the first label all mass stays with it.
    tree = prefix_search(hard_frames("no blank, one label", 1, 12, 37), budget)
    assert nodes_of(tree, 0) == [((36,), 0.0)]
    # Two slots of two tokens each.
    frames = Frames(torch.full((1, 2, 2), 0.5).log(), torch.zeros(1, 2), half * torch.inf, anchors(1))
    tree = prefix_search(frames._replace(transitions=torch.eye(3, 2)[None]), budget)
    assert [labels for labels, _ in nodes_of(tree, 0)] == [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]


def test_no_child_outranks_its_parent() -> None:
    for transitions in (None, transitions_between("slots", 1, 6)):
        tree = prefix_search(certain_frames(6)._replace(transitions=transitions), Budget(8, 6, 8))
        tree.check(6)
        assert nodes_of(tree, 0) == [(tuple(range(length)), 0.0) for length in range(1, 7)]


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("lattice", [None, "spread", "slots"])
@pytest.mark.parametrize("num_nodes, depth", [(4, 9), (9, 4), (16, 16)])
def test_chain_rows_are_the_greedy_chain_and_others_the_tree(
    num_nodes: int, depth: int, lattice: str | None, rank: int
) -> None:
    frames, budget = random_frames(4, 6, 40, seed=6), Budget(num_nodes, 40, depth)
    if lattice is not None:
        frames = token_frames(4, 6, 40, seed=6)._replace(transitions=transitions_between(lattice, 4, 6))
    frames = frames._replace(markov=markov_head(40, rank))
    chain_only = torch.tensor([True, False, True, False])
    mixed = prefix_search(frames, budget, chain_only)
    mixed.check(40)
    tree = prefix_search(frames, budget)
    labels, lengths = whole_chain(frames, min(num_nodes, depth))
    for row in range(4):
        if chain_only[row]:
            used = int(mixed.num_nodes[row])
            assert used == lengths[row]
            assert mixed.path(row, used) == labels[row, :used].tolist()
            assert mixed.parents[row, 1 : 1 + used].tolist() == list(range(used))
        else:
            assert_same_nodes(nodes_of(mixed, row), nodes_of(tree, row), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("lattice", [None, "spread", "slots"])
@pytest.mark.parametrize("num_labels", [3, 9])
def test_a_greedy_chain_of_all_tokens_is_that_of_the_sweeps(num_labels: int, lattice: str | None, rank: int) -> None:
    transitions = None if lattice is None else transitions_between(lattice, 5, 6)
    frames = token_frames(5, 6, 40, seed=7)._replace(markov=markov_head(40, rank), transitions=transitions)
    frames.logits[0] = torch.nan
    labels, lengths = greedy_chain(frames, num_labels, 40)
    swept, swept_lengths = whole_chain(frames, num_labels)
    assert lengths.dtype == swept_lengths.dtype and lengths.tolist() == swept_lengths.tolist()
    assert lengths[0] == 0 and lengths.max() > 1
    for row, used in enumerate(lengths.tolist()):
        assert labels[row, :used].tolist() == swept[row, :used].tolist()
        assert labels[row, used:].tolist() == [int(anchors(5)[row])] * (num_labels - used)


def test_a_greedy_chain_has_candidates_alone() -> None:
    """The head makes a token the best label that no frame ranks first."""
    frames = random_frames(1, 4, 9, seed=2)
    ranked = frames.logits.topk(1, dim=2).indices.flatten().tolist()
    other = next(token for token in range(9) if token not in ranked)
    inner, outer = torch.zeros(9, 1), torch.zeros(9, 1)
    inner[:], outer[other] = 1.0, 50.0
    frames = frames._replace(markov=(inner, outer))
    assert greedy_chain(frames, 1, 9)[0].item() == other
    assert greedy_chain(frames, 1, 1)[0].item() in ranked


def test_what_is_impossible_or_not_a_number_is_no_node() -> None:
    frames = random_frames(3, 6, 9, seed=1)._replace(anchor=torch.tensor([5, 6, 7]))
    frames.log_blank[0] = torch.nan
    frames.logits[1] = torch.nan
    frames.log_scale[1] = torch.nan
    for markov in (None, markov_head(9, 5)):
        tree = prefix_search(frames._replace(markov=markov), Budget(8, 4, 4))
        tree.check(9)
        assert tree.num_nodes.tolist() == [0, 0, 8]
        assert tree.tokens[:2].tolist() == [[5] * 9, [6] * 9]
        below = hard_frames("labels below the end of the chain", 2, 12, 9)._replace(markov=markov)
        assert prefix_search(below, Budget(8, 9, 4)).num_nodes.tolist() == [0, 0]
    not_a_head = (torch.full((9, 5), torch.nan), torch.ones(9, 5))
    frames = random_frames(1, 6, 9, seed=1)._replace(markov=not_a_head)
    assert prefix_search(frames, Budget(8, 4, 4)).num_nodes.tolist() == [0]


def test_a_head_with_large_biases_keeps_its_law() -> None:
    frames, (w_in, w_out) = random_frames(1, 6, 20, seed=7), markov_head(20, 5, scale=5.0)
    budget = Budget(16, 20, 4)
    for scale in (10.0, -10.0):
        assert_equals_oracle(frames._replace(markov=(w_in * scale, w_out * abs(scale))), budget)
    shifted, zero = (
        prefix_search(frames._replace(markov=(torch.ones(20, 1), torch.full((20, 1), bias))), budget)
        for bias in (-200.0, 0.0)
    )
    torch.testing.assert_close(shifted.scores, zero.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    frames, budget = realistic_frames(2, 12, 50, seed=8), Budget(16, 50, 6)
    logits, markov = frames.logits.to(dtype), tuple(x.to(dtype) for x in markov_head(50, 5))
    half = prefix_search(frames._replace(logits=logits, markov=markov), budget)
    full = prefix_search(frames._replace(logits=logits.float(), markov=tuple(x.float() for x in markov)), budget)
    assert torch.equal(half.scores, full.scores) and torch.equal(half.tokens, full.tokens)


def test_inputs_are_not_modified() -> None:
    frames, budget, chain_only = realistic_frames(2, 12, 50, seed=9), Budget(16, 8, 6), torch.tensor([False, True])
    frames = frames._replace(markov=markov_head(50, 5), transitions=transitions_between("spread", 2, 12))
    inputs = [*frames[:4], *frames.markov, frames.transitions, chain_only]
    before = [x.clone() for x in inputs]
    prefix_search(frames, budget, chain_only)
    prefix_search(frames._replace(transitions=None), budget, chain_only)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("num_nodes", [0, 65])
def test_refuses_a_budget_that_does_not_fit(num_nodes: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 64 nodes, not {num_nodes}"):
        prefix_search(random_frames(1, 4, 9, seed=0), Budget(num_nodes, 4, 4))


def test_the_loops_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def without_cache(*args, cache: bool = False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args)

    monkeypatch.setattr(_compiled.numba, "njit", without_cache)
    assert _compiled.compiled(lambda x: x + 1)(2) == 3
