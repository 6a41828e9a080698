"""FLy: a token that the target hesitates about is accepted if the target agrees with what the draft says after it.

"Training-Free Loosely Speculative Decoding: Accepting Semantically Correct Drafts Beyond Exact Match" (ICLR 2026,
arXiv 2511.22972). Three definitions of its two conditions are in use, and they differ:

    paper           entropy over the whole vocabulary, divided by log |V|; W agreements after the mismatch
    authors' code   entropy of the top 3 probabilities, in nats; a pattern of W that includes the mismatch
    vLLM 0.33       entropy of the top 3 probabilities, in nats; W agreements after the mismatch

This is vLLM's (vllm/v1/worker/gpu/spec_decode/rejection_sampler_utils.py:_rejection_kernel), for trees: a tree that is
a chain gives the same tokens.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from vllm_ctc_spec.accept.rule import Rows


@dataclasses.dataclass(frozen=True)
class Fly:
    """Lossy. A node c is loose if

        the target can say its token:                     logits[parent(c), token(c)] > -inf
        the target hesitates there:                       H(parent(c)) >= entropy_threshold
        it agrees W times in a row with what follows c:   next^W(c) exists

    where next(n) is the child of n that carries the target's token, and H(n) = -sum p log p over the `entropy_top_k`
    largest probabilities at n. Within the window only the target's own tokens count, so no two loose ones share one.
    """

    name: ClassVar[str] = "fly"
    exact: ClassVar[bool] = False
    reads_hidden: ClassVar[bool] = False

    window: int  # W >= 1
    entropy_threshold: float = 0.3  # nats
    entropy_top_k: int = 3

    def to(self, device: torch.device) -> "Fly":
        return self

    def loose(self, rows: Rows) -> Tensor:
        parent, token = rows.parent, rows.draft_tokens
        is_node = (token >= 0) & (parent != torch.arange(len(parent), device=parent.device))
        agrees = is_node & (token == rows.target_tokens[parent])
        possible = rows.logits[parent, token.clamp_min(0)] > -torch.inf
        hesitates = top_k_entropy(rows.logits, self.entropy_top_k) >= self.entropy_threshold
        return is_node & possible & hesitates[parent] & agreed_with(agrees, parent, self.window)

    def __str__(self) -> str:
        return f"FLy (window {self.window}, entropy of the top {self.entropy_top_k} from {self.entropy_threshold:g})"


def top_k_entropy(logits: Tensor, top_k: int) -> Tensor:
    """-sum p log p over the `top_k` largest probabilities, in nats: [L]. logits [L, V]; their softmax has the whole
    vocabulary. As vLLM 0.33 computes it (vllm/v1/spec_decode/fly.py), so that both decide alike."""
    log_p = logits.topk(min(top_k, logits.shape[-1])).values - logits.logsumexp(-1, keepdim=True)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def agreed_with(agrees: Tensor, parent: Tensor, length: int) -> Tensor:
    """[L] bool: whether below a row the target's own tokens lead on for `length` nodes.

    agrees [L] bool: the row carries the target's token at its parent, as at most one of its siblings does. The length's
    binary digits say which powers of `next` to compose, so that a window of 6 takes three squarings and two look-ups.
    """
    nobody = len(parent)
    row = torch.arange(nobody + 1, device=parent.device)
    following = torch.full_like(row, nobody)
    following[torch.where(agrees, parent, nobody)] = torch.where(agrees, row[:-1], nobody)
    reached = row
    while length:
        if length % 2:
            reached = following[reached]
        following, length = following[following], length // 2
    return reached[:-1] < nobody
