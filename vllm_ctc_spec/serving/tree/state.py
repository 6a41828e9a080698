"""Trees between two steps (`TreeTable`) and in the step that verifies them (`TreeStep`)."""

import dataclasses
import enum

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import DraftTree


class TreeTable:
    """The tree that each request slot has drafted, until it is verified. A new slot holds a chain.

    parents, depths [S, 1 + N] int32, ancestors [S, 1 + N] int64 as in `DraftTree`, chain_only [S] bool: requests whose
    sampling depends on earlier rows. There is one slot more than vLLM has: inert rows of a padded batch, slot -1, write
    into the last one.
    """

    def __init__(self, num_slots: int, num_nodes: int, device: torch.device):
        row = torch.arange(1 + num_nodes, device=device)
        self._chain = (
            (row - 1).int(),
            row.int(),
            torch.cat([row.new_zeros(1), torch.bitwise_left_shift(torch.ones_like(row[1:]), row[:-1]).cumsum(0)]),
        )
        self.parents, self.depths, self.ancestors = (part.repeat(num_slots + 1, 1) for part in self._chain)
        self.chain_only = torch.zeros(num_slots + 1, dtype=torch.bool, device=device)

    def reset(self, slot: int, chain_only: bool) -> None:
        """A new request. Drafts that it brings along, from another instance or from before a preemption: a chain."""
        self.parents[slot], self.depths[slot], self.ancestors[slot] = self._chain
        self.chain_only[slot] = chain_only

    def store(self, slots: Tensor, tree: DraftTree) -> None:
        """Keep `tree` for the request slots `[B]`, -1 is inert. Fixed shapes: part of the drafter's CUDA graph."""
        self.parents[slots] = tree.parents
        self.depths[slots] = tree.depths
        self.ancestors[slots] = tree.ancestors


class Attend(enum.Enum):
    """Which rows of a step our tree attention takes."""

    NO_ROWS = enum.auto()  # nothing was drafted
    TREE_ROWS = enum.auto()  # the stock implementation runs for the others
    ALL_ROWS = enum.auto()  # every row belongs to a tree, an anchor alone included


@dataclasses.dataclass
class TreeStep:
    """Layout of the batch that is being verified; buffers keep their addresses, CUDA graphs read them.

    The tree rows of a request are its rows with logits: the anchor at `roots`, then one row per scheduled node.
    """

    positions: Tensor  # [max_num_tokens] int64, rotary positions: anchor + depth for tree rows
    ancestors: Tensor  # [max_num_tokens] int64
    roots: Tensor  # [max_num_reqs] int32, row of the anchor
    num_rows: Tensor  # [max_num_reqs] int32, tree rows, the anchor included; 0 for padding
    max_rows: int  # 1 + N
    attend: Attend = Attend.NO_ROWS
    num_reqs: int = 0
    slot_mappings: Tensor | None = None  # [num_kv_cache_groups, num_tokens] int64, vLLM's own for this step
    path: Tensor | None = None  # [num_reqs, 1 + N] int32, node whose target token is the k-th emitted
    num_sampled: Tensor | None = None  # [num_reqs] int32, emitted tokens

    @classmethod
    def allocate(cls, max_num_reqs: int, max_num_tokens: int, num_nodes: int, device: torch.device) -> "TreeStep":
        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            positions=zeros(max_num_tokens, torch.int64),
            ancestors=zeros(max_num_tokens, torch.int64),
            roots=zeros(max_num_reqs, torch.int32),
            num_rows=zeros(max_num_reqs, torch.int32),
            max_rows=1 + num_nodes,
        )

    def put_path_first(self, states: list[Tensor]) -> None:
        """Order the rows of each `[num_tokens, H]`, in place, so that a drafter that reads them sees a chain.

        Row `roots[r] + k` becomes row `roots[r] + path[r, k]` for the accepted k. Only these rows move: a batch may
        carry thousands of a prefill beside them. Fixed shapes, nothing is read on the host.
        """
        assert self.path is not None and self.num_sampled is not None
        to, source = path_moves(self.roots[: self.num_reqs], self.path, self.num_sampled)
        for rows in states:
            rows[to] = rows[source]


def path_moves(first: Tensor, path: Tensor, num_sampled: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, 1 + N] int64 to write and rows to read for that: row `first[r] + k` becomes row `first[r] + path[r, k]`
    for k < num_sampled[r], and for the others the anchor's row becomes itself.

    first, num_sampled [R], path [R, 1 + N]. Fixed shapes, nothing is read on the host.
    """
    first = first.long().unsqueeze(1)
    offset = torch.arange(path.shape[1], device=path.device)
    accepted = offset < num_sampled.unsqueeze(1)
    return torch.where(accepted, first + offset, first), torch.where(accepted, first + path, first)


def in_path_order(first: Tensor, path: Tensor, num_sampled: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64: all rows in the order that `path_moves` gives them."""
    rows = torch.arange(num_rows, device=path.device)
    to, source = path_moves(first, path, num_sampled)
    rows[to] = source
    return rows
