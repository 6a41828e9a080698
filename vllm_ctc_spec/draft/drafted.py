"""What sources remember of their drafts until the target has spoken, by request slot."""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_ctc_spec.draft.source import RequestTokens
from vllm_ctc_spec.kernels.contract import DraftTree


class Outcome(NamedTuple):
    """What became of the last trees of R requests."""

    is_known: Tensor  # [R] bool: the tree was drafted for what the target has said since
    emitted: Tensor  # [R] int64, the number of tokens that the target has said since
    hits: Tensor  # [R, 1 + N] bool: the target has said the path to this node; the anchor is one
    depths: Tensor  # [R, 1 + N] int64, of all nodes; 0 for the anchor and in unused rows
    parents: Tensor  # [R, 1 + N] int64, -1 for the anchor and in unused rows


class DraftedTrees:
    """The last tree of each request slot, and behind how many tokens it was drafted. Inert rows, slot -1, have a slot
    of their own at the end. All is on the device, and nothing of it is read on the host."""

    def __init__(self, tokens: RequestTokens, max_num_reqs: int, num_nodes: int):
        self._tokens = tokens
        shape, device = (max_num_reqs + 1, 1 + num_nodes), tokens.token_ids.device
        self._trees = tuple(torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(4))
        self._behind = torch.full(shape[:1], -1, dtype=torch.int32, device=device)
        self._shifts = torch.arange(-1, num_nodes, device=device).clamp_min(0)

    def reset(self, request: int) -> None:
        self._behind[request] = -1

    def store(self, requests: Tensor, tree: DraftTree) -> None:
        """requests [B] int64. Fixed shapes: part of the drafter's CUDA graph."""
        for kept, new in zip(self._trees, (tree.tokens, tree.parents, tree.depths, tree.ancestors), strict=True):
            kept[requests] = new.long()
        self._behind[requests] = self._tokens.lengths[requests]

    def outcome(self, requests: Tensor, num_sampled: Tensor) -> Outcome:
        """requests, num_sampled [R], after a verification. A tree of which only some rows were verified is judged as a
        whole: what the target has said is known."""
        slots = requests.long()
        token, parents, depths, ancestors = (part[slots] for part in self._trees)
        token_ids, lengths = self._tokens
        emitted = num_sampled.long()
        behind = lengths[slots].long() - emitted
        is_known = (self._behind[slots] == behind) & (emitted > 0)
        place = (behind[:, None] + depths - 1).clamp(0, token_ids.shape[1] - 1)
        said = token_ids[slots].gather(1, place)
        agrees = (depths > 0) & (depths <= emitted[:, None]) & (token == said)
        word = torch.where(agrees, torch.bitwise_left_shift(torch.ones_like(token), self._shifts), 0).sum(
            1, keepdim=True
        )
        hits = (ancestors & ~word) == 0
        hits[:, 1:] &= agrees[:, 1:]
        return Outcome(is_known, emitted, hits, depths, parents)
