"""A GPU whose memory is full, as a sentence."""

import contextlib
from collections.abc import Iterator

import torch

from vllm_ctc_spec.errors import TrainingError


@contextlib.contextmanager
def explain_out_of_memory(remedies: str) -> Iterator[None]:
    """A GPU whose memory is full is a TrainingError; remedies: what the user can do about it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).strip().split(". ")[:2]).rstrip(".")  # the request; a paragraph follows
        raise TrainingError(f"The GPU's memory is too small ({reason}); {remedies}.") from error
