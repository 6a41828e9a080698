"""How many threads vLLM's worker computes with on a CPU, by the size of the target."""

import os
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
