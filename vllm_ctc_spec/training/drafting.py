"""What a drafter would propose at given anchors: chains, trees and exact probabilities, without a server."""

import dataclasses

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.drafter import CTCDrafter, FrameOutputs
from vllm_ctc_spec.kernels.prefix_search import greedy_chain, prefix_search
from vllm_ctc_spec.options import default_width
from vllm_ctc_spec.training.batches import Batch, in_labels
from vllm_ctc_spec.training.loss import log_labels
from vllm_ctc_spec.training.vocabulary import label_scores


@dataclasses.dataclass(frozen=True)
class Drafting:
    """A drafter at N anchors, ready for the kernels; labels and valid `[N, U]` are what the target says after them."""

    drafter: CTCDrafter
    slots: Tensor  # [N, 1 + T, H]
    frames: FrameOutputs
    anchors: Tensor  # [N]
    labels: Tensor  # [N, U]
    valid: Tensor  # [N, U]

    @classmethod
    def at(cls, drafter: CTCDrafter, features: Tensor, batch: Batch) -> "Drafting":
        """features `[B, S, A * H]`; the anchors without a label are left out."""
        kept = batch.valid[..., 0]
        slots = drafter.hidden_slots(features, batch.anchors, batch.positions)[kept]
        return cls(drafter, slots, drafter.frames(slots), batch.anchors[kept], batch.labels[kept], batch.valid[kept])

    def _frames_for_kernels(self) -> Frames:
        vocabulary = self.drafter.vocabulary
        anchors = self.anchors if vocabulary is None else vocabulary.to_labels(self.anchors)
        return self.frames.for_kernels(torch.logsumexp(self.frames.logits, -1), anchors, self.drafter.markov_tables)

    def chain(self) -> Tensor:
        """Greedy labels as tokens of the target, `[N, U]`."""
        num_labels = self.labels.shape[1]
        return self._tokens(greedy_chain(self._frames_for_kernels(), num_labels, default_width(num_labels))[0])

    def _tokens(self, labels: Tensor) -> Tensor:
        vocabulary = self.drafter.vocabulary
        return labels if vocabulary is None else vocabulary.to_tokens(labels)

    def tree(self, num_nodes: int) -> DraftTree:
        """The `num_nodes` most probable prefixes of at most U labels, of as many candidates a frame as are served."""
        budget = Budget(num_nodes, default_width(num_nodes), self.labels.shape[1])
        tree = prefix_search(self._frames_for_kernels(), budget)
        return dataclasses.replace(tree, tokens=self._tokens(tree.tokens))

    def log_q(self) -> Tensor:
        """log q(y_k | y_<k) of the target's labels, given that the drafter goes on: `[N, U]`, -inf where impossible."""
        lattice = self.frames.lattice
        anchors, labels, valid = in_labels(self.drafter.vocabulary, self.anchors, self.labels, self.valid)
        scores = label_scores(
            self.slots[:, 1:],
            self.drafter.draft_head,
            anchors,
            labels,
            self.drafter.markov_tables,
            exclude_repeats=lattice.blank_odds is not None,
        )
        law = log_labels(lattice, scores, labels, valid)
        return law.given_going_on.masked_fill(~law.counted, -torch.inf)

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
            there = (depth > 0) & on_path.gather(1, parent.clamp_min(0)[:, None])[:, 0]
            label = (depth - 1).clamp_min(0)[:, None]
            said = self.labels.gather(1, label)[:, 0] == tree.tokens[:, row]
            on_path[:, row] = there & said & self.valid.gather(1, label)[:, 0]
            reached[:, row] = torch.where(on_path[:, row], tree.depths[:, row], 0)
        return reached.amax(1)
