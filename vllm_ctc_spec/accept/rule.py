"""Rules of acceptance: inputs, answer, names. A new rule is a file beside this one and a line in RULES."""

import pkgutil
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Rows(NamedTuple):
    """The L tree rows of a batch: for each request the anchor, then its nodes."""

    logits: Tensor  # [L, V] fp32, of the target, behind temperature, penalties, top-k and top-p
    target_tokens: Tensor  # [L] int64, one draw of the target after each row, with that row's own seed and position
    draft_tokens: Tensor  # [L] int64, the row's own token; -1 where a grammar forbids the row
    parent: Tensor  # [L] int64, the parent's row in this list; a row without a parent has its own
    hidden: Tensor | None = None  # [L, H], the target's, behind its final norm; where a rule `reads_hidden`


class AcceptanceRule(Protocol):
    """Says which nodes may be taken although the target drew another token. The walk prefers the token that the target
    drew, whatever the rule.

    A rule is made in the process that reads the options and sent to the workers with the configuration: a frozen
    dataclass of plain numbers, and small tensors that neither its hash nor its representation shows.
    """

    name: ClassVar[str]  # in RULES
    exact: ClassVar[bool]  # whether the output's law stays the target's
    reads_hidden: ClassVar[bool]

    def to(self, device: torch.device) -> Self:
        """The rule with its tensors, if it has any, on this device."""

    def loose(self, rows: Rows) -> Tensor | None:
        """[L] bool: whether a walk may step to the row if the target drew something else at its parent; None: to none.
        Fixed shapes, no reads on the host. The answer for rows that are no node, and for rows whose token is -1, is
        ignored: no walk steps to them."""

    def __str__(self) -> str:
        """The rule and its settings, for the log."""


RULES = {
    "exact": "vllm_ctc_spec.accept.exact:Exact",
    "fly": "vllm_ctc_spec.accept.fly:Fly",
    "pivot": "vllm_ctc_spec.accept.pivot:Pivot",
}


def make_rule(name: str, **settings: Any) -> AcceptanceRule:
    """The rule of that name in RULES."""
    return pkgutil.resolve_name(RULES[name])(**settings)
