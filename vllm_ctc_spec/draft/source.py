"""Sources of draft trees: inputs, methods, names. A new source is a file beside this one and a line in SOURCES."""

import pkgutil
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames


class DraftStep(NamedTuple):
    """The part of a step that a source may read: B rows, one a request, of fixed shapes and addresses.

    Every field has a source that reads it. The first source that needs them adds the tokens of a request so far
    (`history` [S, L] int32 and `lengths` [S] int32, by request slot) or the target's hidden states (`hidden` [B, H]).
    """

    requests: Tensor  # [B] int64, the request slot; -1 is an inert row
    anchor: Tensor  # [B] int64, the last decided token, as a label of the frames
    chain_only: Tensor  # [B] bool, requests whose tree has to be a chain
    frames: Frames | None  # of the parallel drafter; None where the source does not read them


class DraftSource(Protocol):
    """Makes the trees of a step. Verification is exact, whatever the trees hold."""

    name: ClassVar[str]  # in SOURCES
    reads: ClassVar[frozenset[str]]  # of {"frames"}: the drafter's module runs only for a source that reads them

    def prepare(self, requests: Tensor, num_sampled: Tensor) -> None:
        """Called between a verification and the next draft, outside the CUDA graph. requests [R] int32: slots of the
        verified batch; num_sampled [R] int32: tokens that each of them has emitted."""

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        """[B, 1 + N] trees in the labels of the frames: with a draft vocabulary, not the target's token ids. Part of
        the drafter's CUDA graph: nothing is read on the host."""

    def reset(self, request: int) -> None:
        """A new request takes this slot."""


SOURCES = {"ctc": "vllm_ctc_spec.draft.ctc:CTCSource"}


def source_class(name: str) -> type[DraftSource]:
    """The class of that name in SOURCES; its arguments are its own."""
    return pkgutil.resolve_name(SOURCES[name])
