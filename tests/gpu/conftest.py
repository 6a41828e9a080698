"""What a GPU changes. On a CPU the same tests run as far as it goes, at small shapes: so they are known to work."""

import importlib.util

import pytest
import torch

# The drafter's module reads its weights by safetensors, which torch and Triton do not bring along.
collect_ignore = [] if importlib.util.find_spec("safetensors") else ["test_graphs.py", "test_trainer.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
