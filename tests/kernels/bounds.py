"""Accesses of memory that no tensor holds, refused in Triton's interpreter.

There a kernel that goes astray reads or overwrites whatever the process keeps at that address, and what comes of it
shows much later, in other code, or never.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class Memory:
    """The storages of tensors, as ranges of addresses."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
        ends = {storage.data_ptr(): storage.data_ptr() + storage.nbytes() for storage in storages if storage.nbytes()}
        self.starts = np.array(sorted(ends), dtype=np.int64)
        self.ends = np.array([ends[start] for start in sorted(ends)], dtype=np.int64)

    def holds(self, addresses: np.ndarray, num_bytes: int) -> bool:
        """Whether it holds `num_bytes` from each of the addresses on."""
        if not self.starts.size:
            return False
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        return bool(((at >= 0) & (addresses + num_bytes <= self.ends[at])).all())


def _tensors_of(argument: object) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, tuple):
        for each in argument:
            yield from _tensors_of(each)


def _all_tensors() -> Iterator[torch.Tensor]:
    return (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A kernel fails at an access outside of the tensors that it was given, or, for addresses that it loaded, of those
    that exist."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__
    memory = Memory([])

    def check(pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle, what: str) -> None:
        addresses, through = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[through.astype(bool)].astype(np.int64)
        num_bytes = pointers.get_element_ty().primitive_bitwidth // 8
        if addresses.size and not memory.holds(addresses, num_bytes):
            assert Memory(_all_tensors()).holds(addresses, num_bytes), f"{what} outside of every tensor"

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask, "a load")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask, "a store")
        return store(self, pointers, value, mask, *rest)

    def checked_launch(self, *args, **options):
        nonlocal memory
        memory = Memory(_tensors_of((*args, *options.values())))
        return launch(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(executor, "__call__", checked_launch)
        yield
