"""Requests that a source drafts for, without an engine: a text that is known beforehand takes the target's place."""

from collections.abc import Sequence

import torch

from vllm_ctc_spec.draft.source import DraftSource, DraftStep, RequestTokens
from vllm_ctc_spec.kernels.contract import Budget, DraftTree


class Requests:
    """Slots of requests; `texts[slot]` is what each of them will have said, `begin[slot]` its prompt's length."""

    def __init__(self, texts: Sequence[list[int]], begin: Sequence[int]):
        self.texts, self.begin = texts, begin
        token_ids = torch.zeros(len(texts), 8 + max(map(len, texts)), dtype=torch.int32)
        for slot, (text, length) in enumerate(zip(texts, begin)):
            token_ids[slot, :length] = torch.tensor(text[:length])
        self.tokens = RequestTokens(token_ids, torch.tensor(begin, dtype=torch.int32))

    def draft(self, source: DraftSource, slots: list[int], num_nodes: int, chain_only: bool = False) -> DraftTree:
        requests = torch.tensor(slots)
        anchor = torch.tensor([int(self.tokens.token_ids[slot, self.tokens.lengths[slot] - 1]) for slot in slots])
        step = DraftStep(requests, anchor, torch.full((len(slots),), chain_only), None)
        return source.draft(step, Budget(num_nodes, 1, num_nodes))

    def say(self, slot: int, count: int) -> list[int]:
        """The next tokens of the text."""
        length = int(self.tokens.lengths[slot])
        said = self.texts[slot][length : length + count]
        self.tokens.token_ids[slot, length : length + len(said)] = torch.tensor(said, dtype=torch.int32)
        self.tokens.lengths[slot] += len(said)
        return said

    def verify(self, tree: DraftTree, row: int, slot: int) -> list[int]:
        """What the target says of a tree: the longest path that is the text's, and the token after it."""
        length, text = int(self.tokens.lengths[slot]), self.texts[slot]
        paths = {tuple(tree.path(row, node)) for node in range(1 + int(tree.num_nodes[row]))}
        accepted = 0
        while length + accepted < len(text) and tuple(text[length : length + accepted + 1]) in paths:
            accepted += 1
        return self.say(slot, accepted + 1)


def tell(source: DraftSource, slots: list[int], counts: list[int], num_nodes: int) -> None:
    """Between a verification of whole trees and the next draft."""
    emitted = torch.tensor(counts, dtype=torch.int32)
    source.prepare(torch.tensor(slots, dtype=torch.int32), emitted, torch.full_like(emitted, 1 + num_nodes))
