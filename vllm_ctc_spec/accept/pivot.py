"""Pivots: a drafted token is accepted unless it is one of the few on which the answer depends.

"Reject Only Critical Tokens: Pivot-Aware Speculative Decoding" (arXiv 2511.00351). A classifier, trained by
`vllm-ctc pivots` for one target and one kind of task, reads the target's hidden state behind the token.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_ctc_spec.accept.fly import top_k_entropy
from vllm_ctc_spec.accept.rule import Rows

ENTROPY_TOP_K = 20  # nearly the whole law's: the sum over all tokens would need probabilities [L, V]


class Classifier(NamedTuple):
    """P(pivot) = sigmoid(out . relu(hidden x + hidden_bias) + out_bias), fp32, of x = [state, entropy, log_p]."""

    hidden: Tensor  # [K, H + 2]
    hidden_bias: Tensor  # [K]
    out: Tensor  # [K]
    out_bias: Tensor  # []

    def log_odds(self, state: Tensor, entropy: Tensor, log_p: Tensor) -> Tensor:
        """[L] fp32. state [L, H]: the target's last hidden state at the token, behind its final norm; entropy [L]: of
        the target's law before the token, `top_k_entropy` of ENTROPY_TOP_K; log_p [L]: of the token in that law."""
        x = torch.cat([state.float(), entropy[:, None], log_p[:, None]], 1)
        return torch.addmm(self.hidden_bias, x, self.hidden.T).relu() @ self.out + self.out_bias

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1] - 2


@dataclasses.dataclass(frozen=True)
class Pivot:
    """Lossy. A node c is loose if

        it is its parent's first child, the one that the draft holds most probable
        the target can say its token:                     p(token(c) | parent(c)) >= min_probability
        it is no pivot, says the classifier:              P(pivot | c) <= threshold

    With one child of many, a single error of the classifier among siblings would do.
    """

    name: ClassVar[str] = "pivot"
    exact: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = True

    threshold: float  # below 0 nothing is accepted, from 1 on everything that can be said
    min_probability: float
    digest: str  # of the classifier, which is told apart by it
    classifier: Classifier = dataclasses.field(repr=False, compare=False)

    def to(self, device: torch.device) -> "Pivot":
        return dataclasses.replace(self, classifier=Classifier(*(part.to(device) for part in self.classifier)))

    def uuid(self) -> str:
        """Asked for by vLLM where it hashes a configuration (vllm/config/utils.py:normalize_value), which takes no
        tensors; the digest stands for them."""
        return repr(self)

    def loose(self, rows: Rows) -> Tensor:
        assert rows.hidden is not None, "the rows of a rule that reads them have hidden states"
        parent, row = rows.parent, torch.arange(len(rows.parent), device=rows.parent.device)
        is_node = parent != row
        first = torch.full_like(row, len(row)).scatter_reduce(0, parent, torch.where(is_node, row, len(row)), "amin")
        is_first = is_node & (rows.draft_tokens >= 0) & (first[parent] == row)
        token_logits = rows.logits[parent, rows.draft_tokens.clamp_min(0)]
        log_p = token_logits - rows.logits.logsumexp(-1)[parent]
        entropy = top_k_entropy(rows.logits, ENTROPY_TOP_K)[parent]
        p_pivot = self.classifier.log_odds(rows.hidden, entropy, log_p).sigmoid()
        return is_first & (log_p >= math.log(self.min_probability)) & (p_pivot <= self.threshold)

    def __str__(self) -> str:
        return f"pivots (threshold {self.threshold:g}, probability from {self.min_probability:g})"
