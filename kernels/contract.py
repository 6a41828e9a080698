"""The contract of the kernels: the frames that they read, the chains and trees that they return. Torch only."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.limits import MAX_NODES

# A label whose conditional probability is not above this counts as impossible, and a chain without a possible label
# has ended. It keeps every division and every forward vector far from the subnormal numbers that GPUs flush to zero.
IMPOSSIBLE = 1e-30


class Frames(NamedTuple):
    """T frames for each of B requests, and the tables that a search over them reads.

        p_t(v)         = exp(logits[b, t, v] + log_scale[b, t])     frame t holds label v; 0 where the logit is -inf
        p_t(blank)     = exp(log_blank[b, t])                       frame t holds none
        bias(v | last) = W_out[v] . W_in[last]                      of the label-conditional head
        A[s, t]        the label after the one of frame s (0: the anchor) appears at frame t; 0 unless t > s

    With transitions every frame holds a label.
    """

    logits: Tensor  # [B, T, V] fp16, bf16 or fp32, contiguous in V
    log_scale: Tensor  # [B, T] fp32
    log_blank: Tensor  # [B, T] fp32, -inf with transitions
    anchor: Tensor  # [B] int64, the token before the first label: a row of W_in, under no repeat rule
    markov: tuple[Tensor, Tensor] | None = None  # W_in [V or more, r], W_out [V, r]: contiguous, of one dtype
    transitions: Tensor | None = None  # A [B, 1 + T, T] fp32, rows s = 0..T, columns t = 1..T; None: CTC
    tile_best: Tensor | None = None  # of `frame_stats` of these logits; saves a GPU a pass over them

    def to(self, device: torch.device | str) -> "Frames":
        logits, log_scale, log_blank, anchor = (x.to(device) for x in self[:4])
        markov = None if self.markov is None else (self.markov[0].to(device), self.markov[1].to(device))
        transitions = None if self.transitions is None else self.transitions.to(device)
        tile_best = None if self.tile_best is None else self.tile_best.to(device)
        return Frames(logits, log_scale, log_blank, anchor, markov, transitions, tile_best)


class Budget(NamedTuple):
    """How large a tree may be, and how many candidates it is made of."""

    nodes: int  # N, at most MAX_NODES
    width: int  # C, candidates of each frame
    depth: int  # D, no node is deeper


class ChainSampling(NamedTuple):
    """How the labels of a chain are sampled. `R` request slots, `B` rows of this step."""

    temperature: Tensor  # [R] fp32; 0 is greedy
    seeds: Tensor  # [R] int64
    positions: Tensor  # [B] int64, the position of the first label; label k is drawn at positions + k
    requests: Tensor  # [B] int64, the request slot of each row; -1 is an inert row
    draft_logits: Tensor  # [R, N, V] fp32, written: log q(v | prefix) up to a constant, -inf where impossible


class TreeRows(NamedTuple):
    """Where the trees of R requests stand among the token rows of a step. Tree rows are the rows with logits.

    Row `anchor_rows[r] + i` is node `i` of the tree of request `r`, `i < num_rows[r]`; node 0 is the anchor.
    """

    anchor_rows: Tensor  # [R] int32
    num_rows: Tensor  # [R] int32, the anchor included; 0 for a request without a tree
    ancestors: Tensor  # [num_tokens] int64, as in `DraftTree`; 0 in rows of no tree


@dataclasses.dataclass(frozen=True)
class DraftTree:
    """One tree of up to N nodes for each of B requests, padded to N. Row 0 is the anchor, row i is node i.

    A draft tree is a prefix-closed set of label sequences after the anchor: a node is the sequence on the path from the
    anchor to it, and two nodes with the same parent carry different tokens. Rows are sorted by score, best first. The
    score only falls along a path, so every parent stands before its children. The first K rows of a tree are the tree
    that the search would have returned for a budget of K: if the list is cut (vLLM's scheduler cuts it at its token
    budget, at the end of the context and for large batches), the best smaller tree remains.

    An unused row, always behind all used ones, has parent -1, depth 0, score -inf, no ancestors, and a real token id,
    because the target embeds every row.
    """

    tokens: Tensor  # [B, 1 + N] int64
    parents: Tensor  # [B, 1 + N] int32, the parent's row; -1 for the anchor
    depths: Tensor  # [B, 1 + N] int32, the number of labels on the path; 0 for the anchor
    scores: Tensor  # [B, 1 + N] fp32, log probability of the path; 0 for the anchor
    ancestors: Tensor  # [B, 1 + N] int64, bit i - 1 is set for node i on the path, the node itself included

    @property
    def num_nodes(self) -> Tensor:
        """[B] int64: used rows, the anchor not counted."""
        return (self.parents >= 0).sum(1)

    def path(self, row: int, node: int) -> list[int]:
        """The labels from the anchor's successor to `node` of request `row`."""
        labels: list[int] = []
        while node > 0:
            labels.append(int(self.tokens[row, node]))
            node = int(self.parents[row, node])
        return labels[::-1]

    def check(self, vocab_size: int) -> None:
        """Raise ValueError with the first rule that this tree breaks. For tests: it reads every row on the host."""
        batch, width = self.tokens.shape
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(value.shape == (batch, width), f"{field.name} is {tuple(value.shape)}, not {(batch, width)}")
            _require(value.dtype == DTYPES[field.name], f"{field.name} is {value.dtype}, not {DTYPES[field.name]}")
        _require(width - 1 <= MAX_NODES, f"{width - 1} nodes do not fit into {MAX_NODES} bits")
        _require(bool(((self.tokens >= 0) & (self.tokens < vocab_size)).all()), "a token is not in the vocabulary")
        for row in range(batch):
            self._check_row(row)

    def _check_row(self, row: int) -> None:
        tokens, parents, depths, scores, ancestors = (
            getattr(self, field.name)[row].tolist() for field in dataclasses.fields(self)
        )
        used = int(self.num_nodes[row])
        where = f"request {row}: "
        _require((parents[0], depths[0], scores[0], ancestors[0]) == (-1, 0, 0.0, 0), where + "row 0 is no anchor")
        children: set[tuple[int, int]] = set()
        for node in range(1, len(tokens)):
            parent, at = parents[node], f"{where}node {node} "
            if node > used:
                unused = (parent, depths[node], scores[node], ancestors[node])
                _require(unused == (-1, 0, -torch.inf, 0), at + "is unused but not empty")
                continue
            _require(0 <= parent < node, at + f"stands before its parent {parent}")
            _require((parent, tokens[node]) not in children, at + "repeats its sibling's token")
            children.add((parent, tokens[node]))
            _require(depths[node] == depths[parent] + 1, at + "is not one below its parent")
            _require(scores[node] <= scores[node - 1], at + "scores above the row before it")
            bit = 1 << (node - 1)
            bits = ancestors[node] & (2**64 - 1)
            _require(bits == (ancestors[parent] & (2**64 - 1)) | bit, at + "has wrong ancestors")


DTYPES = {
    "tokens": torch.int64,
    "parents": torch.int32,
    "depths": torch.int32,
    "scores": torch.float32,
    "ancestors": torch.int64,
}


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"Not a draft tree: {problem}.")
