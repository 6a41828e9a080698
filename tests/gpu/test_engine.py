"""vLLM with the plugin: with chains and trees an embedded pair gives the tokens that it gives without a drafter, eager
and with CUDA graphs, one request at a time and many, greedy and sampled; nothing in the draft waits for the device."""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs and 16 bits need a GPU")

PAIR, QUESTIONS = "tiny", 24 if ON_GPU else 4
# Batches of other sizes are summed in another order, which may decide a tie. With 16 bits it decides more than ties,
# so that the first tokens are compared: how many, and of which share of the answers, by the way of asking.
COMPARED_TOKENS = {"float32": 96, "bfloat16": 8}
IDENTICAL = {
    "float32": {"one at a time": 1.0, "together": 0.9, "together, temperature 1": 0.9},
    "bfloat16": {"one at a time": 0.75, "together": 0.75, "together, temperature 1": 0.75},
}
ACCEPTED, ACCEPTED_SAMPLED = 2.0, 1.4  # tokens a step, or the comparison would show little


@functools.cache
def answers(draft: str, dtype: str, eager: bool) -> dict[str, dict]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.json"
        command = [sys.executable, Path(__file__).with_name("answers.py"), PAIR, draft, dtype, QUESTIONS, output]
        command += ["--eager"] if eager else []
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("draft", ["chain", "chain, sampled", "tree:16", "tree:64"])
@pytest.mark.parametrize(
    ("dtype", "eager"),
    [
        pytest.param("float32", True, id="float32, eager"),
        pytest.param("float32", False, id="float32, CUDA graphs", marks=needs_gpu),
        pytest.param("bfloat16", False, id="bfloat16, CUDA graphs", marks=needs_gpu),
    ],
)
def test_answers_are_those_without_a_drafter(dtype: str, eager: bool, draft: str) -> None:
    reference = answers("none", dtype, eager)
    for way, given in answers(draft, dtype, eager).items():
        sampled = "temperature" in way
        assert given["acceptance_length"] > (ACCEPTED_SAMPLED if sampled else ACCEPTED), way
        if sampled and draft.startswith("chain"):
            continue  # a chain keeps the distribution, not the dice
        pairs = zip(given["token_ids"], reference[way]["token_ids"], strict=True)
        same = sum(a[: COMPARED_TOKENS[dtype]] == b[: COMPARED_TOKENS[dtype]] for a, b in pairs)
        assert same >= IDENTICAL[dtype][way] * QUESTIONS, way
