"""Rules of acceptance: inputs, answer, names. A new rule is a file beside this one and a line in RULES."""

import pkgutil
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor


class Rows(NamedTuple):
    """The L tree rows of a batch: for each request the anchor, then its nodes."""

    logits: Tensor  # [L, V] fp32, of the target, behind temperature, penalties, top-k and top-p
    target_tokens: Tensor  # [L] int64, one draw of the target after each row, with that row's own seed and position
    draft_tokens: Tensor  # [L] int64, the row's own token; -1 where a grammar forbids the row
    parent: Tensor  # [L] int64, the parent's row in this list; a row without a parent has its own
    hidden: Tensor | None = None  # [L, H], the target's, where a rule `reads_hidden`


class AcceptanceRule(Protocol):
    """Says which edges of the trees may be taken. `walk.py` decides where a walk goes."""

    name: ClassVar[str]  # in RULES
    exact: ClassVar[bool]  # whether the output's law stays the target's
    reads_hidden: ClassVar[bool]

    def accepts(self, rows: Rows) -> Tensor:
        """[L] bool: whether a walk may step from a row's parent to the row. Fixed shapes, no reads on the host. The
        answer for rows that are no node, and for rows whose token is -1, is ignored: no walk steps to them."""


RULES = {"exact": "vllm_ctc_spec.accept.exact:Exact"}


def make_rule(name: str) -> AcceptanceRule:
    """The rule of that name in RULES."""
    return pkgutil.resolve_name(RULES[name])()
