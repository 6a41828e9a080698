"""How frames spell labels: with a blank, with learned transitions, or one label a frame.

"ctc"          P(blank) = sigmoid(blank_head(h_t))
"transitions"  P(t | s) = softmax over t > s of query(h_s) . key(h_t) / sqrt(r) + offset[t - s - 1], 0 the anchor
"slots"        P(s + 1 | s) = 1: frame k is label k, nothing is learned
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.kernels.contract import Frames

NEG = -1e30
"""Log 0: `logaddexp(-inf, -inf)` has no gradient."""


class Lattice(NamedTuple):
    """How frames spell labels: the blank's odds, or the steps between frames; `...` as in `FrameOutputs`."""

    blank_odds: Tensor | None = None  # [..., T]: P(blank) = sigmoid(blank_odds); lattice "ctc" only
    log_transitions: Tensor | None = None  # [..., 1 + T, T], NEG where t <= s; the other lattices only


class FrameOutputs(NamedTuple):
    """The outputs of one forward; `...` is [B, M], M anchors in each of B sequences."""

    logits: Tensor  # [..., T, L] over the labels, the target's vocabulary or a part of it; unnormalised
    lattice: Lattice

    def for_kernels(self, logsumexp: Tensor, anchor: Tensor, markov: tuple[Tensor, Tensor] | None) -> Frames:
        """For `...` = [B]. logsumexp [B, T] of the logits, anchor [B] as labels, markov: the label-conditional head's
        tables."""
        odds, log_transitions = self.lattice
        if odds is None:
            no_blank = torch.full_like(logsumexp, -torch.inf)
            return Frames(self.logits, -logsumexp, no_blank, anchor, markov, log_transitions.exp())
        return Frames(self.logits, F.logsigmoid(-odds) - logsumexp, F.logsigmoid(odds), anchor, markov)


def transition_log_probs(query: Tensor, key: Tensor, offset: Tensor) -> Tensor:
    """Log transitions `[..., 1 + T, T]` from frame s = 0..T (0 is the anchor) to frame t = 1..T.

    query [..., 1 + T, r]; key [..., T, r]; offset [T], one for each distance t - s. They are the log softmax over t > s
    of (query_s . key_t) / sqrt(r) + offset[t - s - 1], so only the last frame stops.
    """
    num_frames, rank = key.shape[-2:]
    start, end = torch.arange(1 + num_frames, device=key.device), torch.arange(num_frames, device=key.device)
    distance = end - start[:, None]  # t - s - 1, the index of offset
    behind = distance < 0
    scores = query @ key.mT / rank**0.5 + offset[distance.clamp_min(0)]
    return torch.log_softmax(scores.masked_fill(behind, NEG), -1).masked_fill(behind, NEG)


def slot_transitions(num_frames: int, device: torch.device | None = None) -> Tensor:
    """`A [1 + T, T]` of cross-entropy's law: frame k is label k."""
    return torch.eye(1 + num_frames, num_frames, device=device)


class TransitionHead(nn.Module):
    """Learned steps from the frame of one label to the frame of the next (after DA-Transformer, arXiv 2205.07459)."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.transition_rank, bias=False)
        self.key = nn.Linear(config.hidden_size, config.transition_rank, bias=False)
        self.offset = nn.Parameter(torch.empty(config.num_frames))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states `[..., 1 + T, H]` of the anchor's slot and the frames to log-probabilities, fp32,
        `[..., 1 + T, T]`: row s is the frame of the last label, 0 the anchor; column t - 1 is frame t of the next."""
        query, key = self.query(hidden).float(), self.key(hidden[..., 1:, :]).float()
        return transition_log_probs(query, key, self.offset.float())


def read_lattice(hidden: Tensor, blank_head: nn.Linear | None, transition_head: TransitionHead | None) -> Lattice:
    """Hidden states `[..., 1 + T, H]`, normalised, to the lattice (fp32) of the head that is there; "slots" without."""
    if blank_head is not None:
        return Lattice(blank_odds=blank_head(hidden[..., 1:, :]).squeeze(-1).float())
    if transition_head is not None:
        return Lattice(log_transitions=transition_head(hidden))
    fixed = slot_transitions(hidden.shape[-2] - 1, hidden.device).log().clamp_min(NEG)
    return Lattice(log_transitions=fixed.expand(*hidden.shape[:-2], -1, -1))
