"""Losses against enumeration of every alignment (fp64), their gradients, and what they leave out."""

import itertools
import math
from collections import defaultdict

import pytest
import torch

from vllm_ctc_spec import ctc
from vllm_ctc_spec.drafter import Frames
from vllm_ctc_spec.training.loss import LOSSES, ce_loss, ctc_loss, position_weights, prefix_loss, previous_labels

V, T, U = 3, 5, 3
ROWS = list(itertools.product(range(V), repeat=U))
LABELS = torch.tensor(ROWS)
ANCHORS = torch.arange(len(ROWS)) % V
VALID = torch.ones_like(LABELS, dtype=torch.bool)


def random_frames(num_rows=V**U, num_frames=T, seed=0) -> Frames:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, num_frames, V, generator=generator, dtype=torch.float64)
    return Frames(logits, torch.randn(num_rows, num_frames, generator=generator, dtype=torch.float64))


def random_bias(anchors=ANCHORS, labels=LABELS) -> torch.Tensor:
    table = 1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return table[previous_labels(anchors, labels)]


def masses(frames: Frames, row: int) -> tuple[dict, dict]:
    """P(collapse starts with y) and P(collapse == y), by summing over all alignments."""
    log_probs = ctc.frame_log_probs(frames.logits[row], frames.blank_odds[row]).tolist()
    starts, exact = defaultdict(float), defaultdict(float)
    for alignment in itertools.product(range(V + 1), repeat=len(log_probs)):
        probability = math.exp(sum(log_probs[t][s] for t, s in enumerate(alignment)))
        labels = tuple(ctc.collapse(alignment, V))
        exact[labels] += probability
        for k in range(len(labels) + 1):
            starts[labels[:k]] += probability
    return starts, exact


def omega(count: int) -> list[float]:
    raw = [math.exp(-k / 4) for k in range(count)]
    return [w / sum(raw) for w in raw]


def test_prefix_loss_is_the_weighted_conditional():
    frames = random_frames()
    result = prefix_loss(frames, LABELS, VALID, None)
    for i, row in enumerate(ROWS):
        starts, _ = masses(frames, i)
        feasible = [k for k in range(U) if starts.get(row[: k + 1], 0.0) > 0]
        terms = [math.log(starts[row[: k + 1]] / starts[row[:k]]) for k in feasible]
        assert float(result.loss[i]) == pytest.approx(-sum(w * x for w, x in zip(omega(len(terms)), terms)), rel=1e-6)


def test_prefix_loss_with_the_label_conditional_head_shares_out_the_mass_that_goes_on():
    frames, bias = random_frames(), random_bias()
    result = prefix_loss(frames, LABELS, VALID, bias)
    for i, row in enumerate(ROWS):
        starts, exact = masses(frames, i)
        expected = 0.0
        for k, weight in enumerate(omega(U)):
            before = row[:k]
            shares = [starts.get((*before, v), 0.0) * math.exp(bias[i, k, v]) for v in range(V)]
            goes_on = 1 - exact[before] / starts[before]
            expected -= weight * math.log(goes_on * shares[row[k]] / sum(shares))
        assert float(result.loss[i]) == pytest.approx(expected, rel=1e-6)


def test_a_zero_bias_leaves_the_telescoped_loss():
    frames = random_frames(seed=3)
    plain = prefix_loss(frames, LABELS, VALID, None)
    biased = prefix_loss(frames, LABELS, VALID, torch.zeros(len(ROWS), U, V, dtype=torch.float64))
    torch.testing.assert_close(biased.loss, plain.loss, rtol=1e-8, atol=1e-8)


def test_ctc_loss_is_the_whole_sequence_per_label():
    frames, valid = random_frames(), VALID.clone()
    valid[5, 2:] = False
    result = ctc_loss(frames, LABELS, valid, None)
    for i, row in enumerate(ROWS):
        labels = row[: int(valid[i].sum())]
        _, exact = masses(frames, i)
        assert float(result.loss[i]) == pytest.approx(-math.log(exact[labels]) / len(labels), rel=1e-9)


def test_ce_loss_reads_frame_k_for_label_k():
    frames, bias = random_frames(), random_bias()
    result = ce_loss(frames, LABELS, VALID, bias)
    for i, row in enumerate(ROWS):
        expected = 0.0
        for k, weight in enumerate(omega(U)):
            scores = [math.exp(frames.logits[i, k, v] + bias[i, k, v]) for v in range(V)]
            expected -= weight * math.log(scores[row[k]] / sum(scores))
        assert float(result.loss[i]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("name", "with_bias"), [("prefix", False), ("prefix", True), ("ctc", False), ("ce", True)])
def test_gradients(name, with_bias):
    labels = torch.tensor([[2, 2, 0], [0, 1, 2], [1, 1, 1]])
    valid = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
    frames = random_frames(3)
    bias = random_bias(torch.tensor([0, 1, 2]), labels).requires_grad_() if with_bias else None
    inputs = [frames.logits.requires_grad_(), frames.blank_odds.requires_grad_()] + ([bias] if with_bias else [])

    def total(logits, odds, bias=None):
        return LOSSES[name](Frames(logits, odds), labels, valid, bias).loss.sum()

    assert torch.autograd.gradcheck(total, inputs)


@pytest.mark.parametrize("name", ["prefix", "ctc"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_labels_that_do_not_fit_the_frames_are_left_out_and_give_no_nan(name, with_bias):
    labels = torch.tensor([[1, 1, 0], [0, 1, 2]])  # a repeat takes two frames, and there are two
    frames = random_frames(2, num_frames=2)
    inputs = [frames.logits.requires_grad_(), frames.blank_odds.requires_grad_()]
    bias = random_bias(torch.tensor([0, 0]), labels) if with_bias else None
    result = LOSSES[name](frames, labels, torch.ones_like(labels, dtype=torch.bool), bias)
    assert result.counted.tolist() == [[True, False, False], [True, True, False]]
    only_feasible = LOSSES[name](frames, labels, result.counted, bias)
    torch.testing.assert_close(result.loss, only_feasible.loss)
    for gradient in torch.autograd.grad(result.loss.sum(), inputs):
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize(("name", "with_bias"), [("prefix", True), ("ctc", False), ("ce", True)])
def test_a_label_past_the_end_changes_nothing(name, with_bias):
    valid = VALID.clone()
    valid[:, 2:] = False
    frames, bias = random_frames(), random_bias() if with_bias else None
    other = LABELS.clone()
    other[:, 2] = (other[:, 2] + 1) % V
    results = [LOSSES[name](frames, labels, valid, bias).loss for labels in (LABELS, other)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_row_without_labels_has_no_loss():
    nothing = torch.zeros_like(VALID)
    for name, loss in LOSSES.items():
        result = loss(random_frames(), LABELS, nothing, None)
        assert float(result.loss.abs().sum()) == 0 and not result.counted.any(), name


def test_confident_frames_in_fp32_stay_finite():
    """The mass that stops is then rounding noise, whose logarithm must not reach the gradient."""
    logits = torch.full((1, 6, V), -60.0)
    for t, label in enumerate([0, 1, 2, 0, 1, 2]):
        logits[0, t, label] = 60.0
    logits.requires_grad_()
    odds = torch.full((1, 6), -30.0, requires_grad=True)
    labels = torch.tensor([[0, 1, 2]])
    result = prefix_loss(Frames(logits, odds), labels, torch.ones_like(labels, dtype=torch.bool), torch.zeros(1, U, V))
    assert result.loss.item() == pytest.approx(0, abs=1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result.loss.sum(), [logits, odds]))


def test_frames_that_are_sure_of_stopping_stay_finite():
    odds = torch.full((1, 4), 40.0, requires_grad=True)
    logits = torch.randn(1, 4, V, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([[0, 1]])
    for bias in (None, torch.zeros(1, 2, V)):
        result = prefix_loss(Frames(logits, odds), labels, torch.ones_like(labels, dtype=torch.bool), bias)
        assert torch.isfinite(result.loss).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result.loss.sum(), [logits, odds]))


def test_the_token_before_the_first_label_is_the_anchor():
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert previous_labels(torch.tensor([9, 8]), labels).tolist() == [[9, 1, 2], [8, 4, 5]]


def test_position_weights_fall_by_a_quarter_nat():
    weights = position_weights(torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool())
    torch.testing.assert_close(weights[0, 1] / weights[0, 0], torch.tensor(math.exp(-0.25)))
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0]))
    assert weights[1, 2] == 0
