"""Drafts from a client's guess of the answer: the old text of an edit, a form letter, what a device drafted itself.

The guess is another text that `kernels/history_tree` scans. It is followed from its beginning, and after a difference
from the place that agrees with most of what the target has said last. It is untrusted: a wrong guess costs nodes of its
own request's trees, and its weight in the merge falls.
"""

from typing import ClassVar

from torch import Tensor

from vllm_ctc_spec.draft.cache import CacheSource
from vllm_ctc_spec.draft.source import RequestTokens
from vllm_ctc_spec.kernels.history_tree import Texts


class ClientSource(CacheSource):
    """A `DraftSource` of guesses."""

    name: ClassVar[str] = "client"

    def __init__(self, tokens: RequestTokens, guesses: Tensor, lengths: Tensor, starts: Tensor, num_nodes: int):
        """guesses [S, L] int32, lengths [S] int32, and starts [S] int32, where each request's output begins: written
        by their owner, who keeps their addresses."""
        super().__init__(tokens, len(lengths), num_nodes)
        self._guesses = guesses, lengths
        self._starts = starts

    def texts(self) -> Texts:
        return Texts(*self._guesses, *self._tokens, self._starts)
