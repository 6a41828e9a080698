"""Sources of draft trees: inputs, methods, names. A new source is a file beside this one and a line in SOURCES."""

import pkgutil
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames


class RequestTokens(NamedTuple):
    """All requests' tokens so far, prompt and output, on the device, by request slot. Whoever owns them keeps them up
    to date in place: the tensors stay the same."""

    token_ids: Tensor  # [S, L] int32
    lengths: Tensor  # [S] int32


class DraftStep(NamedTuple):
    """The part of a step that a source may read: B rows, one a request, of fixed shapes and addresses.

    Every field has a source that reads it. A source of the target's hidden states would add `hidden` [B, H].
    """

    requests: Tensor  # [B] int64, the request slot; -1 is an inert row
    anchor: Tensor  # [B] int64, the last decided token
    chain_only: Tensor  # [B] bool, requests whose tree has to be a chain
    frames: Frames | None  # of the parallel drafter; None where the source does not read them
    vocabulary: DraftVocabulary | None = None  # of the frames' labels; None: they are the target's tokens


class DraftSource(Protocol):
    """Makes the trees of a step. Verification is exact, whatever the trees hold."""

    name: ClassVar[str]  # in SOURCES
    reads: ClassVar[frozenset[str]]  # of {"frames"}: the drafter's module runs only for a source that reads them

    def prepare(self, requests: Tensor, num_sampled: Tensor, num_logits: Tensor) -> None:
        """Called between a verification and the next draft, outside the CUDA graph, when `RequestTokens` has its
        tokens. Of the verified batch: requests [R] int32, slots; num_sampled [R] int32, tokens that each has emitted;
        num_logits [R] int32, rows that were verified, the anchor's included. Nothing is read on the host."""

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        """[B, 1 + N] trees of the target's tokens. Part of the drafter's CUDA graph: nothing is read on the host."""

    def reset(self, request: int) -> None:
        """A new request takes this slot."""


SOURCES = {
    "ctc": "vllm_ctc_spec.draft.ctc:CTCSource",
    "cache": "vllm_ctc_spec.draft.cache:CacheSource",
    "client": "vllm_ctc_spec.draft.client:ClientSource",
}


def source_class(name: str) -> type[DraftSource]:
    """The class of that name in SOURCES; its arguments are its own."""
    return pkgutil.resolve_name(SOURCES[name])
