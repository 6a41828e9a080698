"""Runs the Triton tests of this folder in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton tests run on the GPU, in their own modules")
def test_triton_agrees_in_the_interpreter() -> None:
    # -P keeps the repository root off sys.path, where `kernels/` would be seen by transformers.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    # Without a selected test pytest returns 5.
    assert child.returncode == 0, child.stdout + child.stderr
