"""How many threads vLLM's worker computes with on a CPU, by the size of the target."""

import os
import re
from pathlib import Path

VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"  # vLLM's
LARGE_TARGET = 200_000_000  # bytes of weights


def is_large(target: str | Path) -> bool:
    """Whether the target has work for more than one thread. With a few million weights a step is shorter than the waits
    of threads for each other while vLLM's other processes use their cores."""
    return sum(file.stat().st_size for file in Path(target).glob("*.safetensors")) >= LARGE_TARGET


def threads_of(target: str | Path) -> dict[str, str]:
    """Environment of a vLLM that has this machine for itself. vLLM's own choice leaves one core to its other processes,
    half of a machine with two: a large target gets all cores that this process may use. The user's own value of the
    variable should win."""
    return {VARIABLE: ",".join(map(str, sorted(os.sched_getaffinity(0))))} if is_large(target) else {}


def threads_asked_for() -> int | None:
    """How many threads the environment gives a worker (the variable's forms: vllm/utils/ompmultiprocessing.py). None:
    vLLM chooses."""
    bound = os.environ.get(VARIABLE, "auto")
    if bound == "nobind":
        return threads_unbound(len(os.sched_getaffinity(0)))
    ranges = re.findall(r"(\d+)(?:-(\d+))?", bound.partition("|")[0])
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or None


def threads_unbound(default: int) -> int:
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() else default
