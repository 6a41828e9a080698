"""Triton code is tested on a GPU where there is one, and in Triton's interpreter elsewhere.

The interpreter is chosen when triton is imported and holds for the whole process, vLLM's kernels included. So a test
that takes `triton_device` runs in this process only on a GPU or under TRITON_INTERPRET=1; otherwise it is deselected
here, and test_interpreted.py runs it in a process of its own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .bounds import bounded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def triton_device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=INTERPRETED)
def no_access_astray() -> Iterator[None]:
    with bounded():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def belongs_elsewhere(item: pytest.Item) -> bool:
        if Path(__file__).parent not in item.path.parents:
            return False
        needs_triton = "triton_device" in item.fixturenames
        return not needs_triton if INTERPRETED else needs_triton and not torch.cuda.is_available()

    deselected = [item for item in items if belongs_elsewhere(item)]
    items[:] = [item for item in items if item not in deselected]
    config.hook.pytest_deselected(items=deselected)
