"""`both` and `agree`: one call of vLLM, once with its Triton kernels under the interpreter and once with ours."""

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from vllm_ctc_spec.serving import cpu

if not cpu.is_needed():
    collect_ignore_glob = ["test_*.py"]


class Outcome(NamedTuple):
    result: Any
    args: tuple
    kwargs: dict


@pytest.fixture(scope="session")
def both():
    """`both(name, *args, grid=None, **kwargs)` gives the Outcome of Triton's side and of ours.

    `name` is below `vllm.v1.worker.gpu`: a kernel, which needs its grid, or a host function that launches kernels. A
    list of tensors is handed over as the table of their addresses.
    """
    script = Path(__file__).with_name("interpreter.py")
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(name, *args, grid=None, **kwargs):
        pickle.dump((name, grid, args, kwargs), process.stdin)
        process.stdin.flush()
        answer = pickle.load(process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return [Outcome(*outcome) for outcome in answer]

    yield call
    process.stdin.close()
    assert process.wait(timeout=60) == 0


@pytest.fixture
def agree(both):
    """The same call, which must leave the same results and the same arguments on both sides; returns our Outcome."""

    def call(name, *args, grid=None, **kwargs):
        theirs, ours = both(name, *args, grid=grid, **kwargs)
        assert_same(theirs, ours)
        return ours

    return call


def assert_same(expected: Any, actual: Any) -> None:
    if isinstance(expected, torch.Tensor):
        tolerance = 1e-5 if expected.is_floating_point() else 0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    elif isinstance(expected, SimpleNamespace):
        assert_same(vars(expected), vars(actual))
    elif isinstance(expected, dict):
        assert_same(list(expected.values()), list(actual.values()))
    elif isinstance(expected, (tuple, list)):
        assert len(expected) == len(actual)
        for one, other in zip(expected, actual, strict=True):
            assert_same(one, other)
    else:
        assert expected == actual
