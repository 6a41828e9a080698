"""The exact rule: a node is accepted if its token is the one that the target drew after its parent."""

from typing import ClassVar

from torch import Tensor

from vllm_ctc_spec.accept.rule import Rows


class Exact:
    """Each emitted token is one draw from the target's own law at its place. A draft decides only which places are
    computed at once, so that the output is distributed as without speculation, greedy and sampled."""

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False

    def accepts(self, rows: Rows) -> Tensor:
        return rows.draft_tokens == rows.target_tokens[rows.parent]
