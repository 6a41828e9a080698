"""Drafts from what followed the last tokens before: in the request itself, and in a frozen table of a corpus.

Cacheback (arXiv 2511.21699), without a table for the request: `kernels/history_tree` scans its tokens. Nothing is
trained, nothing is shared between requests but the rates below, and the target may be any.
"""

from typing import ClassVar

import torch
from torch import Tensor

from vllm_ctc_spec.draft.drafted import DraftedTrees
from vllm_ctc_spec.draft.source import DraftStep, RequestTokens
from vllm_ctc_spec.kernels.contract import Budget, DraftTree
from vllm_ctc_spec.kernels.history_tree import CLASSES, RANKS, Texts, history_tree

# What the rates start from, by class of match: for the first child, and for each later one. About what they come to
# with the embedded pair; of the frozen table, a guess.
PRIOR_FIRST = (0.20, 0.35, 0.45, 0.55, 0.75, 0.85)
PRIOR_LATER = (0.10, 0.12, 0.15, 0.15, 0.15, 0.15)
PRIOR_TRIES = 20.0  # how many tries that is worth
DISCOUNT = 0.999  # of all counts, a step


class HitRates:
    """h(class, rank): how often a child of this kind was right when its parent was and its earlier siblings were not.

    Counts of the whole engine, discounted a step, with a Beta prior. They are added up as integers, so that all ranks
    of tensor parallelism have the same ones whatever the order of addition.
    """

    def __init__(self, device: torch.device):
        first, later = torch.tensor(PRIOR_FIRST), torch.tensor(PRIOR_LATER)
        self._prior = torch.stack([first, *[later] * (RANKS - 1)], 1).to(device)  # [CLASSES, RANKS]
        self._counts = torch.zeros(2, CLASSES * RANKS, device=device)  # hits, tries
        self.rates = self._prior.clone()  # [CLASSES, RANKS] fp32, read in the CUDA graph

    def add(self, edges: Tensor, hits: Tensor, tries: Tensor) -> None:
        """edges [..] int64, class * RANKS + rank; hits, tries [..] bool."""
        place = edges.clamp_min(0).flatten()
        step = torch.zeros(2, CLASSES * RANKS, dtype=torch.int64, device=edges.device)
        step[0].index_add_(0, place, (hits & tries).flatten().long())
        step[1].index_add_(0, place, tries.flatten().long())
        self._counts.mul_(DISCOUNT).add_(step)
        hit, tried = self._counts.view(2, CLASSES, RANKS)
        self.rates.copy_((hit + PRIOR_TRIES * self._prior) / (tried + PRIOR_TRIES))


class CacheSource:
    """A `DraftSource` of the request's own tokens."""

    name: ClassVar[str] = "cache"
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, tokens: RequestTokens, max_num_reqs: int, num_nodes: int, frozen: Tensor | None = None):
        """frozen: [V, F, FL] int32, as in `history_tree`, on the device."""
        self._tokens, self._frozen = tokens, frozen
        device = tokens.token_ids.device
        self._drafted = DraftedTrees(tokens, max_num_reqs, num_nodes)
        self._edges = torch.full((max_num_reqs + 1, 1 + num_nodes), -1, dtype=torch.int64, device=device)
        self._rates = HitRates(device)

    def texts(self) -> Texts:
        return Texts(*self._tokens, *self._tokens)

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        tree, edges = history_tree(
            self.texts(), step.requests, step.anchor, self._rates.rates, budget.nodes, budget.nodes, step.chain_only,
            self._frozen,
        )  # fmt: skip
        self._drafted.store(step.requests, tree)
        self._edges[step.requests] = edges
        return tree

    def prepare(self, requests: Tensor, num_sampled: Tensor, num_logits: Tensor) -> None:
        """Count the children that were right, and those that had their chance."""
        outcome = self._drafted.outcome(requests, num_sampled)
        edges = self._edges[requests.long()]
        rank = edges % RANKS
        # The rank of the node that the target said at each depth; a later sibling of it had no chance.
        missed = torch.full_like(edges, RANKS)
        said = missed.scatter_reduce(1, outcome.depths, torch.where(outcome.hits, rank, RANKS), "amin")
        had_chance = outcome.hits.gather(1, outcome.parents.clamp_min(0)) & (rank <= said.gather(1, outcome.depths))
        is_judged = outcome.is_known[:, None] & (edges >= 0) & (outcome.depths <= outcome.emitted[:, None])
        self._rates.add(edges, outcome.hits, had_chance & is_judged)

    def reset(self, request: int) -> None:
        self._drafted.reset(request)
