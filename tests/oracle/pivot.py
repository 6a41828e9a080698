"""The rule of pivots for one tree, in plain Python numbers, node by node."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vllm_ctc_spec.accept.pivot import Classifier
from vllm_ctc_spec.accept.pivot_file import JSON_NAME, WEIGHTS_NAME, save
from vllm_ctc_spec.drafter.weights import weights_fingerprint


def save_pivots(
    folder: Path, target: str | Path, hidden_size: int, out_bias: float = 0.0, floor: float = 1e-4, scale: float = 1.0
) -> Path:
    """A random classifier for this target; scale: of its last weights, 0 for the same answer everywhere."""
    folder.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    hidden, bias, out = (torch.randn(shape, generator=draw) for shape in ([3, hidden_size + 2], [3], [3]))
    save(folder / WEIGHTS_NAME, Classifier(hidden, bias, scale * out, torch.tensor(out_bias)))
    record = {"target_weights": weights_fingerprint(target), "min_probability": floor}
    (folder / JSON_NAME).write_text(json.dumps(record))
    return folder


def probabilities(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def entropy(logits: Sequence[float], top_k: int) -> float:
    return -sum(p * math.log(p) for p in sorted(probabilities(logits))[-top_k:] if p > 0)


def classify(classifier: Sequence, x: Sequence[float]) -> float:
    """P(pivot). classifier: weights [K][H + 2], biases [K], weights [K], bias, as lists."""
    weights, biases, out, out_bias = classifier
    units = [max(0.0, bias + sum(w * v for w, v in zip(row, x, strict=True))) for row, bias in zip(weights, biases)]
    return 1 / (1 + math.exp(-(out_bias + sum(w * unit for w, unit in zip(out, units, strict=True)))))


def walk_by_definition(
    parents: Sequence[int],
    drafts: Sequence[int],
    targets: Sequence[int],
    logits: Sequence[Sequence[float]],
    p_pivot: Callable[[int, int], float],
    threshold: float,
    min_probability: float,
) -> tuple[list[int], list[int]]:
    """Emitted tokens and the nodes after which they are emitted. p_pivot(node, child) of a drafted child."""
    emitted, nodes = [], [0]
    while True:
        node = nodes[-1]
        children = [child for child in range(1, len(parents)) if parents[child] == node]
        below = next((child for child in children if drafts[child] == targets[node]), None)
        if below is None and children and drafts[children[0]] >= 0:
            first = children[0]
            probability = probabilities(logits[node])[drafts[first]]
            if probability >= min_probability and p_pivot(node, first) <= threshold:
                below = first
        if below is None:
            return [*emitted, targets[node]], nodes
        emitted.append(drafts[below])
        nodes.append(below)
