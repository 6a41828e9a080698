"""The exact rule: a node is accepted if its token is the one that the target drew after its parent."""

import dataclasses
from typing import ClassVar

import torch

from vllm_ctc_spec.accept.rule import Rows


@dataclasses.dataclass(frozen=True)
class Exact:
    """Each emitted token is one draw from the target's own law at its place. A draft decides only which places are
    computed at once, so that the output is distributed as without speculation, greedy and sampled."""

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False

    def to(self, device: torch.device) -> "Exact":
        return self

    def loose(self, rows: Rows) -> None:
        return None

    def __str__(self) -> str:
        return self.name
