"""Triton code is tested on a GPU where there is one, and in Triton's interpreter by TRITON_INTERPRET=1 elsewhere.

The interpreter is chosen when triton is imported and holds for the whole process, vLLM's kernels included. So the tests
that take `triton_device` need a session of their own on a CPU, which `make test` runs too and which runs nothing else.
"""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from .bounds import bounded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SKIPPED = "needs a GPU or Triton's interpreter: TRITON_INTERPRET=1 pytest tests/kernels, which `make test` runs too"
# Tests of a CPU's paths, which a GPU machine with torch, Triton and pytest alone cannot import.
NEEDED = {
    "test_frame_properties.py": "hypothesis", "test_tree_properties.py": "hypothesis", "test_prefix_search.py": "numba",
}  # fmt: skip
collect_ignore = [file for file, package in NEEDED.items() if importlib.util.find_spec(package) is None]


@pytest.fixture
def triton_device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=INTERPRETED)
def no_access_astray() -> Iterator[None]:
    with bounded():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED or torch.cuda.is_available():
        return
    for item in items:
        if "triton_device" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason=SKIPPED))
