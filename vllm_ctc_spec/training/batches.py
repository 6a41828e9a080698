"""Batches and anchors as functions of seed and step: a resumed run repeats them without a kept random state."""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.training.dataset import Example


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences padded on the right and M anchors in each."""

    token_ids: Tensor  # [B, S]
    anchors: Tensor  # [B, M] tokens
    positions: Tensor  # [B, M]
    labels: Tensor  # [B, M, U]
    valid: Tensor  # [B, M, U] bool: the label exists

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def rows(self, kept: Sequence[int]) -> "Batch":
        """A part of the sequences, padded as before."""
        index = torch.tensor(kept)
        return Batch(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def anchors_in(self, part: slice) -> "Batch":
        """The same sequences with a part of their anchors."""
        kept = (x[:, part] for x in (self.anchors, self.positions, self.labels, self.valid))
        return Batch(self.token_ids, *kept)


def anchor_positions(example: Example) -> range:
    """Where serving drafts: every response token that has a successor."""
    return range(len(example.prompt), len(example) - 1)


def make_batch(examples: Sequence[Example], positions: Tensor, num_labels: int) -> Batch:
    """`positions [B, M]`; negative ones are padding and have no valid label."""
    width = max(map(len, examples))
    token_ids = torch.zeros(len(examples), width + num_labels, dtype=torch.long)
    for row, example in enumerate(examples):
        token_ids[row, : len(example)] = torch.tensor(example.prompt + example.response)
    lengths = torch.tensor([len(example) for example in examples])
    where = positions.clamp_min(0)
    targets = where[..., None] + torch.arange(1, num_labels + 1)
    valid = (targets < lengths[:, None, None]) & (positions >= 0)[..., None]
    labels = token_ids.gather(1, targets.flatten(1)).view(targets.shape)
    return Batch(token_ids[:, :width], token_ids.gather(1, where), where, labels, valid)


def in_labels(
    vocabulary: DraftVocabulary | None, anchors: Tensor, labels: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the target, anchors `[N]` and labels and valid `[N, U]`, as labels of a draft vocabulary. A token that
    is no label cannot be learned, nor can the tokens behind it: they are not valid."""
    if vocabulary is None:
        return anchors, labels, valid
    inside = vocabulary.t2d[labels]
    known = torch.where(inside, vocabulary.to_labels(labels), 0)
    return vocabulary.to_labels(anchors), known, valid & inside.cumprod(1).bool()


def sample_batch(examples: Sequence[Example], num_anchors: int, num_labels: int, seed: int) -> Batch:
    """Random anchors without replacement; a short response repeats none and pads."""
    rng = random.Random(seed)
    rows = []
    for example in examples:
        positions = anchor_positions(example)
        chosen = sorted(rng.sample(positions, min(num_anchors, len(positions))))
        rows.append(chosen + [-1] * (num_anchors - len(chosen)))
    return make_batch(examples, torch.tensor(rows), num_labels)


def epochs(examples: Sequence[Example], batch_size: int, seed: int, first_step: int = 0) -> Iterator[list[Example]]:
    """Endless batches from `first_step` on: sequences of like length together, batches in random order. The last batch
    of an epoch is filled up, so that the same number of processes can share every batch."""
    usable = [example for example in examples if len(anchor_positions(example))]
    per_epoch = -(-len(usable) // batch_size)
    epoch, skip = divmod(first_step, per_epoch)
    while True:
        rng = random.Random(seed * 1_000_003 + epoch)
        filled = usable + [usable[i % len(usable)] for i in range(-len(usable) % batch_size)]
        order = sorted(filled, key=lambda example: len(example) + rng.random() * 16)
        starts = list(range(0, len(order), batch_size))
        rng.shuffle(starts)
        for start in starts[skip:]:
            yield order[start : start + batch_size]
        epoch, skip = epoch + 1, 0
