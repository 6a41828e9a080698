"""That an access outside of every tensor is seen, which no kernel's test may make."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU's memory cannot be watched")


@triton.jit
def _copy_kernel(x_ptr, y_ptr, FROM: tl.constexpr, TO: tl.constexpr, MASKED: tl.constexpr):
    """Four elements, of which the last is masked out."""
    i = tl.arange(0, 4)
    tl.store(y_ptr + TO + i, tl.load(x_ptr + FROM + i, mask=i < MASKED), mask=i < MASKED)


@triton.jit
def _through_address_kernel(address_ptr, y_ptr):
    tl.store(y_ptr, tl.load(tl.load(address_ptr).to(y_ptr.dtype)))


def test_accesses_up_to_the_edge_pass(triton_device: str) -> None:
    x, y = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    _copy_kernel[(1,)](x, y, FROM=0, TO=0, MASKED=3)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("first", "target", "what"), [(-1, 0, "load"), (1, 0, "load"), (0, -1, "store"), (0, 1, "store")]
)
def test_one_element_beyond_the_edge_is_seen(first: int, target: int, what: str, triton_device: str) -> None:
    with pytest.raises(InterpreterError, match=f"a {what} outside of every tensor"):
        _copy_kernel[(1,)](torch.arange(3), torch.zeros(3, dtype=torch.int64), FROM=first, TO=target, MASKED=3)


def test_an_address_that_was_loaded_must_be_of_a_tensor_that_exists(triton_device: str) -> None:
    x, y = torch.tensor([7]), torch.zeros(1, dtype=torch.int64)
    address = torch.tensor([x.data_ptr()])
    _through_address_kernel[(1,)](address, y)
    assert y.item() == 7
    del x
    with pytest.raises(InterpreterError, match="a load outside of every tensor"):
        _through_address_kernel[(1,)](address, y)
