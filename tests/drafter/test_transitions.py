"""Transitions between frames against brute force: every subset of frames and its labels is enumerated, in fp64."""

import itertools
import math

import pytest
import torch

from vllm_ctc_spec.drafter import oracle, recursions
from vllm_ctc_spec.drafter.lattice import NEG, slot_transitions, transition_log_probs

from ..oracle.enumeration import path_masses, scores_of
from ..oracle.frames import random_log_probs

CASES = [(v, t, seed) for v in (1, 2, 3) for t in (1, 2, 3, 4, 5) for seed in (0, 1)]


def random_transitions(num_frames: int, seed: int, stop: float = 0.3) -> torch.Tensor:
    """`A [1 + T, T]`: rows that stop, surely or never or now and then, and transitions that are impossible."""
    generator = torch.Generator().manual_seed(seed * 100 + num_frames)
    transitions = torch.rand(1 + num_frames, num_frames, generator=generator, dtype=torch.float64).triu()
    transitions *= torch.rand(transitions.shape, generator=generator) > 0.2
    transitions *= torch.rand(1 + num_frames, 1, generator=generator) > 0.1
    stops = stop * torch.rand(1 + num_frames, 1, generator=generator) * (torch.arange(1 + num_frames)[:, None] % 2)
    return transitions / transitions.sum(1, keepdim=True).clamp_min(1e-9) * (1 - stops)


def random_case(num_tokens: int, num_frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames without blank `[T, V + 1]` in log space, and transitions."""
    log_probs = random_log_probs(num_tokens, num_frames, seed, with_blank=False)
    return log_probs, random_transitions(num_frames, seed)


def to_log(transitions: torch.Tensor) -> torch.Tensor:
    return transitions.log().clamp_min(NEG)


@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), CASES)
def test_transition_prefixes_equal_enumeration(num_tokens, num_frames, seed):
    log_probs, transitions = random_case(num_tokens, num_frames, seed)
    starts, exact = path_masses(log_probs, transitions)
    assert starts[()] == pytest.approx(1)
    reachable = {(): oracle.TransitionPrefix.root(to_log(transitions))}
    while reachable:
        labels, prefix = reachable.popitem()
        assert math.exp(prefix.log_prob) == pytest.approx(starts[labels], rel=1e-10)
        conditional = prefix.conditional(log_probs).exp()
        for v in range(num_tokens):
            joint = starts.get((*labels, v), 0.0)
            assert float(conditional[v]) * starts[labels] == pytest.approx(joint, rel=1e-10, abs=1e-15)
            if joint > 1e-15:
                reachable[(*labels, v)] = prefix.extend(log_probs, v)
        stop = 1 - float(conditional.sum())
        assert stop * starts[labels] == pytest.approx(exact[labels], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), CASES)
def test_transition_forward_equals_enumeration(num_tokens, num_frames, seed):
    log_probs, transitions = random_case(num_tokens, num_frames, seed)
    starts, exact = path_masses(log_probs, transitions)
    rows = list(itertools.product(range(num_tokens), repeat=min(num_frames, 4)))
    label_log_probs = log_probs[:, torch.tensor(rows)].permute(1, 0, 2)
    forward = recursions.transition_forward(label_log_probs, to_log(transitions).expand(len(rows), -1, -1))
    assert torch.equal(forward.log_fresh, forward.log_repeat)
    for i, row in enumerate(rows):
        prefix = oracle.TransitionPrefix.root(to_log(transitions))
        for k, label in enumerate(row):
            torch.testing.assert_close(forward.log_fresh[i, k].exp(), prefix.phi.exp())
            prefix = prefix.extend(log_probs, label)
            assert math.exp(forward.log_prefix[i, k]) == pytest.approx(starts[row[: k + 1]], rel=1e-10, abs=1e-15)
            assert math.exp(forward.log_exact[i, k]) == pytest.approx(exact[row[: k + 1]], rel=1e-10, abs=1e-15)


def test_transition_gradients():
    draw = torch.Generator().manual_seed(0)
    query, key, offset = (
        torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in ((6, 3), (5, 3), (5,))
    )
    stop = torch.rand(6, 1, generator=draw, dtype=torch.float64).requires_grad_()
    label_log_probs = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64).requires_grad_()

    def total(query, key, offset, stop, label_log_probs):
        log_transitions = (transition_log_probs(query, key, offset) - stop).clamp_min(NEG)
        forward = recursions.transition_forward(label_log_probs, log_transitions.expand(2, -1, -1))
        return forward.log_prefix.sum() + forward.log_exact.sum() + forward.log_fresh[:, 1].exp().sum()

    assert torch.autograd.gradcheck(total, (query, key, offset, stop, label_log_probs))


def test_transitions_without_room_have_no_mass_and_no_nan_gradient():
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    key = torch.zeros(2, 1, dtype=torch.float64)
    log_transitions = transition_log_probs(key.new_zeros(3, 1), key, scores)
    label_log_probs = torch.log_softmax(logits, -1)[None, :, [0, 1, 2]]
    forward = recursions.transition_forward(label_log_probs, log_transitions[None])
    assert (forward.log_prefix[0, :2] > NEG / 2).all()
    assert forward.log_prefix[0, 2] < NEG / 2  # two frames hold two labels
    assert forward.log_exact[0, 2] < NEG / 2
    (forward.log_prefix.sum() + forward.log_exact.sum()).backward()
    assert torch.isfinite(logits.grad).all() and torch.isfinite(scores.grad).all()


def test_transition_log_probs_are_a_softmax_over_later_frames():
    query, key, offset = torch.randn(2, 5, 3), torch.randn(2, 4, 3), torch.randn(4)
    log_transitions = transition_log_probs(query, key, offset)
    assert log_transitions.shape == (2, 5, 4)
    assert (log_transitions[:, 4] == NEG).all()
    for row, s in itertools.product(range(2), range(4)):
        assert (log_transitions[row, s, :s] == NEG).all()
        scores = torch.stack([query[row, s] @ key[row, t] / 3**0.5 + offset[t - s] for t in range(s, 4)])
        torch.testing.assert_close(log_transitions[row, s, s:], torch.log_softmax(scores, 0))


@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), CASES)
def test_greedy_chain_equals_enumeration(num_tokens, num_frames, seed):
    log_probs, transitions = random_case(num_tokens, num_frames, seed)
    starts, _ = path_masses(log_probs, transitions)
    drafted = oracle.chain(log_probs, num_frames + 1, log_transitions=to_log(transitions))
    for k in range(len(drafted.labels) + 1):
        joint = [starts.get((*drafted.labels[:k], v), 0.0) for v in range(num_tokens)]
        scores = torch.tensor(joint, dtype=torch.float64)
        if k == len(drafted.labels):
            assert scores.max() < 1e-15
            break
        torch.testing.assert_close(drafted.log_q[k].exp(), scores / scores.sum())
        assert drafted.labels[k] == int(scores.argmax())


@pytest.mark.parametrize("depth", [1, 3, 9])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_frames", "seed"), CASES)
def test_best_prefixes_equal_enumeration(num_tokens, num_frames, seed, with_head, depth):
    log_probs, transitions = random_case(num_tokens, num_frames, seed)
    generator = torch.Generator().manual_seed(seed)
    label_bias = torch.randn(num_tokens, num_tokens, generator=generator).double() if with_head else None
    anchor = seed % num_tokens
    scores = scores_of(path_masses(log_probs, transitions)[0], num_tokens, depth, label_bias, anchor)
    expected = sorted(scores, key=lambda labels: (-round(scores[labels], 9), len(labels)))
    options = dict(depth=depth, label_bias=label_bias, anchor=anchor, log_transitions=to_log(transitions))
    for num_nodes in (1, 7, 64):
        best = oracle.best_prefixes(log_probs, num_nodes, **options)
        assert [labels for labels, _ in best] == expected[:num_nodes]
        assert [score for _, score in best] == pytest.approx([scores[labels] for labels in expected[:num_nodes]])


def test_slots_are_cross_entropys_law():
    """Frame k is label k: the conditionals are the frames themselves, and T labels use them up."""
    log_probs, log_transitions = random_log_probs(3, 4, 0, with_blank=False), to_log(slot_transitions(4)).double()
    bias = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    drafted = oracle.chain(log_probs, 9, label_bias=bias, anchor=2, log_transitions=log_transitions)
    last = (2, *drafted.labels)
    expected = torch.stack([torch.log_softmax(log_probs[k, :3] + bias[last[k]], -1) for k in range(4)])
    torch.testing.assert_close(drafted.log_q, expected)
    labels = torch.tensor([[1, 1, 0, 2]])
    label_log_probs = log_probs[:, labels].permute(1, 0, 2)
    forward = recursions.transition_forward(label_log_probs, log_transitions[None])
    torch.testing.assert_close(forward.log_prefix, label_log_probs.diagonal(dim1=1, dim2=2).cumsum(1))
    assert (forward.log_exact[:, :3] < NEG / 2).all()  # only the last frame stops
    torch.testing.assert_close(forward.log_exact[:, 3], forward.log_prefix[:, 3])
