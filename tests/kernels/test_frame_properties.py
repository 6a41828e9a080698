"""Properties of the functions from frames to drafts, with hypothesis: sizes at random, values that break careless code.
Other tests here compare with oracles on chosen inputs; these hold for whatever comes."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_ctc_spec.draft.ctc import CHAINS, TREES, draft_chain, draft_tree
from vllm_ctc_spec.kernels.collapse import collapse
from vllm_ctc_spec.kernels.contract import Budget, Frames
from vllm_ctc_spec.kernels.frame_stats import frame_stats
from vllm_ctc_spec.kernels.prefix_search import prefix_search

from ..oracle.frames import from_odds, sampling_for, whole_chain

BLANK, ANCHOR = 0, 9
INF, NAN = math.inf, math.nan
LOGITS = st.sampled_from([-INF, -60.0, -1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 60.0])  # ties, certainty, impossibility
ODDS = st.sampled_from([-INF, -60.0, -1.0, 0.0, 0.0, 1.0, 60.0, INF])
# For comparisons with fp64: conditionals of 1e-30 and less are none, by definition of the search.
MILD = st.sampled_from([-INF, -9.0, -1.0, 0.0, 0.0, 0.5, 2.0, 9.0])
BROKEN = st.sampled_from([NAN, INF, -INF, 3e38, -3e38, 0.0, 1.0])
alignments = st.lists(st.integers(0, 3), min_size=1, max_size=24)


@st.composite
def frames(draw, logits=LOGITS, odds=ODDS, max_frames=4, max_tokens=3) -> Frames:
    """Of one request, whose anchor is token 0."""
    num_frames, num_tokens = draw(st.integers(1, max_frames)), draw(st.integers(1, max_tokens))
    values = draw(st.lists(logits, min_size=num_frames * num_tokens, max_size=num_frames * num_tokens))
    blanks = draw(st.lists(odds, min_size=num_frames, max_size=num_frames))
    given = from_odds(torch.tensor(values).view(1, num_frames, num_tokens), torch.tensor([blanks]))
    return given._replace(anchor=torch.tensor([0]))


def labels_of(alignment: list[int], num_labels: int = 24) -> list[int]:
    labels, lengths = collapse(torch.tensor([alignment]), BLANK, torch.tensor([ANCHOR]), num_labels)
    return labels[0, : lengths[0]].tolist()


def test_collapse_does_not_see_how_long_a_symbol_lasts(examples):
    @examples(50)
    @given(alignments, st.data())
    def holds(alignment, data):
        longer = [symbol for symbol in alignment for _ in range(data.draw(st.integers(1, 3)))]
        assert labels_of(longer, 72) == labels_of(alignment, 72)

    holds()


def test_collapse_undoes_the_spelling_of_any_labels(examples):
    """A blank between repeats, and blanks wherever they please: the labels come back, and fewer are their beginning."""

    @examples(50)
    @given(st.lists(st.integers(1, 3), max_size=12), st.data())
    def holds(labels, data):
        spelled = [BLANK] * data.draw(st.integers(1, 2))
        for before, label in zip([None, *labels], labels):
            spelled += [BLANK] * data.draw(st.integers(int(before == label), 2)) + [label]
        assert labels_of(spelled, 40) == labels
        cut = data.draw(st.integers(1, 12))
        assert labels_of(spelled, cut) == labels[:cut]

    holds()


def test_collapse_is_idempotent_where_no_label_repeats(examples):
    @examples(50)
    @given(alignments)
    def holds(alignment):
        labels = labels_of(alignment)
        assume(labels)
        once = [label for label, _ in itertools.groupby(labels)]
        assert labels_of(once) == once
        assert set(labels) == set(alignment) - {BLANK}

    holds()


def prefix_masses(given_frames: Frames) -> dict[tuple, float]:
    """The probability that the labels begin so, for every beginning, by enumeration of all alignments in fp64. A frame
    without any token is no distribution."""
    logits, log_scale, log_blank = given_frames[:3]
    assume((logits > -INF).any(2).all())
    p = (logits[0].double() + log_scale[0].double()[:, None]).exp().masked_fill(logits[0] == -INF, 0)
    p = torch.cat([log_blank[0].double().exp()[:, None], p], 1).tolist()
    masses: Counter[tuple] = Counter()
    for alignment in itertools.product(range(len(p[0])), repeat=len(p)):
        mass = math.prod(frame[symbol] for frame, symbol in zip(p, alignment))
        labels = [symbol - 1 for symbol, _ in itertools.groupby(alignment) if symbol != 0]
        for length in range(1, len(labels) + 1):
            masses[tuple(labels[:length])] += mass
    return masses


def test_the_tree_is_the_most_probable_prefixes_of_all_alignments(examples):
    @examples(150)
    @given(frames(MILD, MILD), st.integers(1, 12), st.integers(1, 4))
    def holds(given_frames, num_nodes, depth):
        masses = {labels: mass for labels, mass in prefix_masses(given_frames).items() if len(labels) <= depth}
        tree = prefix_search(given_frames, Budget(num_nodes, 3, depth))
        tree.check(given_frames.logits.shape[2])
        found = {
            tuple(tree.path(0, node)): tree.scores[0, node].double().exp().item()
            for node in range(1, 1 + int(tree.num_nodes[0]))
        }
        for labels, mass in found.items():
            assert masses[labels] == pytest.approx(mass, rel=1e-3, abs=1e-30), labels
        left_out = [mass for labels, mass in masses.items() if labels not in found]
        if len(found) == num_nodes:
            assert max(left_out, default=0) <= min(found.values()) * (1 + 1e-3)
        else:  # only what is all but impossible, given what came before it, is no node
            assert all(
                mass <= 1e-15 * masses.get(labels[:-1], 1.0) for labels, mass in masses.items() if labels not in found
            )

    holds()


def test_children_share_their_parents_probability(examples):
    @examples(60)
    @given(frames(max_frames=8, max_tokens=6), st.integers(1, 64))
    def holds(given_frames, num_nodes):
        tree = prefix_search(given_frames, Budget(num_nodes, 6, 8))
        shares: Counter[int] = Counter()
        for node in range(1, 1 + int(tree.num_nodes[0])):
            shares[int(tree.parents[0, node])] += tree.scores[0, node].double().exp().item()
        for parent, share in shares.items():
            assert share <= tree.scores[0, parent].double().exp().item() * (1 + 1e-4)

    holds()


def test_a_smaller_budget_is_the_beginning_of_a_larger_one(examples):
    @examples(60)
    @given(frames(max_frames=8, max_tokens=6), st.integers(1, 63), st.integers(1, 8))
    def holds(given_frames, num_nodes, depth):
        small, large = (prefix_search(given_frames, Budget(nodes, 6, depth)) for nodes in (num_nodes, 64))
        for name, values in vars(large).items():
            assert torch.equal(getattr(small, name), values[:, : 1 + num_nodes]), name

    holds()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chain_follows_the_conditionals_of_all_alignments(temperature, examples):
    @examples(80)
    @given(frames(MILD, MILD))
    def holds(given_frames):
        masses = prefix_masses(given_frames)
        num_tokens = given_frames.logits.shape[2]
        sampling = sampling_for(1, 4, num_tokens, [temperature])
        labels, lengths = whole_chain(given_frames, 4, sampling)
        prefix: tuple = ()
        for step, label in enumerate(labels[0, : lengths[0]].tolist()):
            conditionals = torch.tensor([masses[(*prefix, token)] for token in range(num_tokens)])
            law = torch.softmax(sampling.draft_logits[0, step].double(), 0)
            torch.testing.assert_close(law, (conditionals / conditionals.sum()).double(), rtol=0, atol=1e-3)
            if temperature == 0:
                assert law[label] == law.max()
            prefix = (*prefix, label)

    holds()


def test_frames_of_any_kind_draft_real_tokens(examples):
    """Frames with NaN, infinities and the largest floats: drafts stay well formed, whatever they are worth."""

    @examples(150)
    @given(frames(BROKEN, BROKEN, 6, 5), st.sampled_from([0.0, 0.7]), st.integers(1, 7))
    def holds(given_frames, temperature, budget):
        num_tokens = given_frames.logits.shape[2]
        stats = frame_stats(given_frames.logits)
        assert ((stats.best >= 0) & (stats.best < num_tokens)).all()
        for search in CHAINS:
            assert_labels(*draft_chain(search, given_frames, stats, budget), num_tokens)
        sampling = sampling_for(1, budget, num_tokens, [temperature])
        labels, lengths = draft_chain("prefix", given_frames, stats, budget, sampling)
        assert_labels(labels, lengths, num_tokens)
        law = torch.softmax(sampling.draft_logits[0], -1)
        assert not law.isnan().any()
        assert (law.gather(1, labels.T) > 0).all()  # what is drafted could have been drafted
        for search in TREES:
            draft_tree(search, given_frames, Budget(budget, 5, 4)).check(num_tokens)

    holds()


def assert_labels(labels: torch.Tensor, lengths: torch.Tensor, num_tokens: int) -> None:
    assert ((labels >= 0) & (labels < num_tokens)).all()
    assert 0 <= int(lengths) <= labels.shape[1]
