"""From the outputs of the drafter's forward to a chain or a tree, by one of the searches.

    prefix      chain, tree   the exact prefix probabilities
    argmax      chain         the paper's: the best symbol of each frame, collapsed
    transform   tree          the paper's: the best alignments of the frames' best symbols, collapsed

Labels, anchors and trees are in the labels of the frames: with a draft vocabulary, not the target's token ids, until
`CTCSource.draft` hands its tree over. Shapes are fixed and nothing is read on the host: all of it is part of the
drafter's CUDA graph.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from vllm_ctc_spec.draft.source import DraftStep
from vllm_ctc_spec.drafter.lattice import FrameOutputs
from vllm_ctc_spec.kernels.collapse import collapse
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, DraftTree, Frames
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform
from vllm_ctc_spec.kernels.frame_stats import FrameStats, frame_stats
from vllm_ctc_spec.kernels.prefix_chain import prefix_chain
from vllm_ctc_spec.kernels.prefix_search import greedy_chain, prefix_search


def default_width(num_nodes: int) -> int:
    """Symbols of each frame for a tree of this size, or a greedy chain: twice its nodes, but 32 to 64.

    Measured with the embedded pair against the whole vocabulary: as many symbols as nodes cost 5 % of the acceptance
    length at 8 nodes, 3 % at 16 and 1 % at 32; these cost less than 0.5 %.
    """
    return min(max(2 * num_nodes, 32), 64)


# Symbols of each frame for a sampled chain. Measured with the embedded pair at temperature 1 against the whole
# vocabulary: 16 symbols cost 2.1 % of the acceptance length, 32 1.1 %, 64 0.8 % and 128 0.3 %.
SAMPLED_WIDTH = 64


def read_frames(
    outputs: FrameOutputs, anchor: Tensor, markov: tuple[Tensor, Tensor] | None
) -> tuple[Frames, FrameStats]:
    """The frames of one forward for B anchors [B]; markov: the label-conditional head's tables."""
    stats = frame_stats(outputs.logits)
    return outputs.for_kernels(stats.logsumexp, anchor, markov)._replace(tile_best=stats.tile_best), stats


def draft_chain(
    search: str, frames: Frames, stats: FrameStats, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[Tensor, Tensor]:
    """Labels [B, N] int64, any real ones past the end, and lengths [B] int32. sampling: None for greedy chains."""
    return CHAINS[search](frames, stats, num_labels, sampling)


def draft_tree(search: str, frames: Frames, budget: Budget, chain_only: Tensor | None = None) -> DraftTree:
    """chain_only: None, or [B] bool, rows whose tree is a chain."""
    return TREES[search](frames, budget, chain_only)


def prefix_labels(
    frames: Frames, stats: FrameStats, num_labels: int, sampling: ChainSampling | None
) -> tuple[Tensor, Tensor]:
    if sampling is None:  # a pass over the vocabulary for all labels, not one for each
        return greedy_chain(frames, num_labels, default_width(num_labels))
    return prefix_chain(frames, num_labels, SAMPLED_WIDTH, sampling)


def best_alignment(
    frames: Frames, stats: FrameStats, num_labels: int, sampling: ChainSampling | None
) -> tuple[Tensor, Tensor]:
    assert sampling is None, "an alignment has no proposal probabilities"
    blank = frames.logits.shape[-1]
    alignment = torch.where(frames.log_blank > stats.best_logit + frames.log_scale, blank, stats.best)
    return collapse(alignment, blank, frames.anchor, num_labels)


CHAINS: dict[str, Callable[[Frames, FrameStats, int, ChainSampling | None], tuple[Tensor, Tensor]]] = {
    "prefix": prefix_labels,
    "argmax": best_alignment,
}
TREES: dict[str, Callable[[Frames, Budget, Tensor | None], DraftTree]] = {
    "prefix": prefix_search,
    "transform": ctc_transform,
}


class CTCSource:
    """Drafts from the frames of the parallel drafter: a `DraftSource`, and the only source of chains."""

    name: ClassVar[str] = "ctc"
    reads: ClassVar[frozenset[str]] = frozenset({"frames"})

    def __init__(self, search: str):
        """search: a key of TREES, or of CHAINS."""
        self.search = search

    def prepare(self, requests: Tensor, num_sampled: Tensor, num_logits: Tensor) -> None:
        """Frames are made anew in every step."""

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        assert step.frames is not None, "the step of a source that reads frames has them"
        tree = draft_tree(self.search, step.frames, budget, step.chain_only)
        if step.vocabulary is None:
            return tree
        return dataclasses.replace(tree, tokens=step.vocabulary.to_tokens(tree.tokens))

    def chain(
        self, frames: Frames, stats: FrameStats, num_labels: int, sampling: ChainSampling | None
    ) -> tuple[Tensor, Tensor]:
        """As `draft_chain`."""
        return draft_chain(self.search, frames, stats, num_labels, sampling)

    def reset(self, request: int) -> None:
        """Nothing is kept of a request."""
