"""The draft vocabulary: the target's tokens that a frame can hold as labels.

The head's product with T frames is a large part of a draft's cost, and most tokens of a large vocabulary are hardly
ever said. A drafter may therefore have labels of its own, `0..L-1`, each of which is one of the target's V tokens. Its
checkpoint keeps them as EAGLE-3's do (vllm/model_executor/models/llama_eagle3.py): `d2t [L] int64`, the target's id of
label i is `i + d2t[i]`, and `t2d [V] bool`, whether a token is a label. Labels stand in the order of the target's ids.

Kernels, losses and tables work on labels. An anchor may be any token of the target: one that is no label has the number
`L`, with its own row in the label-conditional head's input table, and is in no frame.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class DraftVocabulary(NamedTuple):
    token_ids: Tensor  # [L] int64, increasing: the target's id of each label
    labels: Tensor  # [V] int64: the label of each of the target's tokens, L where it has none

    @classmethod
    def of(cls, token_ids: Tensor, vocab_size: int) -> "DraftVocabulary":
        """token_ids: increasing, below `vocab_size`."""
        num_labels = len(token_ids)
        labels = torch.full((vocab_size,), num_labels, dtype=torch.long, device=token_ids.device)
        return cls(token_ids, labels.scatter_(0, token_ids, torch.arange(num_labels, device=token_ids.device)))

    @classmethod
    def from_d2t(cls, d2t: Tensor, vocab_size: int) -> "DraftVocabulary":
        return cls.of(d2t + torch.arange(len(d2t), device=d2t.device), vocab_size)

    @property
    def d2t(self) -> Tensor:
        return self.token_ids - torch.arange(len(self.token_ids), device=self.token_ids.device)

    @property
    def t2d(self) -> Tensor:
        return self.labels < len(self.token_ids)

    def to_labels(self, tokens: Tensor) -> Tensor:
        """`[...]` tokens of the target to labels, L where there is none."""
        return self.labels[tokens]

    def to_tokens(self, labels: Tensor) -> Tensor:
        """`[...]` labels to tokens of the target. L, the filler past a draft's end, becomes any token."""
        return self.token_ids[labels.clamp_max(len(self.token_ids) - 1)]
