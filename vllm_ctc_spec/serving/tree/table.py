"""The trees of all requests, each from its draft to its verification."""

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import DraftTree


class TreeTable:
    """The tree that each request has drafted, until it is verified, by request slot. A new slot holds a chain.

    parents, depths [S, 1 + N] int32, ancestors [S, 1 + N] int64 as in `DraftTree`, chain_only [S] bool: requests whose
    sampling depends on earlier rows. S is one more than vLLM has: inert rows of a padded batch, slot -1, write into the
    last one.
    """

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device):
        row = torch.arange(1 + num_nodes, device=device)
        self._chain = (
            (row - 1).int(),
            row.int(),
            torch.cat([row.new_zeros(1), torch.bitwise_left_shift(torch.ones_like(row[1:]), row[:-1]).cumsum(0)]),
        )
        self.parents, self.depths, self.ancestors = (part.repeat(max_num_reqs + 1, 1) for part in self._chain)
        self.chain_only = torch.zeros(max_num_reqs + 1, dtype=torch.bool, device=device)

    def reset(self, request: int, chain_only: bool) -> None:
        """A new request. Drafts that it brings along, from another instance or from before a preemption: a chain."""
        self.parents[request], self.depths[request], self.ancestors[request] = self._chain
        self.chain_only[request] = chain_only

    def store(self, requests: Tensor, tree: DraftTree) -> None:
        """Keep `tree` for the request slots `[B]`, -1 is inert. Fixed shapes: part of the drafter's CUDA graph."""
        self.parents[requests] = tree.parents
        self.depths[requests] = tree.depths
        self.ancestors[requests] = tree.ancestors
