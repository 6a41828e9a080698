"""Several sources, one tree: a mixture whose weights follow each request.

Between two drafts the target has said a path `a` of the merged tree and then something that is no child of it. Source s
had given this the probability

    L_s = P_s(a) - sum of P_s over the children of a

and its weight becomes pi_s max(L_s, FLOOR), normalised, and then shared: (1 - SHARE) of it and SHARE / S for all. That
is fixed-share tracking of the best source: a request that begins to copy its prompt moves to the cache within a few
steps, and back. Weights decide only which nodes are verified, so that none of this changes the output's law.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_ctc_spec.draft.drafted import DraftedTrees
from vllm_ctc_spec.draft.source import DraftSource, DraftStep, RequestTokens
from vllm_ctc_spec.kernels.contract import Budget, DraftTree
from vllm_ctc_spec.kernels.tree_merge import tree_merge

SHARE = 0.02
FLOOR = 1e-3  # a source that lacked the path loses ten bits, not its life
MEMORY = 0.99  # of the mean weights from which a new request starts, a step


class MergedSource:
    """A `DraftSource` of S others."""

    def __init__(self, sources: Sequence[DraftSource], tokens: RequestTokens, max_num_reqs: int, num_nodes: int):
        self.sources = tuple(sources)
        self.name = "+".join(source.name for source in sources)
        self.reads = frozenset().union(*(source.reads for source in sources))
        device, num_sources = tokens.token_ids.device, len(sources)
        self._drafted = DraftedTrees(tokens, max_num_reqs, num_nodes)
        self._row = torch.arange(1 + num_nodes, device=device)
        # By request slot; the last one is for inert rows.
        self._probs = torch.zeros(max_num_reqs + 1, 1 + num_nodes, num_sources, device=device)  # P_s of each node
        self._mean = torch.full((num_sources,), 1 / num_sources, device=device)
        self.weights = self._mean.repeat(max_num_reqs + 1, 1)
        # [2, S] int64: nodes of verified trees that each source has, and those of them that the target said.
        self.counts = torch.zeros(2, num_sources, dtype=torch.int64, device=device)

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        trees = [source.draft(step, budget) for source in self.sources]
        merged, rows = tree_merge(trees, self.weights[step.requests].log(), step.chain_only)
        scores = torch.stack([tree.scores for tree in trees], 2).gather(1, rows.clamp_min(0))
        self._probs[step.requests] = torch.where(rows >= 0, scores.exp(), 0)
        self._drafted.store(step.requests, merged)
        return merged

    def prepare(self, requests: Tensor, num_sampled: Tensor, num_logits: Tensor) -> None:
        slots = requests.long()
        outcome, probs = self._drafted.outcome(requests, num_sampled), self._probs[slots]
        # A prompt in chunks is drafted for before its last one, for another place than the first token's.
        is_verified = outcome.is_known & (num_logits > 1)
        self._count(outcome.hits, is_verified, probs, num_logits)
        deepest = torch.where(outcome.hits, outcome.depths, -1).max(1, keepdim=True)
        path = deepest.indices  # [R, 1], the last node that the target said
        has_ended = (deepest.values < outcome.emitted[:, None]) & (outcome.parents == path)  # [R, 1 + N]: its children
        likelihood = probs.gather(1, path[:, :, None].expand(-1, 1, probs.shape[2]))[:, 0]
        likelihood = likelihood - torch.where(has_ended[:, :, None], probs, 0).sum(1)
        updated = shared(self.weights[slots], likelihood)
        updated = torch.where(is_verified[:, None], updated, self.weights[slots])
        self.weights[slots] = updated
        self._mean.mul_(MEMORY).add_((1 - MEMORY) * updated.mean(0))
        for source in self.sources:
            source.prepare(requests, num_sampled, num_logits)

    def _count(self, hits: Tensor, is_verified: Tensor, probs: Tensor, num_logits: Tensor) -> None:
        is_row = is_verified[:, None] & (self._row > 0) & (self._row < num_logits[:, None])
        has_node = (probs > 0) & is_row[:, :, None]
        self.counts += torch.stack([has_node.sum((0, 1)), (has_node & hits[:, :, None]).sum((0, 1))])

    def reset(self, request: int) -> None:
        self._drafted.reset(request)
        self.weights[request] = self._mean
        for source in self.sources:
            source.reset(request)


def shared(weights: Tensor, likelihood: Tensor) -> Tensor:
    """The fixed-share update of weights [R, S] by likelihoods [R, S]."""
    posterior = weights * likelihood.clamp_min(FLOOR)
    posterior = posterior / posterior.sum(1, keepdim=True)
    return (1 - SHARE) * posterior + SHARE / weights.shape[1]
