"""`numba.njit` for the implementations that serve a CPU. Imported by nothing that serves a GPU."""

from collections.abc import Callable

import numba


def compiled(function: Callable) -> Callable:
    """`function`, compiled at its first call; the next process finds it where a cache can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder for the cache is writable
        return numba.njit(function)
