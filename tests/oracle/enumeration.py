"""Prefix probabilities by their definition: the sum over every alignment of a small case, in Python's floats."""

import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor

from vllm_ctc_spec.drafter import oracle

Masses = dict[tuple[int, ...], float]


def alignment_masses(log_probs: Tensor) -> tuple[Masses, Masses]:
    """P(the collapse starts with y) and P(the collapse is y) for every y. log_probs `[T, V + 1]`, blank last."""
    num_frames, blank = log_probs.shape[0], log_probs.shape[1] - 1
    starts, exact = defaultdict(float), defaultdict(float)
    rows = log_probs.tolist()
    for alignment in itertools.product(range(blank + 1), repeat=num_frames):
        probability = math.exp(sum(rows[t][s] for t, s in enumerate(alignment)))
        add(tuple(oracle.collapse(alignment, blank)), probability, starts, exact)
    return starts, exact


def path_masses(log_probs: Tensor, transitions: Tensor) -> tuple[Masses, Masses]:
    """The same with transitions: over every subset of frames and its labels. log_probs `[T, V + 1]`, blank unused;
    transitions `[1 + T, T]`."""
    num_frames, num_tokens = log_probs.shape[0], log_probs.shape[1] - 1
    starts, exact = defaultdict(float), defaultdict(float)
    rows, steps = log_probs.tolist(), transitions.tolist()
    for length in range(num_frames + 1):
        for frames in itertools.combinations(range(num_frames), length):
            before = (0, *(t + 1 for t in frames))
            path = math.prod(steps[s][t] for s, t in zip(before, frames)) * (1 - math.fsum(steps[before[-1]]))
            for labels in itertools.product(range(num_tokens), repeat=length):
                probability = path * math.exp(sum(rows[t][v] for t, v in zip(frames, labels)))
                add(labels, probability, starts, exact)
    return starts, exact


def add(labels: tuple[int, ...], probability: float, starts: Masses, exact: Masses) -> None:
    exact[labels] += probability
    for k in range(len(labels) + 1):
        starts[labels[:k]] += probability


def scores_of(starts: Masses, num_tokens: int, depth: int, label_bias: Tensor | None = None, anchor: int = 0) -> Masses:
    """log score of every possible prefix of 1..depth labels, from the prefix probabilities of `starts`. label_bias
    `[V, V]`: row = last label."""
    scores, level = {}, {(): 0.0}
    for _ in range(depth):
        children = {}
        for labels, score in level.items():
            joint = [starts.get((*labels, v), 0.0) for v in range(num_tokens)]
            q = torch.tensor(joint, dtype=torch.float64) / starts[labels]
            if label_bias is not None and max(joint) > 0:
                q = q * label_bias[labels[-1] if labels else anchor].exp()
                q = q / q.sum()
            children |= {(*labels, v): score + math.log(q[v]) for v in range(num_tokens) if q[v] > 0}
        scores |= children
        level = children
    return scores
