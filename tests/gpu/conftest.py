"""What a GPU changes. On a CPU the same tests run as far as it goes, at small shapes: so they are known to work."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
