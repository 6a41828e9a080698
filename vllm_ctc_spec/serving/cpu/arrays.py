"""Numpy views of a kernel launch's arguments: tensors, and raw addresses of int32 tables."""

import ctypes
import functools

import numpy as np
import torch


def arrays(*tensors: torch.Tensor | None) -> list[np.ndarray | None]:
    """The memory of each tensor as a numpy array; a numpy call costs a fraction of a torch call on a few elements."""
    return [None if tensor is None else tensor.numpy() for tensor in tensors]


def float_array(tensor: torch.Tensor) -> np.ndarray:
    """Logits as float32: a view of float32, a copy of other dtypes (numpy cannot read bfloat16)."""
    return tensor.float().numpy()


@functools.lru_cache(maxsize=4096)
def int32_table(address: int, rows: int, columns: int) -> np.ndarray:
    """The int32 table `[rows, columns]` at a raw address; KV cache groups come as addresses.

    Building a view from ctypes costs ten times its use. A cached view is read only when the caller hands over its
    address again, so it never outlives the memory in use.
    """
    return np.ctypeslib.as_array((ctypes.c_int32 * (rows * columns)).from_address(address)).reshape(rows, columns)
