"""Runs the Triton tests of this folder in Triton's interpreter, one process per module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
MODULES = ["test_collapse.py", "test_frame_stats.py", "test_noise.py", "test_prefix_chain.py"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton tests run on the GPU, in their own modules")
@pytest.mark.parametrize("module", MODULES)
def test_triton_agrees_in_the_interpreter(module: str) -> None:
    # -P keeps the repository root off sys.path, where `kernels/` would be seen by transformers.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    child = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


def test_no_module_with_triton_tests_is_forgotten() -> None:
    with_triton = {path.name for path in HERE.glob("test_*.py") if "triton_device" in path.read_text()}
    assert with_triton - {Path(__file__).name} == set(MODULES)
