"""Frames as a trained drafter gives them, of any size, and what fp64 says of chains and trees drafted from them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.drafter.lattice import NEG
from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, DraftTree, Frames
from vllm_ctc_spec.kernels.noise import gumbel_noise_reference

from ..oracle.frames import from_odds, generator, log_probs, log_transitions, markov_head, transitions_between

LOG_IMPOSSIBLE = math.log(IMPOSSIBLE)
ENDED = -25.0  # no label of a chain that ends has this log conditional: fp32 states hold no less


class Shape(NamedTuple):
    vocabulary: int  # V
    frames: int  # T
    batch: int  # B
    nodes: int  # N, of a tree
    rank: int  # of the label-conditional head

    def __str__(self) -> str:
        return f"V{self.vocabulary}-T{self.frames}-B{self.batch}-N{self.nodes}-r{self.rank}"


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    device: str
    seed: int

    def generator(self) -> torch.Generator:
        return generator(self.seed)


class Row(NamedTuple):
    """The frames of one request in fp64, and what goes with them."""

    log_probs: torch.Tensor  # [T, V + 1], the blank last
    log_transitions: torch.Tensor | None  # [1 + T, T]
    markov: tuple[torch.Tensor, torch.Tensor]
    anchor: int

    def root(self) -> oracle.Prefix | oracle.TransitionPrefix:
        return oracle.root_prefix(self.log_probs, self.log_transitions)

    def bias(self, last: int, tokens: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """The head's, fp64, of `tokens` or of all."""
        w_in, w_out = self.markov
        return w_out[tokens].double() @ w_in[last].double()


def row_of(frames: Frames, row: int) -> Row:
    return Row(log_probs(frames, row), log_transitions(frames, row), frames.markov, int(frames.anchor[row]))


def trained_frames(case: Case, with_transitions: bool = False) -> Frames:
    """A few tokens carry a frame, neighbours share them, over a heavy tail; so that labels repeat, too."""
    shape, draw = case.shape, case.generator()
    logits = torch.randn(shape.batch, shape.frames, shape.vocabulary, generator=draw) * 2
    peaks = torch.randint(shape.vocabulary, (shape.batch, shape.frames, 6), generator=draw)
    peaks[:, 1:, :2] = peaks[:, :-1, 2:4]
    logits.scatter_add_(2, peaks, 6 + 10 * torch.rand(peaks.shape, generator=draw))
    odds, transitions = torch.randn(shape.batch, shape.frames, generator=draw) * 1.5 - 0.7, None
    if with_transitions:
        odds, transitions = odds.fill_(-torch.inf), transitions_between("spread", shape.batch, shape.frames)
    w_in, w_out = (w.to(case.dtype) for w in markov_head(shape.vocabulary, shape.rank, scale=2.0))
    anchor = torch.randint(shape.vocabulary, (shape.batch,), generator=draw)
    frames = from_odds(logits.to(case.dtype), odds)
    return frames._replace(anchor=anchor, markov=(w_in, w_out), transitions=transitions).to(case.device)


def conditionals(row: Row, labels: list[int]) -> Iterator[torch.Tensor]:
    """log q(v | labels[:k]) plus the head's bias `[V]` in fp64, for k = 0..len(labels)."""
    prefix, last = row.root(), row.anchor
    for label in [*labels, None]:
        yield prefix.conditional(row.log_probs) + row.bias(last)
        if label is not None:
            prefix, last = prefix.extend(row.log_probs, label), label


def chain_gaps(
    frames: Frames, tokens: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor, sampling: ChainSampling
) -> Iterator[float]:
    """For every label: how far its law among the candidates `tokens` [B, M] is from fp64's, where that is above 1e-12,
    and how far the label's score, with its noise, is below the best. Infinity where a law has what is no candidate, and
    where a chain has ended that had a label left."""
    for b in range(labels.shape[0]):
        chain, slot = labels[b, : lengths[b]].tolist(), int(sampling.requests[b])
        outside = torch.ones(frames.logits.shape[2], dtype=torch.bool, device=tokens.device)
        outside[tokens[b]] = False
        temperature = sampling.temperature[slot].double()
        for k, exact in enumerate(conditionals(row_of(frames, b), chain)):
            if k == labels.shape[1]:
                break
            exact = exact.masked_fill(outside.to(exact.device), -torch.inf)
            law = sampling.draft_logits[slot, k].double()
            if exact.max() <= ENDED:
                break  # whether it has ended is a matter of rounding
            if k == len(chain):
                yield math.inf
                break
            yield 0.0 if law[outside].isneginf().all() else math.inf
            wanted = exact.log_softmax(-1)
            yield (law.log_softmax(-1) - wanted)[wanted > -27.6].abs().max().item()
            scores = law
            if temperature:
                position, seed = sampling.positions[b : b + 1] + k, sampling.seeds[slot : slot + 1]
                every = torch.arange(len(law), device=law.device)
                noise = gumbel_noise_reference(seed, position, torch.full_like(position, k), every)[0].double()
                scores = law / temperature + noise
            yield (scores.max() - scores[chain[k]]).item()


def search_gap(row: Row, tree: DraftTree, b: int, tokens: torch.Tensor, depth: int) -> float:
    """How far the tree of request b is from the best one that consists of `tokens`: the worst error of a score, and how
    far the best child that is not in the tree is above the worst node that is.

    Sorted, prefix-closed and without such a child, a tree is the best of its size.
    """
    rest = torch.ones(row.log_probs.shape[1] - 1, dtype=torch.bool, device=tokens.device)
    rest[tokens] = False
    log_rest = row.log_probs[:, :-1].masked_fill(~rest, NEG).logsumexp(1).cpu()  # [T], mass outside of them
    reduced = torch.cat([row.log_probs[:, tokens], row.log_probs[:, -1:]], 1).cpu()
    transitions = None if row.log_transitions is None else row.log_transitions.cpu()
    column = {token: place for place, token in enumerate(tokens.tolist())}
    parents, scores, used = tree.parents[b].tolist(), tree.scores[b].tolist(), int(tree.num_nodes[b])
    drafted, depths = tree.tokens[b].tolist(), tree.depths[b].tolist()
    children: dict[int, set[int]] = {node: set() for node in range(1 + used)}
    for node in range(1, 1 + used):
        children[parents[node]].add(column[drafted[node]])
    full = used + 1 == len(parents)
    least = scores[used] if full else -60.0  # of a tree with room left: no child with any mass was left out
    prefixes, exact, error = {0: oracle.root_prefix(reduced, transitions)}, {0: 0.0}, 0.0
    laws: dict[int, torch.Tensor] = {}
    for node in range(1 + used):
        if node:
            parent, place = parents[node], column[drafted[node]]
            exact[node] = exact[parent] + laws[parent][place].item()
            error = max(error, abs(exact[node] - scores[node]))
            prefixes[node] = prefixes[parent].extend(reduced, place)
        if depths[node] < depth:
            laws[node] = candidate_law(prefixes[node], reduced, log_rest, row.bias(drafted[node], tokens).cpu())
            left = laws[node].clone()
            left[list(children[node])] = -torch.inf
            error = max(error, exact[node] + left.max().item() - least)
    return error


def candidate_law(
    prefix: oracle.Prefix | oracle.TransitionPrefix, reduced: torch.Tensor, log_rest: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """log q over the candidates; the bias of all other tokens is 0 by definition, and what has no mass is no child."""
    weight = prefix.phi if isinstance(prefix, oracle.TransitionPrefix) else prefix.emission_weights()[0]
    outside = torch.logsumexp(log_rest + weight, 0) - prefix.log_prob
    conditional = prefix.conditional(reduced)
    scores = (conditional + bias).masked_fill(conditional < LOG_IMPOSSIBLE, -torch.inf)
    return scores - torch.cat([scores, outside[None]]).logsumexp(0)
