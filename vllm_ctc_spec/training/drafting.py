"""A drafter's drafts at given anchors: chains, trees and exact probabilities, without a server."""

import dataclasses
import functools

import torch
from torch import Tensor

from vllm_ctc_spec.draft.ctc import SAMPLED_WIDTH, default_width, draft_chain, draft_tree, read_frames
from vllm_ctc_spec.drafter.lattice import FrameOutputs
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.frame_stats import FrameStats
from vllm_ctc_spec.kernels.prefix_chain import chain_log_q
from vllm_ctc_spec.training.batches import Batch, in_labels


@dataclasses.dataclass(frozen=True)
class Drafting:
    """A drafter at N anchors, ready for the kernels. labels and valid `[N, U]`: the target's tokens after each."""

    drafter: CTCDrafter
    hidden: Tensor  # [N, 1 + T, H]
    outputs: FrameOutputs
    anchors: Tensor  # [N]
    labels: Tensor  # [N, U]
    valid: Tensor  # [N, U]

    @classmethod
    def at(cls, drafter: CTCDrafter, hidden_states: Tensor, batch: Batch) -> "Drafting":
        """hidden_states `[B, S, A * H]`; the anchors without a label are left out."""
        kept = batch.valid[..., 0]
        hidden = drafter.forward_hidden(hidden_states, batch.anchors, batch.positions)[kept]
        return cls(drafter, hidden, drafter.frames(hidden), batch.anchors[kept], batch.labels[kept], batch.valid[kept])

    @functools.cached_property
    def _frames(self) -> tuple[Frames, FrameStats]:
        vocabulary = self.drafter.vocabulary
        anchors = self.anchors if vocabulary is None else vocabulary.to_labels(self.anchors)
        return read_frames(self.outputs, anchors, self.drafter.markov_tables)

    def chain(self, search: str = "prefix") -> Tensor:
        """Greedy labels as tokens of the target, `[N, U]`."""
        return self._tokens(draft_chain(search, *self._frames, self.labels.shape[1])[0])

    def _tokens(self, labels: Tensor) -> Tensor:
        vocabulary = self.drafter.vocabulary
        return labels if vocabulary is None else vocabulary.to_tokens(labels)

    def tree(self, num_nodes: int, search: str = "prefix", width: int | None = None) -> DraftTree:
        """Trees at most U deep, from `width` symbols of each frame, by default as many as in serving."""
        budget = Budget(num_nodes, width or default_width(num_nodes), self.labels.shape[1])
        tree = draft_tree(search, self._frames[0], budget)
        return dataclasses.replace(tree, tokens=self._tokens(tree.tokens))

    def log_q(self) -> Tensor:
        """log q(y_k | y_<k) of the target's labels in sampled chains: `[N, U]`, -inf where impossible."""
        frames, vocabulary = self._frames[0], self.drafter.vocabulary
        _, labels, valid = in_labels(vocabulary, self.anchors, self.labels, self.valid)
        return chain_log_q(frames, labels, SAMPLED_WIDTH).masked_fill(~valid, -torch.inf)

    def accepted(self, chain: Tensor) -> Tensor:
        """Labels of a chain `[N, U]` that the target says too: `[N]`."""
        return ((chain == self.labels) & self.valid).cumprod(1).sum(1)

    def accepted_in(self, tree: DraftTree) -> Tensor:
        """Depth that the target's labels reach in the tree, `[N]`."""
        on_path = torch.zeros_like(tree.tokens, dtype=torch.bool)
        on_path[:, 0] = True
        reached = torch.zeros_like(tree.depths)
        for row in range(1, on_path.shape[1]):  # parents come before their children
            parent, depth = tree.parents[:, row].long(), tree.depths[:, row].long()
            reachable = (depth > 0) & on_path.gather(1, parent.clamp_min(0)[:, None])[:, 0]
            label = (depth - 1).clamp_min(0)[:, None]
            said = self.labels.gather(1, label)[:, 0] == tree.tokens[:, row]
            on_path[:, row] = reachable & said & self.valid.gather(1, label)[:, 0]
            reached[:, row] = torch.where(on_path[:, row], tree.depths[:, row], 0)
        return reached.amax(1)
