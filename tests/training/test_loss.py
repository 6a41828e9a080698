"""Losses against enumeration of every alignment (fp64), their gradients, and what they leave out."""

import itertools
import math

import pytest
import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.drafter.config import LATTICES
from vllm_ctc_spec.drafter.lattice import NEG, FrameOutputs, Lattice
from vllm_ctc_spec.training.loss import LOSSES, RowLoss, position_weights
from vllm_ctc_spec.training.vocabulary import label_scores

from ..oracle.enumeration import alignment_masses, path_masses
from ..oracle.frames import random_outputs

V, T, U = 3, 5, 3
ROWS = list(itertools.product(range(V), repeat=U))
LABELS = torch.tensor(ROWS)
ANCHORS = torch.arange(len(ROWS)) % V
VALID = torch.ones_like(LABELS, dtype=torch.bool)


def random_frames(num_rows=V**U, num_frames=T, seed=0, lattice="ctc") -> FrameOutputs:
    return random_outputs(num_rows, num_frames, V, seed, lattice)


TABLE = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)  # row: the last label


def evaluate(name, frames, labels=LABELS, valid=VALID, table=None, anchors=ANCHORS) -> RowLoss:
    """With logits for hidden states and the identity for both heads."""
    eye = torch.eye(V, dtype=frames.logits.dtype)
    markov = None if table is None else (table, eye)
    scores = label_scores(frames.logits, eye, anchors, labels, markov, frames.lattice.blank_odds is not None)
    return LOSSES[name](frames.lattice, scores, labels, valid)


def masses(frames: FrameOutputs, row: int) -> tuple[dict, dict]:
    """P(the labels start with y) and P(the labels are y) of one row, by enumeration."""
    odds, log_transitions = (None if part is None else part[row] for part in frames.lattice)
    log_probs = oracle.frame_log_probs(frames.logits[row], odds)
    return alignment_masses(log_probs) if odds is not None else path_masses(log_probs, log_transitions.exp())


def omega(count: int) -> list[float]:
    raw = [math.exp(-k / 4) for k in range(count)]
    return [w / sum(raw) for w in raw]


@pytest.mark.parametrize("lattice", LATTICES)
def test_prefix_loss_is_the_weighted_conditional(lattice):
    frames = random_frames(lattice=lattice)
    result = evaluate("prefix", frames)
    for i, row in enumerate(ROWS):
        starts, _ = masses(frames, i)
        feasible = [k for k in range(U) if starts.get(row[: k + 1], 0.0) > 0]
        terms = [math.log(starts[row[: k + 1]] / starts[row[:k]]) for k in feasible]
        assert float(result.loss[i]) == pytest.approx(-sum(w * x for w, x in zip(omega(len(terms)), terms)), rel=1e-6)


@pytest.mark.parametrize("lattice", LATTICES)
def test_prefix_loss_with_the_label_conditional_head_shares_out_the_mass_that_goes_on(lattice):
    frames = random_frames(lattice=lattice)
    result = evaluate("prefix", frames, table=TABLE)
    for i, row in enumerate(ROWS):
        starts, exact = masses(frames, i)
        expected = 0.0
        for k, weight in enumerate(omega(U)):
            before = row[:k]
            bias = TABLE[before[-1] if before else ANCHORS[i]]
            shares = [starts.get((*before, v), 0.0) * math.exp(bias[v]) for v in range(V)]
            goes_on = 1 - exact[before] / starts[before]
            expected -= weight * math.log(goes_on * shares[row[k]] / sum(shares))
        assert float(result.loss[i]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lattice", LATTICES)
def test_a_zero_bias_leaves_the_telescoped_loss(lattice):
    frames = random_frames(seed=3, lattice=lattice)
    plain, biased = evaluate("prefix", frames), evaluate("prefix", frames, table=torch.zeros_like(TABLE))
    torch.testing.assert_close(biased.loss, plain.loss, rtol=1e-8, atol=1e-8)


def test_ctc_loss_is_the_whole_sequence_per_label():
    frames, valid = random_frames(), VALID.clone()
    valid[5, 2:] = False
    result = evaluate("ctc", frames, valid=valid)
    for i, row in enumerate(ROWS):
        labels = row[: int(valid[i].sum())]
        _, exact = masses(frames, i)
        assert float(result.loss[i]) == pytest.approx(-math.log(exact[labels]) / len(labels), rel=1e-9)


def test_ce_loss_reads_frame_k_for_label_k():
    frames = random_frames(lattice="slots")
    result = evaluate("ce", frames, table=TABLE)
    for i, row in enumerate(ROWS):
        expected = 0.0
        for k, weight in enumerate(omega(U)):
            bias = TABLE[row[k - 1] if k else ANCHORS[i]]
            scores = [math.exp(frames.logits[i, k, v] + bias[v]) for v in range(V)]
            expected -= weight * math.log(scores[row[k]] / sum(scores))
        assert float(result.loss[i]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "lattice", "with_bias"),
    [("prefix", "ctc", False), ("prefix", "ctc", True), ("ctc", "ctc", False), ("ce", "slots", False),
     ("ce", "slots", True), ("prefix", "transitions", False), ("prefix", "transitions", True)],
)  # fmt: skip
def test_gradients(name, lattice, with_bias):
    labels = torch.tensor([[2, 2, 0], [0, 1, 2], [1, 1, 1]])
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    frames = random_frames(3, lattice=lattice)
    learned = {"ctc": ["blank_odds"], "transitions": ["log_transitions"], "slots": []}[lattice]
    inputs = [frames.logits.requires_grad_()]
    inputs += [getattr(frames.lattice, field).clone().requires_grad_() for field in learned]
    steps = frames.lattice.log_transitions
    possible = steps is None or steps > NEG / 2

    def total(logits, lattice_part=None, table=None):
        if lattice == "transitions":  # an impossible step stays one when the checker moves it
            lattice_part = torch.where(possible, lattice_part, NEG)
        parts = {learned[0]: lattice_part} if learned else {"log_transitions": steps}
        moved = FrameOutputs(logits, Lattice(**parts))
        return evaluate(name, moved, labels, valid, table, torch.tensor([0, 1, 2])).loss.sum()

    table = TABLE.clone().requires_grad_() if with_bias else None
    if not learned:
        inputs.append(None)
    assert torch.autograd.gradcheck(total, (*inputs, table))


@pytest.mark.parametrize("name", ["prefix", "ctc"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_labels_that_do_not_fit_the_frames_are_left_out_and_give_no_nan(name, with_bias):
    labels = torch.tensor([[1, 1, 0], [0, 1, 2]])  # a repeat takes two frames, and there are two
    frames = random_frames(2, num_frames=2)
    inputs = [frames.logits.requires_grad_(), frames.lattice.blank_odds.requires_grad_()]
    table, anchors = TABLE if with_bias else None, torch.tensor([0, 0])
    result = evaluate(name, frames, labels, torch.ones_like(labels, dtype=torch.bool), table, anchors)
    assert result.counted.tolist() == [[True, False, False], [True, True, False]]
    only_feasible = evaluate(name, frames, labels, result.counted, table, anchors)
    torch.testing.assert_close(result.loss, only_feasible.loss)
    for gradient in torch.autograd.grad(result.loss.sum(), inputs):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "lattice", "with_bias"),
    [("prefix", "ctc", True), ("ctc", "ctc", False), ("ce", "slots", True), ("prefix", "transitions", True)],
)
def test_a_label_past_the_end_changes_nothing(name, lattice, with_bias):
    valid = VALID.clone()
    valid[:, 2:] = False
    frames = random_frames(lattice=lattice)
    other = LABELS.clone()
    other[:, 2] = (other[:, 2] + 1) % V
    table = TABLE if with_bias else None
    results = [evaluate(name, frames, labels, valid, table).loss for labels in (LABELS, other)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "lattice"), [("prefix", "ctc"), ("ctc", "ctc"), ("prefix", "transitions")])
def test_a_row_without_labels_has_no_loss(name, lattice):
    result = evaluate(name, random_frames(lattice=lattice), valid=torch.zeros_like(VALID))
    assert float(result.loss.abs().sum()) == 0 and not result.counted.any()


def test_confident_frames_in_fp32_stay_finite():
    """The mass that stops is then rounding noise, whose logarithm must not reach the gradient."""
    logits = torch.full((1, 6, V), -60.0)
    for t, label in enumerate([0, 1, 2, 0, 1, 2]):
        logits[0, t, label] = 60.0
    logits.requires_grad_()
    odds = torch.full((1, 6), -30.0, requires_grad=True)
    labels = torch.tensor([[0, 1, 2]])
    valid, anchors = torch.ones_like(labels, dtype=torch.bool), torch.tensor([2])
    result = evaluate("prefix", FrameOutputs(logits, Lattice(odds)), labels, valid, torch.zeros(V, V), anchors)
    assert result.loss.item() == pytest.approx(0, abs=1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result.loss.sum(), [logits, odds]))


def test_frames_that_are_sure_of_stopping_stay_finite():
    odds = torch.full((1, 4), 40.0, requires_grad=True)
    logits = torch.randn(1, 4, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 1]])
    valid, anchors = torch.ones_like(labels, dtype=torch.bool), torch.tensor([2])
    for table in (None, torch.zeros(V, V)):
        result = evaluate("prefix", FrameOutputs(logits, Lattice(odds)), labels, valid, table, anchors)
        assert torch.isfinite(result.loss).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result.loss.sum(), [logits, odds]))


def test_position_weights_fall_by_a_quarter_nat():
    weights = position_weights(torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool())
    torch.testing.assert_close(weights[0, 1] / weights[0, 0], torch.tensor(math.exp(-0.25)))
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert weights[1, 2] == 0
    flat = position_weights(torch.ones(1, 3).bool(), decay=math.inf)
    torch.testing.assert_close(flat, torch.full((1, 3), 1 / 3))
