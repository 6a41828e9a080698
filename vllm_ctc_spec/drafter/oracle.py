"""The mathematics of drafting in plain torch: the oracle for every kernel. Tests, benchmarks and checks only.

Two *lattices* say which frames emit the labels: CTC's, with a blank, and learned transitions between frames.

Words (Graves et al. 2006; Wen et al. 2024, arXiv 2412.00061): T *frames* give log-probabilities over the V tokens
and a blank, independently; an *alignment* picks one symbol per frame; its *collapse* (merge repeats, drop blanks)
is the label sequence. The *prefix probability* P(y_1..y_k) is the probability that the collapse of all T frames
starts with y_1..y_k.

For a prefix ending in y_k, two forward vectors over frames are enough: b[t], the mass of alignments of frames
1..t that collapse to exactly this prefix and end in blank, and n[t], the same ending in y_k. A new label v is
first emitted at frame t with mass p_t(v) * (b[t-1] + n[t-1]); if v repeats y_k only b[t-1] counts, because the
repeat needs a blank between. Hence, for all v at once,

    P(y_1..y_k, v) = sum_t p_t(v) * phi_v[t-1],    q(v | y_1..y_k) = P(y_1..y_k, v) / P(y_1..y_k),

and 1 - sum_v q(v | prefix) is the probability that the drafter stops here.

With transitions (Huang et al. 2022, arXiv 2205.07459) there is no blank and no repeat rule: the labels are emitted at
increasing frames, and `A[s, t]` is the probability that the label after frame s is emitted at frame t > s; s = 0 is the
anchor. A row sums to 1 less the probability of stopping there. One vector is enough: phi[t], the mass with which the
next label is emitted at frame t:

    P(y_1..y_k, v) = sum_t p_t(v) phi[t],    phi'[t] = sum_{s<t} p_s(y) phi[s] A[s, t]   behind a label y,

with phi[t] = A[0, t] at the root. A[s, s+1] = 1 is cross-entropy's law: frame k is label k.

Arrays: `log_probs [..., T, V + 1]`, normalised over the last axis, blank last; `log_transitions [..., 1 + T, T]`, rows
s = 0..T, columns t = 1..T, with no blank in the frames. Everything works in fp64 and fp32 and is differentiable.
`NEG` stands for log 0: `logaddexp(-inf, -inf)` has no gradient.
"""

import dataclasses
import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_ctc_spec.drafter.lattice import NEG


def collapse(alignment: Sequence[int], blank: int) -> list[int]:
    """Merge repeats, then drop blanks."""
    merged = [s for i, s in enumerate(alignment) if i == 0 or s != alignment[i - 1]]
    return [s for s in merged if s != blank]


def frame_log_probs(logits: Tensor, blank_odds: Tensor | None) -> Tensor:
    """Log-probabilities over V tokens and blank: `[..., T, V]` and `[..., T]` to `[..., T, V + 1]`.

    Blank is an odds against the whole vocabulary, logit_blank = logsumexp(logits) + beta, so that
    P(blank) = sigmoid(beta). None: there is no blank.
    """
    if blank_odds is None:
        blank_odds = torch.full_like(logits[..., 0], -torch.inf)
    label = torch.nn.functional.logsigmoid(-blank_odds).unsqueeze(-1) + torch.log_softmax(logits, -1)
    blank = torch.nn.functional.logsigmoid(blank_odds).unsqueeze(-1)
    return torch.cat([label, blank], -1).clamp_min(NEG)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """One label prefix and its forward vectors: `n, b [T + 1]` in log space, index t = frames 1..t."""

    labels: tuple[int, ...]
    n: Tensor
    b: Tensor
    log_prob: Tensor  # log P(labels), scalar

    @classmethod
    def root(cls, log_probs: Tensor) -> "Prefix":
        zero = log_probs.new_zeros(1)
        b = torch.cat([zero, log_probs[:, -1].cumsum(0)])
        return cls((), torch.full_like(b, NEG), b, log_probs.new_zeros(()))

    def emission_weights(self) -> tuple[Tensor, Tensor]:
        """phi_v[t-1] over t: for a new label, and for a repeat of the last one. Both `[T]`, log space."""
        return torch.logaddexp(self.n, self.b)[:-1], self.b[:-1]

    def joint(self, log_probs: Tensor) -> Tensor:
        """log P(labels, v) for every v: `[V]`."""
        fresh, repeat = self.emission_weights()
        joint = torch.logsumexp(log_probs[:, :-1] + fresh[:, None], 0)
        if self.labels:
            last = self.labels[-1]
            joint = joint.clone()
            joint[last] = torch.logsumexp(log_probs[:, last] + repeat, 0)
        return joint.clamp_min(NEG)

    def conditional(self, log_probs: Tensor) -> Tensor:
        """log q(v | labels) for every v: `[V]`; what is missing from 1 is the stop probability."""
        return self.joint(log_probs) - self.log_prob

    def extend(self, log_probs: Tensor, label: int) -> "Prefix":
        fresh, repeat = self.emission_weights()
        weight = repeat if self.labels and self.labels[-1] == label else fresh
        emit = weight + log_probs[:, label]
        n, b = [log_probs.new_tensor(NEG)], [log_probs.new_tensor(NEG)]
        for t in range(log_probs.shape[0]):
            n.append(torch.logaddexp(n[t] + log_probs[t, label], emit[t]))
            b.append(torch.logaddexp(b[t], n[t]) + log_probs[t, -1])
        return Prefix((*self.labels, label), torch.stack(n), torch.stack(b), torch.logsumexp(emit, 0))


@dataclasses.dataclass(frozen=True)
class TransitionPrefix:
    """`Prefix` of the other lattice: `phi [T]` in log space, index t - 1 = frame t."""

    labels: tuple[int, ...]
    phi: Tensor
    log_prob: Tensor  # log P(labels), scalar
    log_transitions: Tensor  # [1 + T, T]

    @classmethod
    def root(cls, log_transitions: Tensor) -> "TransitionPrefix":
        return cls((), log_transitions[0], log_transitions.new_zeros(()), log_transitions)

    def conditional(self, log_probs: Tensor) -> Tensor:
        """log q(v | labels) for every v: `[V]`; what is missing from 1 is the stop probability."""
        joint = torch.logsumexp(log_probs[:, :-1] + self.phi[:, None], 0)
        return joint.clamp_min(NEG) - self.log_prob

    def extend(self, log_probs: Tensor, label: int) -> "TransitionPrefix":
        emit = self.phi + log_probs[:, label]
        phi = torch.logsumexp(emit[:, None] + self.log_transitions[1:], 0).clamp_min(NEG)
        return TransitionPrefix((*self.labels, label), phi, torch.logsumexp(emit, 0), self.log_transitions)


def root_prefix(log_probs: Tensor, log_transitions: Tensor | None) -> Prefix | TransitionPrefix:
    """The empty prefix of the lattice with these transitions; None is CTC's."""
    return Prefix.root(log_probs) if log_transitions is None else TransitionPrefix.root(log_transitions)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Drafted labels and the law that each was drawn from: `log_q [len(labels), V]`, normalised."""

    labels: tuple[int, ...]
    log_q: Tensor


def chain(
    log_probs: Tensor,
    num_labels: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    label_bias: Tensor | None = None,
    anchor: int = 0,
    log_transitions: Tensor | None = None,
) -> Chain:
    """Draft up to `num_labels` labels from the prefix conditionals, given that the drafter goes on.

    temperature 0 takes the most probable label; otherwise labels are drawn from q ** (1 / temperature).
    label_bias `[V, V]`: row = last label (the anchor first), added to log q before normalising.
    log_transitions `[1 + T, T]`: the lattice; None is CTC's. The chain is shorter where no label has any mass left.
    """
    prefix, labels, rows = root_prefix(log_probs, log_transitions), [], []
    for _ in range(num_labels):
        scores = prefix.conditional(log_probs)
        if scores.max() <= NEG / 2:
            break
        if label_bias is not None:
            scores = scores + label_bias[labels[-1] if labels else anchor]
        log_q = torch.log_softmax(scores / (temperature or 1.0), -1)
        label = int(torch.multinomial(log_q.exp(), 1, generator=generator) if temperature else log_q.argmax())
        labels.append(label)
        rows.append(log_q)
        prefix = prefix.extend(log_probs, label)
    return Chain(tuple(labels), torch.stack(rows) if rows else log_probs.new_zeros(0, log_probs.shape[-1] - 1))


def best_prefixes(
    log_probs: Tensor,
    num_nodes: int,
    *,
    depth: int,
    label_bias: Tensor | None = None,
    anchor: int = 0,
    log_transitions: Tensor | None = None,
) -> list[tuple[tuple[int, ...], float]]:
    """The `num_nodes` most probable label prefixes of at most `depth` labels, `(labels, log score)`, best first.

    A score is the sum of log q along the prefix. label_bias, log_transitions: as in `chain`; with a bias q is
    normalised over the vocabulary, without one the rest of 1 is the stop probability. Ties: shallower first, then the
    better parent, then the lower token. Best-first search: q <= 1, so a prefix never outranks its parent and comes out
    of the queue after it. The result is shorter where no further prefix has any mass.
    """
    best: list[tuple[tuple[int, ...], float]] = []
    queue: list[tuple[float, int, int, int]] = []  # (-score, depth, parent's place among `expanded`, token)
    expanded: list[Prefix | TransitionPrefix] = []

    def expand(prefix: Prefix | TransitionPrefix, score: float) -> None:
        log_q = prefix.conditional(log_probs)
        possible = log_q > NEG / 2
        if label_bias is not None:
            log_q = torch.log_softmax(log_q + label_bias[prefix.labels[-1] if prefix.labels else anchor], -1)
        expanded.append(prefix)
        costs, tokens = (-score - log_q[possible]).tolist(), possible.nonzero()[:, 0].tolist()
        for cost, token in zip(costs, tokens, strict=True):
            heapq.heappush(queue, (cost, len(prefix.labels) + 1, len(expanded) - 1, token))

    expand(root_prefix(log_probs, log_transitions), 0.0)
    while queue and len(best) < num_nodes:
        cost, length, parent, token = heapq.heappop(queue)
        prefix = expanded[parent].extend(log_probs, token)
        best.append((prefix.labels, -cost))
        if length < depth:
            expand(prefix, -cost)
    return best
