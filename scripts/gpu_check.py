"""Does this machine's GPU compute what it should, and how fast? One command for any machine.

    pip install --no-deps --no-build-isolation -e .
    python scripts/gpu_check.py                        # everything that this machine can do
    python scripts/gpu_check.py --quick                # one small shape of everything
    python scripts/gpu_check.py --only kernels graphs

    kernels   every Triton kernel against fp64 or exact integers: fresh random inputs, outputs that start as NaN
    graphs    the draft step in one CUDA graph a batch size, without a host synchronisation
    budgets   time of each stage of a step against its floors in bytes and operations, and against its budget
    trainer   losses and gradients against fp64, and a short training
    engine    vLLM with an embedded pair: the same greedy tokens with none, chain and tree, eager and with CUDA graphs;
              step times of an 8B shape with dummy weights

What cannot run here is said and skipped: `engine` and the short training without vLLM, `graphs` and `budgets` without a
GPU. Without a GPU the kernels run in Triton's interpreter. Every part has a process of its own, so that a crash in one
leaves the others.
Writes OUTPUT.json and OUTPUT.md; the exit status is 1 if anything failed. The seed is printed: --seed repeats a run.
"""

import argparse
import importlib
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # behind this folder: its programs have their own names

from outcome import FAILED, NOT_RUN, Outcome, Settings  # noqa: E402
from pair import TINY, read_pair  # noqa: E402
from record import processor, write_record  # noqa: E402

PARTS = ("kernels", "graphs", "budgets", "trainer", "engine")
PACKAGES = ("torch", "triton", "transformers", "vllm")


def run_part(part: str, settings: Settings, timeout: int) -> list[Outcome]:
    """In a process of its own, which writes each outcome as soon as it is known."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "outcomes.jsonl"
        command = [sys.executable, __file__, "--child", part, "--seed", str(settings.seed), "--output", str(found)]
        command += ["--pair", settings.pair, *(["--quick"] if settings.quick else [])]
        environment = dict(os.environ)
        if part in ("kernels", "graphs") and not has_gpu():
            environment["TRITON_INTERPRET"] = "1"
        try:
            status = subprocess.run(command, env=environment, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            status = f"nothing after {timeout} seconds"
        lines = found.read_text(encoding="utf-8").splitlines() if found.is_file() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    if status:
        outcomes.append(Outcome(part, "its process", FAILED, f"ended with {status}, see its messages above"))
    return outcomes


def run_child(part: str, settings: Settings, output: Path) -> None:
    module = importlib.import_module(f"check_{part}")
    with output.open("w", encoding="utf-8") as file:
        for outcome in module.check(settings):
            print(f"{outcome.part}: {outcome.check}: {outcome.status} {outcome.detail}", flush=True)
            file.write(json.dumps(outcome._asdict()) + "\n")
            file.flush()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def describe(argv: list[str], seed: int) -> dict:
    import torch

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "command": shlex.join(["python", "scripts/gpu_check.py", *(Path(word).name for word in argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "gpu": torch.cuda.get_device_name() if has_gpu() else None,
        "cuda": torch.version.cuda,
        "cpu": processor(),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
    }


def to_markdown(run: dict, outcomes: list[Outcome]) -> str:
    versions = ", ".join(f"{package} {run[package] or '(none)'}" for package in PACKAGES)
    lines = [
        f"{run['gpu'] or 'no GPU'}; {run['cpu']}; {versions}, CUDA {run['cuda']}, Python {run['python']}; "
        f"{run['date'][:10]}; seed {run['seed']}; `{run['command']}`.",
        "",
        "| part | check | result | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {o.part} | {o.check} | {o.status} | {o.detail} |" for o in outcomes]
    counts = {status: sum(o.status == status for o in outcomes) for status in sorted({o.status for o in outcomes})}
    return "\n".join([*lines, "", ", ".join(f"{count} {status}" for status, count in counts.items()) + "."]) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="one small shape of everything")
    parser.add_argument("--pair", default=TINY, metavar="NAME", help="of the engine (default: tiny)")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the random inputs (default: new)")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for each part")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="path without suffix")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    read_pair(args.pair)  # before hours of checks
    settings = Settings(quick=args.quick, seed=args.seed, pair=args.pair)
    if args.child:
        run_child(args.child, settings, args.output)
        return 0
    print(f"seed {args.seed}", flush=True)
    outcomes = []
    for part in args.only:
        outcomes += run_part(part, settings, args.timeout)
    run = describe(argv, args.seed)
    write_record(args.output, {"run": run, "outcomes": [o._asdict() for o in outcomes]}, to_markdown(run, outcomes))
    if all(o.status == NOT_RUN for o in outcomes):
        print("error: nothing of this can run here.", file=sys.stderr)
        return 1
    return int(any(o.status == FAILED for o in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
