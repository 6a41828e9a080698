"""Every kernel against its reference: latency, bytes, and its share of what the memory can do.

    python benchmarks/kernel_time.py                  # on a GPU the Triton kernels
    python benchmarks/kernel_time.py --quick          # one small shape

On a CPU the functions that serve there (torch, numpy, numba) are timed instead, at small shapes. Those that are not
references themselves are compared with `drafter/oracle.py`. The program needs torch, triton, tqdm and, on a CPU, numba,
with this repository installed by `pip install --no-deps -e .`; vLLM is not needed. Writes OUTPUT.json and OUTPUT.md.

Not called kernels.py: programs of this folder, and the tests, would then have a module `kernels` on their path, and
transformers imports one if it finds it.
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from kernel_cases import SERVED, SMALL, Case, Shape, cases
from record import processor, write_record
from torch.utils.benchmark import Timer
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"
# One of the four changes at a time.
BASE = Shape(vocabulary=151_936, frames=12, batch=16, nodes=16)
SWEEP = {
    "vocabulary": (32_000, 151_936),
    "frames": (8, 12, 24),
    "batch": (1, 4, 16, 64, 256),
    "nodes": (8, 16, 32, 64),
}
CPU_BASE = Shape(vocabulary=4096, frames=12, batch=1, nodes=16)
CPU_SWEEP = {"vocabulary": (2048, 4096), "frames": (8, 12, 24), "batch": (1, 4), "nodes": (8, 16, 64)}
QUICK = Shape(vocabulary=512, frames=8, batch=2, nodes=8)
# Bytes a second by the data sheet, for the first name that the device's name contains.
NOMINAL = {
    "B200": 8e12,
    "H200": 4.8e12,
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100-SXM4-40GB": 1.555e12,
}
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes of the copy that measures the limit, more than caches hold
CPU_SECONDS = {True: 0.02, False: 0.3}  # how long one function is repeated, --quick or not


@dataclass
class Row:
    kernel: str
    shape: dict[str, int]
    least_bytes: int
    microseconds: float
    reference_microseconds: float | None  # None: it is the same function, or too large
    reference_on_host: bool
    bytes_per_second: float
    share_of_copy: float  # of the bandwidth that a plain copy reaches
    share_of_nominal: float | None


def shapes(base: Shape, sweep: dict[str, tuple[int, ...]]) -> list[Shape]:
    return list(dict.fromkeys([base, *(base._replace(**{name: x}) for name, values in sweep.items() for x in values)]))


def stopwatch(device: torch.device, quick: bool) -> Callable[[Callable[[], object]], float]:
    """Median seconds of a function; on a GPU with its cache flushed before every run."""
    if device.type == "cuda":
        return lambda function: triton.testing.do_bench(function, return_mode="median") / 1e3
    return lambda function: Timer("function()", globals={"function": function}).blocked_autorange(
        min_run_time=CPU_SECONDS[quick]
    ).median  # fmt: skip


def copy_bandwidth(device: torch.device, seconds: Callable) -> float:
    """Bytes a second, read and written, of a plain copy."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source))


def nominal_bandwidth(name: str) -> float | None:
    return next((limit for part, limit in NOMINAL.items() if part in name), None)


def measure(case: Case, shape: Shape, seconds: Callable, copied: float, nominal: float | None) -> Row:
    time = seconds(case.run)
    reference = None
    if case.reference is not None:
        try:
            reference = seconds(case.reference) * 1e6
        except torch.cuda.OutOfMemoryError:  # the reference materialises more than the kernel
            torch.cuda.empty_cache()
    speed = case.least_bytes / time
    return Row(
        kernel=case.name,
        shape=shape._asdict(),
        least_bytes=case.least_bytes,
        microseconds=time * 1e6,
        reference_microseconds=reference,
        reference_on_host=case.on_host and reference is not None,
        bytes_per_second=speed,
        share_of_copy=speed / copied,
        share_of_nominal=nominal and speed / nominal,
    )


def to_markdown(run: dict, rows: list[Row]) -> str:
    nominal = f", {run['nominal'] / 1e9:.0f} GB/s by its data sheet" if run["nominal"] else ""
    lines = [
        "Medians. Bytes are the least that must be read and written (formulas: `kernel_cases.py`); their share is of "
        "the bandwidth that a plain copy reaches on the same device. Shares above 1 come from caches; a small share on "
        "few bytes is the latency of a launch. V tokens, T frames, B requests, N nodes or labels.",
        f"{run['device']}, a copy reaches {run['copy'] / 1e9:.0f} GB/s{nominal}; torch {run['torch']}, Triton "
        f"{run['triton']}, Python {run['python']}; {run['date'][:10]}; `{run['command']}`.",
        "",
        "| kernel | shape | microseconds | reference | x | kB | GB/s | share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reference = ratio = "-"
        if row.reference_microseconds is not None:
            reference = f"{row.reference_microseconds:.1f}" + (" (host)" if row.reference_on_host else "")
            ratio = f"{row.reference_microseconds / row.microseconds:.1f}"
        lines.append(
            f"| {row.kernel} | {Shape(**row.shape)} | {row.microseconds:.1f} | {reference} | {ratio} | "
            f"{row.least_bytes / 1e3:.1f} | {row.bytes_per_second / 1e9:.1f} | {row.share_of_copy:.3f} |"
        )
    return "\n".join(lines) + "\n"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"one shape: {QUICK}")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_time", help="path without suffix")
    return parser.parse_args(argv)


@torch.inference_mode()
def main(argv: list[str]) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    model = SERVED if on_gpu and not args.quick else SMALL
    wanted = [QUICK] if args.quick else shapes(BASE, SWEEP) if on_gpu else shapes(CPU_BASE, CPU_SWEEP)
    seconds = stopwatch(device, args.quick)
    copied, nominal = copy_bandwidth(device, seconds), nominal_bandwidth(device_name(device))
    rows = []
    for shape in tqdm(wanted, desc="shapes"):
        for case in tqdm(cases(shape, model, device), desc=str(shape), leave=False):
            rows.append(measure(case, shape, seconds, copied, nominal))
    rows.sort(key=lambda row: row.kernel)
    run = {
        "command": shlex.join(["python", "benchmarks/kernel_time.py", *(Path(word).name for word in argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "copy": copied,
        "nominal": nominal,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    write_record(args.output, {"run": run, "rows": [asdict(row) for row in rows]}, to_markdown(run, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
