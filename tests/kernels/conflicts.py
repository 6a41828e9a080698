"""Accesses of global memory that a GPU does not order, seen in Triton's interpreter.

The interpreter runs one program after another, and each of them in order; a barrier does nothing there. On a GPU the
threads of a program meet at barriers only, and programs never. `watched()` records every access of what runs inside,
between two barriers of a program and over all programs of a launch.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from triton.runtime import interpreter

import vllm_ctc_spec.kernels

KERNELS = Path(vllm_ctc_spec.kernels.__file__).parent


class Access(NamedTuple):
    line: str
    program: tuple
    addresses: np.ndarray  # of the elements that the mask lets through
    lanes: np.ndarray  # which element of the block each is
    shape: tuple


class Watch:
    def __init__(self):
        self.kernel, self.program = "", ()
        self.found: set[str] = set()
        self.loads: list[Access] = []  # since the last barrier, as `stores`
        self.stores: list[Access] = []
        self.launch: list[tuple[bool, Access]] = []  # of all programs; whether it is a store

    def start(self, kernel: str) -> None:
        self.kernel, self.launch = kernel, []

    def meet(self) -> None:
        self.loads, self.stores = [], []

    def access(self, is_store: bool, pointers: np.ndarray, mask: np.ndarray) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        mask = mask.astype(bool)
        lanes = np.arange(pointers.size).reshape(pointers.shape)[mask]
        new = Access(_line(), self.program, pointers[mask].astype(np.int64), lanes, pointers.shape)
        for old in [*self.stores, *(self.loads if is_store else [])]:
            if _meet_in_other_lanes(old, new):
                self.found.add(f"{self.kernel}: {old.line} and {new.line} without a barrier")
        (self.stores if is_store else self.loads).append(new)
        self.launch.append((is_store, new))

    def finish(self) -> None:
        """Whether programs of the launch touched what another one wrote."""
        owner: dict[int, tuple] = {}
        for is_store, access in self.launch:
            if is_store and any(
                owner.setdefault(a, access.program) != access.program for a in access.addresses.tolist()
            ):
                self.found.add(f"{self.kernel}: {access.line} writes what another program writes")
        for is_store, access in self.launch:
            if not is_store and any(owner.get(a, access.program) != access.program for a in access.addresses.tolist()):
                self.found.add(f"{self.kernel}: {access.line} reads what another program writes")


def _line() -> str:
    """Of the kernel that is being run."""
    frame = sys._getframe(2)
    while frame is not None and KERNELS not in Path(frame.f_code.co_filename).parents:
        frame = frame.f_back
    return "?" if frame is None else f"{Path(frame.f_code.co_filename).relative_to(KERNELS)}:{frame.f_lineno}"


def _meet_in_other_lanes(old: Access, new: Access) -> bool:
    """The same lane of blocks of one shape is the same thread, whose own accesses are in order."""
    common, of_old, of_new = np.intersect1d(old.addresses, new.addresses, return_indices=True)
    same_threads = old.shape == new.shape and np.array_equal(old.lanes[of_old], new.lanes[of_new])
    return common.size > 0 and not same_threads


@contextlib.contextmanager
def watched(with_barriers: bool = True) -> Iterator[set[str]]:
    """What is found, one sentence for each pair of lines; complete when the block has ended."""
    watch, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    kept = {name: getattr(builder, name) for name in
            ("create_masked_load", "create_masked_store", "create_barrier", "set_grid_idx")}  # fmt: skip
    launch = executor.__call__

    def load(self, pointers, mask, *rest):
        watch.access(False, pointers.data, mask.data)
        return kept["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        watch.access(True, pointers.data, mask.data)
        return kept["create_masked_store"](self, pointers, value, mask, *rest)

    def barrier(self):
        if with_barriers:
            watch.meet()
        return kept["create_barrier"](self)

    def program(self, *index):
        watch.meet()
        watch.program = index
        return kept["set_grid_idx"](self, *index)

    def call(self, *args, **options):
        watch.start(self.fn.__name__)
        result = launch(self, *args, **options)
        watch.finish()
        return result

    new = {"create_masked_load": load, "create_masked_store": store, "create_barrier": barrier, "set_grid_idx": program}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in new.items():
            patch.setattr(builder, name, function)
        patch.setattr(executor, "__call__", call)
        yield watch.found
