"""The kernels with the releases of Triton that vLLM's GPU builds install: `pytest -m slow
tests/kernels/test_triton_releases.py`. The lock file has another one, and its figures are those on record."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .test_compiles_ahead import compile_ahead

RELEASES = {"3.7.1": "vLLM 0.32, torch 2.13", "3.8.0": "vLLM 0.33, torch 2.14"}
SPILLED = 64  # bytes of a thread: each release allocates registers its own way, and some dozen bytes stay in the cache


@pytest.fixture(scope="module", params=RELEASES)
def triton(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The release, and a folder that holds it."""
    folder = tmp_path_factory.mktemp("release")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, f"triton=={request.param}"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no index has triton {request.param}: {done.stderr.splitlines()[-1:]}")
    return request.param, folder


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_launch_compiles(triton: tuple[str, Path], tmp_path: Path) -> None:
    release, folder = triton
    compiled = compile_ahead(tmp_path, "--all", PYTHONPATH=path_with(folder))
    assert compiled["triton"] == release
    limits = compiled["shared_memory"]
    assert [x for x in compiled["launches"] if x["shared"] > limits[str(x["architecture"])]] == []
    assert [x for x in compiled["launches"] if x["spilled"] and x["spilled"] > SPILLED] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_interpreter_computes_the_same(triton: tuple[str, Path]) -> None:
    _, folder = triton
    environment = os.environ | {"PYTHONPATH": path_with(folder), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
