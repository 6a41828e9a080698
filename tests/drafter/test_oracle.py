"""The mathematics against brute force: every alignment of every small case is enumerated, in fp64."""

import itertools
import math
from collections import Counter

import pytest
import torch

from vllm_ctc_spec.drafter import oracle, recursions
from vllm_ctc_spec.drafter.lattice import NEG

from ..oracle.chi_square import p_value
from ..oracle.enumeration import alignment_masses, scores_of
from ..oracle.frames import random_log_probs

CASES = [(v, t, seed) for v in (1, 2, 3, 4) for t in (1, 2, 3, 4, 5, 6) for seed in (0, 1) if (v + 1) ** t <= 16000]


@pytest.mark.parametrize(
    ("alignment", "labels"),
    [
        ([], []),
        ([9], []),
        ([1, 1], [1]),
        ([1, 9, 1], [1, 1]),
        ([9, 1, 1, 2, 9, 2, 2], [1, 2, 2]),
        ([3, 2, 3], [3, 2, 3]),
    ],
)
def test_collapse_merges_repeats_then_drops_blanks(alignment, labels):
    assert oracle.collapse(alignment, blank=9) == labels


def test_frames_are_distributions_and_blank_is_an_odds():
    logits, odds = torch.randn(3, 5, dtype=torch.float64), torch.tensor([0.0, 1.5, -2.0], dtype=torch.float64)
    log_probs = oracle.frame_log_probs(logits, odds)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(log_probs[:, -1].exp(), torch.sigmoid(odds))
    torch.testing.assert_close(torch.log_softmax(log_probs[:, :-1], -1), torch.log_softmax(logits, -1))


@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), CASES)
def test_prefix_probabilities_and_conditionals_equal_enumeration(num_tokens, num_frames, seed):
    log_probs = random_log_probs(num_tokens, num_frames, seed)
    starts, exact = alignment_masses(log_probs)
    reachable = {(): oracle.Prefix.root(log_probs)}
    checked = 0
    while reachable:
        labels, prefix = reachable.popitem()
        assert math.exp(prefix.log_prob) == pytest.approx(starts[labels], rel=1e-10)
        conditional = prefix.conditional(log_probs).exp()
        for v in range(num_tokens):
            joint = starts.get((*labels, v), 0.0)
            assert float(conditional[v]) * starts[labels] == pytest.approx(joint, rel=1e-10, abs=1e-300)
            if joint and len(labels) < num_frames:
                reachable[(*labels, v)] = prefix.extend(log_probs, v)
        stop = 1 - float(conditional.sum())
        assert stop * starts[labels] == pytest.approx(exact[labels], rel=1e-8, abs=1e-12)
        checked += 1
    assert checked == len(starts)


@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), CASES)
def test_label_forward_equals_enumeration(num_tokens, num_frames, seed):
    log_probs = random_log_probs(num_tokens, num_frames, seed)
    starts, exact = alignment_masses(log_probs)
    num_labels = min(num_frames, 4)
    rows = list(itertools.product(range(num_tokens), repeat=num_labels))
    labels = torch.tensor(rows)
    label_log_probs = log_probs[:, labels].permute(1, 0, 2)
    forward = recursions.label_forward(label_log_probs, log_probs[:, -1].expand(len(rows), -1), labels)
    for row, log_prefix, log_exact in zip(rows, forward.log_prefix, forward.log_exact):
        for k in range(num_labels):
            assert math.exp(log_prefix[k]) == pytest.approx(starts.get(row[: k + 1], 0.0), rel=1e-10, abs=1e-300)
            assert math.exp(log_exact[k]) == pytest.approx(exact.get(row[: k + 1], 0.0), rel=1e-10, abs=1e-300)


def test_label_forward_weights_are_those_of_the_prefix():
    log_probs = random_log_probs(3, 6, 0)
    labels = torch.tensor([[1, 1, 0]])
    forward = recursions.label_forward(log_probs[:, labels].permute(1, 0, 2), log_probs[None, :, -1], labels)
    prefix = oracle.Prefix.root(log_probs)
    for k, label in enumerate(labels[0].tolist()):
        fresh, repeat = prefix.emission_weights()
        torch.testing.assert_close(forward.log_fresh[0, k].exp(), fresh.exp())
        torch.testing.assert_close(forward.log_repeat[0, k].exp(), repeat.exp())
        prefix = prefix.extend(log_probs, label)


def test_label_forward_gradient():
    log_probs = random_log_probs(3, 5, 1).requires_grad_()
    labels = torch.tensor([[2, 2, 0], [0, 1, 2]])

    def total(x):
        forward = recursions.label_forward(x[:, labels].permute(1, 0, 2), x[:, -1].expand(2, -1), labels)
        return forward.log_prefix.sum() + forward.log_exact[:, -1].sum()

    assert torch.autograd.gradcheck(total, (log_probs,))


def test_infeasible_labels_have_no_mass_and_no_nan_gradient():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    log_probs = oracle.frame_log_probs(logits, torch.zeros(2, dtype=torch.float64))
    labels = torch.tensor([[1, 1]])  # a repeat needs three frames
    forward = recursions.label_forward(log_probs[:, labels].permute(1, 0, 2), log_probs[None, :, -1], labels)
    assert forward.log_prefix[0, 1] < NEG / 2
    forward.log_prefix.sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("seed", range(6))
def test_greedy_chain_equals_enumeration(seed):
    log_probs = random_log_probs(3, 5, seed, scale=1.0)
    starts, _ = alignment_masses(log_probs)
    expected: tuple[int, ...] = ()
    while len(expected) < 4:
        scores = [starts.get((*expected, v), 0.0) for v in range(3)]
        if max(scores) <= 0:
            break
        expected = (*expected, max(range(3), key=scores.__getitem__))
    drafted = oracle.chain(log_probs, 4)
    assert drafted.labels == expected
    for k, label in enumerate(expected):
        scores = torch.tensor([starts.get((*expected[:k], v), 0.0) for v in range(3)], dtype=torch.float64)
        torch.testing.assert_close(drafted.log_q[k].exp(), scores / scores.sum())
        assert label == int(scores.argmax())


def test_chain_ends_where_the_frames_do():
    log_probs = random_log_probs(1, 4, 0)
    assert oracle.chain(log_probs, 9).labels == (0, 0)  # one token only: a repeat takes two frames


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_chain_follows_the_exact_law(temperature):
    log_probs = random_log_probs(3, 4, 3, scale=1.0)
    starts, _ = alignment_masses(log_probs)

    def law_at(temperature: float) -> dict[tuple[int, ...], float]:
        law = {}
        for first, second in itertools.product(range(3), repeat=2):
            q1 = torch.tensor([starts[(v,)] for v in range(3)]) ** (1 / temperature)
            q2 = torch.tensor([starts.get((first, v), 0.0) for v in range(3)]) ** (1 / temperature)
            law[first, second] = float(q1[first] / q1.sum() * q2[second] / q2.sum())
        return law

    law = law_at(temperature)
    generator, counts = torch.Generator().manual_seed(0), Counter()
    for _ in range(1500):
        drafted = oracle.chain(log_probs, 2, temperature=temperature, generator=generator)
        counts[drafted.labels] += 1
        log_q = sum(drafted.log_q[k, v] for k, v in enumerate(drafted.labels))
        assert math.exp(log_q) == pytest.approx(law[drafted.labels], rel=1e-5)
    assert p_value(counts, law) > 1e-3
    assert p_value(counts, law_at(temperature * 1.3)) < 1e-3  # as many draws tell a law that is a little off


def test_label_bias_is_added_before_normalising():
    log_probs = random_log_probs(3, 4, 0)
    bias = torch.randn(3, 3, dtype=torch.float64)
    drafted = oracle.chain(log_probs, 2, label_bias=bias, anchor=2)
    expected = torch.log_softmax(oracle.Prefix.root(log_probs).conditional(log_probs) + bias[2], -1)
    torch.testing.assert_close(drafted.log_q[0], expected)
    prefix = oracle.Prefix.root(log_probs).extend(log_probs, drafted.labels[0])
    expected = torch.log_softmax(prefix.conditional(log_probs) + bias[drafted.labels[0]], -1)
    torch.testing.assert_close(drafted.log_q[1], expected)


@pytest.mark.parametrize("depth", [1, 3, 9])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), [c for c in CASES if (c[0] + 1) ** c[1] <= 1100])
def test_best_prefixes_equal_enumeration(num_tokens, num_frames, seed, with_head, depth):
    log_probs = random_log_probs(num_tokens, num_frames, seed, scale=1.0)
    generator = torch.Generator().manual_seed(seed)
    label_bias = torch.randn(num_tokens, num_tokens, generator=generator).double() if with_head else None
    anchor = seed % num_tokens
    scores = scores_of(alignment_masses(log_probs)[0], num_tokens, depth, label_bias, anchor)
    # Where all of a prefix's mass goes on, its child ties with it: the shallower comes first.
    expected = sorted(scores, key=lambda labels: (-round(scores[labels], 9), len(labels)))
    for num_nodes in (1, 7, 64):
        best = oracle.best_prefixes(log_probs, num_nodes, depth=depth, label_bias=label_bias, anchor=anchor)
        assert [labels for labels, _ in best] == expected[:num_nodes]
        assert [score for _, score in best] == pytest.approx([scores[labels] for labels in expected[:num_nodes]])


def test_best_prefixes_break_ties_by_depth_then_parent_then_token():
    log_probs = torch.tensor([[0.25, 0.25, 0.5]] * 2, dtype=torch.float64).log()
    best = [labels for labels, _ in oracle.best_prefixes(log_probs, 9, depth=9)]
    assert best == [(0,), (1,), (0, 1), (1, 0)]
