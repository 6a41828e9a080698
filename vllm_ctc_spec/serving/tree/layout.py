"""Where trees lie in the batch that verifies them (`TreeLayout`), and what the verification says (`Verdict`)."""

import bisect
import dataclasses
import enum
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.kv_compaction import compact_kv, group_equal, path_moves


class Attend(enum.Enum):
    """Which rows of a step our tree attention takes."""

    NO_ROWS = enum.auto()  # nothing was drafted
    TREE_ROWS = enum.auto()  # the stock implementation runs for the others
    ALL_ROWS = enum.auto()  # every row belongs to a tree, an anchor alone included


class Verdict(NamedTuple):
    """The accepted paths of R requests: what one verification hands to the compaction and to the proposer."""

    path: Tensor  # [R, 1 + N] int32, the node whose target token is the k-th emitted
    num_sampled: Tensor  # [R] int32, emitted tokens


@dataclasses.dataclass
class TreeLayout:
    """The rows of the batch that is being verified.

    The tree rows of a request are its rows with logits: the anchor, then one row per scheduled node. The tensors of
    the first group are filled anew for every batch and keep their addresses, because CUDA graphs read them.
    """

    positions: Tensor  # [max_num_tokens] int64, rotary positions: anchor + depth for tree rows
    ancestors: Tensor  # [max_num_tokens] int64
    anchor_rows: Tensor  # [max_num_reqs] int32
    num_rows: Tensor  # [max_num_reqs] int32, tree rows, the anchor included; 0 for padding
    row_numbers: Tensor  # [max_num_tokens] int64, 0, 1, 2, ..
    row_counts: tuple[int, ...]  # rows of a whole tree, for each size that is scheduled, ascending

    attend: Attend  # of this batch
    max_rows: int  # one of row_counts; no request of this batch has more tree rows
    slot_mappings: Tensor  # [num_kv_cache_groups, num_tokens] int64, vLLM's own for this batch

    @classmethod
    def allocate(
        cls, max_num_reqs: int, max_num_tokens: int, tree_sizes: Iterable[int], device: torch.device
    ) -> "TreeLayout":
        """The layout of a batch without rows. tree_sizes: how many nodes are scheduled for a request, N among them."""
        row_counts = tuple(sorted({1 + nodes for nodes in tree_sizes}))

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            positions=zeros(max_num_tokens, dtype=torch.int64),
            ancestors=zeros(max_num_tokens, dtype=torch.int64),
            anchor_rows=zeros(max_num_reqs, dtype=torch.int32),
            num_rows=zeros(max_num_reqs, dtype=torch.int32),
            row_numbers=torch.arange(max_num_tokens, device=device),
            row_counts=row_counts,
            attend=Attend.NO_ROWS,
            max_rows=row_counts[-1],
            slot_mappings=zeros(0, 0, dtype=torch.int64),
        )

    def expect(self, attend: Attend, num_rows: int) -> None:
        """A batch in which no request has more than `num_rows` tree rows, at most 1 + N; known on the host.

        Rounded up to the rows of a scheduled tree: tiles of attention follow from them, and Triton compiles each kind.
        """
        self.attend = attend
        self.max_rows = self.row_counts[bisect.bisect_left(self.row_counts, num_rows)]

    def put_path_first(self, verdict: Verdict, states: list[Tensor]) -> None:
        """Order the rows of each `[num_tokens, H]`, in place, so that a drafter that reads them sees a chain.

        Row `anchor_rows[r] + k` becomes row `anchor_rows[r] + path[r, k]` for the accepted k. Only these rows move: a
        batch may carry thousands of a prefill beside them. They move as the entries of a cache do whose slots are rows:
        one launch for all states of one shape, and nothing is read on the host.
        """
        caches = [rows[:, None, None] for rows in states]  # blocks of one entry; kept until all have moved
        for equal in group_equal(caches):
            compact_kv(equal, self.row_numbers, self.anchor_rows[: len(verdict.path)], *verdict)


def in_path_order(anchor_rows: Tensor, verdict: Verdict, num_rows: int) -> Tensor:
    """[num_rows] int64: all rows in the order that `path_moves` gives them. anchor_rows [R]."""
    rows = torch.arange(num_rows, device=anchor_rows.device)
    to, source = path_moves(anchor_rows, *verdict)
    rows[to] = source
    return rows
