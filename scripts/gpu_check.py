"""Does this machine's GPU compute what it should, and how fast? One command for any machine.

    pip install --no-deps --no-build-isolation -e .
    python scripts/gpu_check.py                        # everything that this machine can do
    python scripts/gpu_check.py --quick                # without what takes minutes
    python scripts/gpu_check.py --only kernels graphs

The tests marked `gpu`, in a process for each part, so that a crash in one leaves the others:
    kernels       every Triton kernel against its reference, and at served shapes against fp64 or exact integers
    graphs        the draft step in one CUDA graph a batch size, without a host synchronisation
    trainer       losses and gradients against fp64, and a short training
    engine        vLLM with an embedded pair: the same tokens with none, chain and tree, eager and with CUDA graphs
The benchmarks that need no server:
    budgets       time of each stage of a step against its floors in bytes and operations, and against its budget
    kernel_time   every kernel against its torch reference
    step_time     vLLM's step times of an 8B shape with dummy weights

torch, Triton and pytest are enough for kernels, and with tqdm for budgets and kernel_time. graphs and trainer need
safetensors, too; the short training needs vLLM, which answers its prompts. Parts that cannot run here are named and
skipped. Without a GPU the kernels run in Triton's interpreter. Writes OUTPUT.json and OUTPUT.md; the exit status is 1
if anything failed. The program prints the seed of the inputs: --seed repeats a run.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from record import describe_run, gpu, machine_line, write_record  # noqa: E402

TESTS = {
    "kernels": "tests/kernels", "graphs": "tests/gpu/test_graphs.py", "trainer": "tests/gpu/test_trainer.py",
    "engine": "tests/gpu/test_engine.py",
}  # fmt: skip
STEP_TIME = ["--shape", "8b", "--drafts", "chain:8", "tree:16", "tree:64", "--batch-sizes", "1", "16", "64"]
BENCHMARKS = {
    "budgets": ["budgets.py"], "kernel_time": ["kernel_time.py"], "step_time": ["latency_model.py", *STEP_TIME],
}  # fmt: skip
NO_TEST = 5  # pytest's exit status where it selects none
HAVE_QUICK = ("budgets", "kernel_time")
PARTS = (*TESTS, *BENCHMARKS)


class Outcome(NamedTuple):
    part: str
    name: str
    status: str  # passed, skipped or failed
    seconds: float = 0.0
    reason: str = ""


def obstacle(part: str, quick: bool) -> str | None:
    """Why a benchmark cannot run here."""
    if gpu() is None:
        return "it needs a GPU"
    if part == "step_time" and quick:
        return "it takes minutes"
    if part == "step_time" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    return None


def run_tests(part: str, args: argparse.Namespace, folder: Path) -> list[Outcome]:
    found = folder / f"{part}.xml"
    command = [sys.executable, "-P", "-m", "pytest", TESTS[part], "-m", "gpu and not slow" if args.quick else "gpu"]
    command += ["-q", "-p", "no:cacheprovider", "--seed", str(args.seed), "--junitxml", str(found)]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if part == "kernels" and gpu() is None else {})
    failure = run(command, args.timeout, environment)
    outcomes = read_outcomes(part, found) if found.is_file() else []
    if failure and not any(outcome.status == "failed" for outcome in outcomes):
        nothing = failure == f"exit status {NO_TEST}"
        reason = "no test: a package that they need is not installed" if nothing else failure
        outcomes.append(Outcome(part, "pytest", "skipped" if nothing else "failed", reason=reason))
    return outcomes


def read_outcomes(part: str, path: Path) -> list[Outcome]:
    """The outcome of every test, from JUnit's XML."""
    outcomes = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        status, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                status = "skipped" if child.tag == "skipped" else "failed"
                reason = (child.get("message") or "").partition("\n")[0][:300]
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes.append(Outcome(part, name, status, float(case.get("time", 0)), reason))
    return outcomes


def run_benchmark(part: str, args: argparse.Namespace, folder: Path) -> tuple[Outcome, dict | None, str]:
    """Its outcome, its record and its table."""
    if why := obstacle(part, args.quick):
        return Outcome(part, part, "skipped", reason=why), None, ""
    program, *options = BENCHMARKS[part]
    options += ["--quick"] if args.quick and part in HAVE_QUICK else []
    command = [sys.executable, str(ROOT / "benchmarks" / program), *options, "--output", str(folder / part)]
    failure = run(command, args.timeout, dict(os.environ))
    record, table = folder / f"{part}.json", folder / f"{part}.md"
    outcome = Outcome(part, part, "failed" if failure else "passed", reason=failure or "")
    if not record.is_file():
        return outcome, None, ""
    return outcome, json.loads(record.read_text(encoding="utf-8")), table.read_text(encoding="utf-8")


def run(command: list[str], timeout: int, environment: dict[str, str]) -> str | None:
    """Why the command failed, None if it did not."""
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        return f"nothing after {timeout} seconds"
    return f"exit status {status}" if status else None


def to_markdown(description: dict, outcomes: list[Outcome], tables: dict[str, str]) -> str:
    lines = [f"{machine_line(description)}; seed {description['seed']}; `{description['command']}`.", ""]
    lines += ["| part | passed | skipped | failed | seconds |", "|---|---|---|---|---|"]
    for part in dict.fromkeys(outcome.part for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.part == part]
        counts = Counter(outcome.status for outcome in own)
        cells = (part, counts["passed"], counts["skipped"], counts["failed"], f"{sum(o.seconds for o in own):.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    reasons = Counter((o.part, o.reason) for o in outcomes if o.status == "skipped")
    lines += ["", *(f"- {part}, {count} skipped: {reason}" for (part, reason), count in reasons.items())]
    lines += [f"- FAILED {o.part}: {o.name}: {o.reason}" for o in outcomes if o.status == "failed"]
    for part, table in tables.items():
        lines += ["", f"## {part}", "", table.rstrip()]
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="without what takes minutes")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the random inputs (default: new)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each part")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="path without suffix")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    print(f"seed {args.seed}", flush=True)
    outcomes, records, tables = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args.only:
            print(f"==> {part}", flush=True)
            if part in TESTS:
                outcomes += run_tests(part, args, Path(folder))
                continue
            outcome, record, table = run_benchmark(part, args, Path(folder))
            outcomes.append(outcome)
            if record is not None:
                records[part], tables[part] = record, table
    description = describe_run("scripts/gpu_check.py", argv, seed=args.seed)
    whole = {"run": description, "outcomes": [o._asdict() for o in outcomes], **records}
    write_record(args.output, whole, to_markdown(description, outcomes, tables))
    if all(outcome.status == "skipped" for outcome in outcomes):
        print("error: nothing of this can run here.", file=sys.stderr)
        return 1
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
