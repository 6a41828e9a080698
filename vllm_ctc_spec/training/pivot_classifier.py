"""A classifier of pivots, fitted to candidates and judged on questions that it has not seen."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_ctc_spec.accept.pivot import Classifier
from vllm_ctc_spec.errors import TrainingError

UNITS = 64
STEPS, LR, WEIGHT_DECAY = 500, 1e-3, 1e-2
FOLDS = 10  # of questions: one says when to stop, one measures, the others train
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


class Judged(NamedTuple):
    """C candidates and what came of them."""

    question: Tensor  # [C] int64
    features: Tensor  # [C, H + 2] fp32, what `Classifier.log_odds` reads
    right: Tensor  # [C], share of right answers behind the candidate
    right_exact: Tensor  # [C], behind the target's own token


def fit(judged: Judged, alpha: float, seed: int) -> tuple[Classifier, dict[str, Any]]:
    """The classifier, and what is measured of it on held-out questions (TrainingError). Its size and its training do
    not depend on them."""
    is_pivot = judged.right < alpha * judged.right_exact
    fold = judged.question % FOLDS
    parts = [fold >= 2, fold == 1, fold == 0]
    labels = is_pivot.float()
    if not all(part.any() for part in parts) or len(set(labels[parts[0]].tolist())) < 2:
        raise TrainingError(
            f"{int(is_pivot.sum())} of {len(is_pivot)} candidates are pivots, which is too little of one kind to train "
            f"with: use more questions, {FOLDS} at least, of which the target answers some right and some wrong."
        )
    (x, y), stop, held_out = ((judged.features[part], labels[part]) for part in parts)
    classifier = _train(x, y, *stop, seed)
    log_odds = _log_odds(classifier, held_out[0])
    share = float(y.mean())
    return classifier, {
        "pivots": int(is_pivot.sum()),
        "held_out": len(log_odds),
        "held_out_nats": _nats(log_odds, held_out[1]),
        "held_out_nats_of_their_share": _nats(torch.full_like(log_odds, math.log(share / (1 - share))), held_out[1]),
        "curve": _curve(log_odds.sigmoid(), Judged(*(part[parts[2]] for part in judged)), is_pivot[parts[2]]),
    }


def _log_odds(classifier: Classifier, features: Tensor) -> Tensor:
    return classifier.log_odds(features[:, :-2], features[:, -2], features[:, -1])


def _nats(log_odds: Tensor, labels: Tensor) -> float:
    return float(nn.functional.binary_cross_entropy_with_logits(log_odds, labels))


def _train(x: Tensor, y: Tensor, x_stop: Tensor, y_stop: Tensor, seed: int) -> Classifier:
    """By AdamW on all candidates at once, kept where the loss of `x_stop` was least."""
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    draw = torch.Generator().manual_seed(seed)
    share = y.mean()
    weights = [
        torch.randn(UNITS, x.shape[1], generator=draw) / math.sqrt(x.shape[1]), torch.zeros(UNITS),
        torch.randn(UNITS, generator=draw) / math.sqrt(UNITS), torch.log(share / (1 - share)),
    ]  # fmt: skip
    normed = Classifier(*(weight.requires_grad_() for weight in weights))
    optimizer = torch.optim.AdamW(normed, lr=LR, weight_decay=WEIGHT_DECAY)
    x, x_stop = (x - mean) / scale, (x_stop - mean) / scale
    best, least = normed, math.inf
    for _ in range(STEPS):
        with torch.no_grad():
            nats = _nats(_log_odds(normed, x_stop), y_stop)
        if nats < least:
            best, least = Classifier(*(weight.detach().clone() for weight in normed)), nats
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(_log_odds(normed, x), y).backward()
        optimizer.step()
    hidden = best.hidden / scale
    return best._replace(hidden=hidden, hidden_bias=best.hidden_bias - hidden @ mean)


def _curve(p_pivot: Tensor, judged: Judged, is_pivot: Tensor) -> list[dict[str, float | None]]:
    """By threshold: the share of candidates that would be accepted, and of these: the share of pivots, and of right
    answers behind them and behind the target's own tokens."""
    rows = []
    for threshold in THRESHOLDS:
        accepted = p_pivot <= threshold
        row: dict[str, float | None] = {"threshold": threshold, "accepted": float(accepted.float().mean())}
        for name, of in (("pivots", is_pivot), ("right", judged.right), ("right_exact", judged.right_exact)):
            row[name] = float(of[accepted].float().mean()) if accepted.any() else None
        rows.append(row)
    return rows
