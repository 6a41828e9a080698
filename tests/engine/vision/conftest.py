"""These tests need torchvision: image processors resize with it, and vLLM's vision-language models import it."""

import importlib.util

import pytest

SKIPPED = "needs torchvision, beside which `make test` runs these: PYTHONPATH=.venv/vision pytest tests/engine/vision"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        return
    for item in items:
        if item.path.parent.name == "vision":
            item.add_marker(pytest.mark.skip(reason=SKIPPED))
