"""What the kernels of a draft take on an H200, calculated from their machine code and their bytes, without a GPU.

    python tests/kernels/gpu_budget.py            # print the rows
    python tests/kernels/gpu_budget.py --write    # to benchmarks/results/gpu_budget.json and .md

Every kernel that a stage launches is compiled for sm_90 and disassembled. An instruction counts as often as the loops
around it turn (`TURNS`), on whatever path. A launch takes as long as the busiest of a multiprocessor's four schedulers
issues the instructions of its warps, or its busiest unit needs for them, or as its bytes take at the bandwidth; every
launch also costs what lies between two kernels of a CUDA graph. Waiting for memory, barriers and results is not in it.
So a kernel over its budget here is too slow; one within it has yet to be timed, by benchmarks/budgets.py.
test_gpu_budget.py holds all to their budgets.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from compile_ahead import HOPPER, compiled
from launches import Launch, empty, frames_of, recorded_calls, sampled_chain, search

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import budgets  # noqa: E402

from vllm_ctc_spec.draft.ctc import default_width  # noqa: E402
from vllm_ctc_spec.kernels.best_tokens import best_tokens_triton  # noqa: E402
from vllm_ctc_spec.kernels.frame_stats import frame_stats_triton  # noqa: E402

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
RECORD = Path(__file__).resolve().parents[2] / "benchmarks/results/gpu_budget"
COMMAND = "python tests/kernels/gpu_budget.py --write"
# An H200, by its data sheet. The microseconds are an assumption.
MULTIPROCESSORS, SCHEDULERS, CLOCK, BANDWIDTH = 132, 4, 1.98e9, 4.8e12
LAUNCH_MICROSECONDS = 1.5
# Cycles that a unit of one scheduler is busy with an instruction of a warp, by the throughputs of compute capability
# 9.0 in NVIDIA's programming guide. What is in no unit takes the scheduler's one cycle.
UNITS = {
    "special functions": (8, "MUFU|POPC|F2F|F2I|I2F|REDUX|FLO"),
    "memory and shuffles": (4, "SHFL|LDG|STG|LDS|STS|LDL|STL|LD|ST|ATOM|ATOMS|ATOMG|RED"),
    "integers and comparisons": (
        2,
        "FMNMX|FSETP|FSEL|FSET|ISETP|IMNMX|VIMNMX|VIMNMX3|IADD3|VIADD|LOP3|SHF|SEL|PRMT|LEA|PLOP3|SGXT|IABS|IMAD",
    ),
}
# How often each loop of a kernel turns, by the order of their heads in the machine code: from the launch's values and
# the loops' instructions, because compilers unroll.
TURNS: dict[str, Callable[[dict, list[Counter]], list[float]]] = {
    # A comparison of a count in each of BITS - 1 steps.
    "_best_tokens_kernel": lambda x, bodies: [(x["BITS"] - 1) / body["FSETP"] for body in bodies],
    "search_kernel": lambda x, bodies: [x["N"], *turns_of_products(x, bodies[1:])],
    "chain_kernel": lambda x, bodies: [x["num_labels"], *turns_of_products({**x, "bias_ptr": None}, bodies[1:])],
}
BATCHES = 1, 64
DRAFT_LABELS = 32_768
# Parameters of an 8B target and of a drafter of one such layer that reads five of them: hidden size 4096, 36 layers
# with 32 query and 8 key heads of 128 and 12 288 inner features, V = 151 936.
HIDDEN, LAYERS = 4096, 36
LAYER = HIDDEN * (2 * 32 + 2 * 8) * 128 + 3 * HIDDEN * 12_288
TARGET_BYTES = 2.0 * (LAYERS * LAYER + HIDDEN * budgets.VOCABULARY)
DRAFT_SHARE = 0.08


def turns_of_products(values: dict, bodies: list[Counter]) -> list[float]:
    """Of the loops at a node: over frames, and over the head where its products are not made before. A thread
    multiplies once for each of its candidates and frames, or columns of the head. Where the compiler has unrolled one
    of them wholly, it is the first."""
    rows = [values["T"], *([values["RANK"]] if values["bias_ptr"] is None else [])]
    candidates = values["BLOCK_M"] / (32 * values["num_warps"])
    return [number * candidates / body["FFMA"] for number, body in zip(rows[-len(bodies) :], bodies)]


class Instruction(NamedTuple):
    opcode: str  # without its modifiers
    target: int | None  # the number of the instruction that a branch goes to


class Issue(NamedTuple):
    slots: float  # instructions that one warp issues
    units: dict[str, float]  # cycles of each unit for one warp

    @property
    def cycles(self) -> float:
        return max(self.slots, *self.units.values())


class Row(NamedTuple):
    stage: str
    batch: int
    microseconds: float
    budget: float  # microseconds
    launches: int
    issue: float  # microseconds, of all launches
    bytes: float
    kernels: dict[str, float]  # microseconds of each kernel, all its launches

    @property
    def within(self) -> bool:
        return self.microseconds <= self.budget


def disassembled(cubin: bytes) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return read_listing(text)


def read_listing(text: str) -> list[Instruction]:
    """Of one kernel, without the paths of warps whose threads diverge, which no kernel here has, and without the jump
    to itself that ends it."""
    code, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*);", line):
            code.append(instruction.groups())
    jumps = [re.search(r"`\((\.L_\w+)\)", rest) if opcode == "BRA" else None for opcode, rest in code]
    targets = [None if jump is None else labels[jump[1]] for jump in jumps]
    diverged = [target for (_, rest), target in zip(code, targets) if target is not None and rest.startswith(".DIV")]
    end = min([*diverged, *(place for place, target in enumerate(targets) if target == place), len(code)])
    return [Instruction(opcode, target) for (opcode, _), target in zip(code[:end], targets)]


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last instruction of every loop, by the first: branches backwards to one place are one loop."""
    ends: dict[int, int] = {}
    for place, instruction in enumerate(code):
        if instruction.target is not None and instruction.target <= place:
            ends[instruction.target] = place
    return sorted(ends.items())


def issue(code: list[Instruction], turns: Callable[[list[Counter]], list[float]]) -> Issue:
    """Raises ValueError where the loops are not those whose turns are known."""
    found = loops(code)
    known = turns([Counter(x.opcode for x in code[first : last + 1]) for first, last in found])
    if len(found) != len(known):
        raise ValueError(f"{len(found)} loops in the machine code, and the turns of {len(known)} are known")
    times = [1.0] * len(code)
    for (first, last), number in zip(found, known):
        for place in range(first, last + 1):
            times[place] *= number
    units = {
        unit: cycles * sum(count for x, count in zip(code, times) if re.fullmatch(opcodes, x.opcode))
        for unit, (cycles, opcodes) in UNITS.items()
    }
    return Issue(sum(times), units)


def issue_microseconds(of_warp: Issue, programs: int, num_warps: int) -> float:
    """On the busiest scheduler of the multiprocessor that has the most programs."""
    warps = -(-programs // MULTIPROCESSORS) * num_warps
    return -(-warps // SCHEDULERS) * of_warp.cycles / CLOCK * 1e6


def bytes_of(launch: Launch) -> float:
    """Of what is read or written once and is too large to be in a cache."""
    if launch.kernel.__name__ == "_frame_stats_kernel":
        logits, tile_best = (launch.values[name] for name in ("logits_ptr", "tile_best_ptr"))
        return float(logits.nbytes + tile_best.nbytes)
    if launch.kernel.__name__ == "bias_kernel":
        return float(launch.values["bias_ptr"].nbytes)
    if launch.kernel.__name__ == "clear_kernel":
        return float(launch.values["draft_ptr"].nbytes)
    return 0.0


def row_of(stage: str, batch: int, budget: float, launches: list[Launch], more: float = 0.0) -> Row:
    """more: bytes that are read besides, by what is not launched from here."""
    kernels: dict[str, float] = {}
    total, num_bytes, issued = more / BANDWIDTH * 1e6, more, 0.0
    for launch in launches:
        name, programs = launch.kernel.__name__, 1
        for size in launch.grid:
            programs *= size
        of_warp = issue_of(launch)
        busy = issue_microseconds(of_warp, programs, launch.options["num_warps"])
        time = max(busy, bytes_of(launch) / BANDWIDTH * 1e6) + LAUNCH_MICROSECONDS
        kernels[name] = kernels.get(name, 0.0) + time
        total, num_bytes, issued = total + time, num_bytes + bytes_of(launch), issued + busy
    return Row(stage, batch, total, budget, len(launches), issued, num_bytes, kernels)


_known: dict[tuple, Issue] = {}


def issue_of(launch: Launch) -> Issue:
    """Compiled once for all batch sizes and labels."""
    name, values = launch.kernel.__name__, launch.values
    absent = tuple(argument for argument, value in values.items() if value is None)
    key = name, tuple(launch.options.items()), absent, values.get("num_tokens"), values.get("batch")
    if key not in _known:
        turns = TURNS.get(name, lambda values, bodies: [])
        code = disassembled(compiled(launch, HOPPER)[0].asm["cubin"])
        try:
            _known[key] = issue(code, lambda bodies: turns(values, bodies))
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return _known[key]


def draft_bytes() -> float:
    """A drafter of one layer: the layer, the projection of five layers' hidden states, and a head of DRAFT_LABELS."""
    return 2.0 * (LAYER + 5 * HIDDEN * HIDDEN + DRAFT_LABELS * HIDDEN)


def calculate() -> list[Row]:
    calls = recorded_calls(HOPPER)

    def launched(run: Callable[[], object]) -> list[Launch]:
        calls.clear()
        run()
        return list(calls)

    def candidates(batch: int, num_tokens: int = budgets.VOCABULARY) -> list[Launch]:
        logits = empty(batch, budgets.FRAMES, num_tokens, dtype=torch.bfloat16)
        width = default_width(budgets.NODES)
        return launched(lambda: best_tokens_triton(logits, width, frame_stats_triton(logits).tile_best))

    def searched(batch: int, num_nodes: int, chains: bool, num_tokens: int = budgets.VOCABULARY) -> list[Launch]:
        """Behind the candidates."""
        frames = given(batch, num_tokens)
        return [
            call
            for call in launched(lambda: search(frames, num_nodes, chains=chains))
            if call.kernel.__name__ in ("candidates_kernel", "bias_kernel", "search_kernel")
        ]

    def given(batch: int, num_tokens: int = budgets.VOCABULARY):
        return frames_of(budgets.FRAMES, torch.bfloat16, budgets.RANK, batch=batch, num_tokens=num_tokens)

    rows = []
    for batch in BATCHES:
        budget = budgets.CANDIDATES_MICROSECONDS[batch]
        rows.append(row_of("frame statistics and candidates", batch, budget, candidates(batch)))
    for batch in BATCHES:
        launches = searched(batch, budgets.NODES, chains=True)
        rows.append(row_of("tree search with masks", batch, budgets.SEARCH_MICROSECONDS[batch], launches))
    for batch in BATCHES:
        launches = searched(batch, budgets.LABELS, chains=True)
        rows.append(row_of("greedy chain of 8 labels", batch, budgets.CHAIN_MICROSECONDS[batch], launches))
    for batch in BATCHES:
        launches = launched(lambda batch=batch: sampled_chain(given(batch), budgets.LABELS))
        rows.append(row_of("sampled chain of 8 labels", batch, budgets.CHAIN_MICROSECONDS[batch], launches))
    launches = candidates(1, DRAFT_LABELS) + searched(1, budgets.NODES, True, DRAFT_LABELS)
    budget = DRAFT_SHARE * TARGET_BYTES / BANDWIDTH * 1e6
    rows.append(row_of("draft step, 32 768 labels, one layer", 1, budget, launches, draft_bytes()))
    return rows


def to_markdown(record: dict, rows: list[Row]) -> str:
    lines = [
        "Calculated, not measured: no GPU has run these kernels. Microseconds on an H200 (132 multiprocessors, 1.98 "
        f"GHz, 4.8 TB/s) of kernels compiled for sm_90 by Triton {record['triton']}; regenerate with `{COMMAND}`. "
        "V = 151 936, T = 12, N = 63, a head of rank 64, bf16. Issue: the instructions of the busiest scheduler, or of "
        "its busiest unit, by the machine code and the turns of its loops. A launch takes the larger of issue and "
        f"bytes, and {LAUNCH_MICROSECONDS} us (assumed). Waiting for memory and barriers is not in it, so expect more "
        "of a GPU. The draft step is the weights of a drafter of one layer, the statistics and the search; its budget "
        "is the time in which 8 % of the weights of an 8B target are read.",
        "",
        "| stage | batch | calculated | budget | | launches | issue | MB | of it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        parts = "; ".join(f"`{name}` {time:.1f}" for name, time in r.kernels.items())
        lines.append(
            f"| {r.stage} | {r.batch} | {r.microseconds:.1f} | {r.budget:.0f} | {'' if r.within else 'OVER'} | "
            f"{r.launches} | {r.issue:.1f} | {r.bytes / 1e6:.1f} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="the record in benchmarks/results")
    args = parser.parse_args()
    rows = calculate()
    record = {"command": COMMAND, "triton": triton.__version__, "rows": [row._asdict() for row in rows]}
    if args.write:
        RECORD.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        RECORD.with_suffix(".md").write_text(to_markdown(record, rows), encoding="utf-8")
    else:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
