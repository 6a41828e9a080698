"""One table of methods x datasets x concurrency x temperature: `vllm bench serve` against running servers.

    python benchmarks/serve.py                                             # `make bench`: the tiny embedded pair
    python benchmarks/serve.py --target T --drafter D --methods all --concurrency 1 4 16 64 \\
        --data gsm8k=gsm8k_test.jsonl --spec-bench question.jsonl --categories qa summarization
    python benchmarks/serve.py --target T --base-url http://127.0.0.1:8000 --label "mine"

All servers run at once and load goes to one of them at a time (an idle server costs next to no CPU time; the program
measures and records it). The methods take turns within every repeat, and every repeat starts with another one: a
machine that gets slower or faster in between favours none. If memory does not hold all servers, `--one-at-a-time`
starts each anew in every repeat. Writes OUTPUT.json (after every run; `report.py` makes the rest from it), OUTPUT.md,
OUTPUT-*.png, and vLLM's own measurements in OUTPUT-raw/.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import methods
import prompts
import psutil
from client import SETTLE_SECONDS, drafting_since
from methods import Method
from pair import RESULTS, V2_RUNNER, add_pair_arguments, choose_pair, ready
from prompts import PromptSet
from record import describe_run
from report import Measurement, save, with_ending, write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from server import Endpoint, RunningServer, Server, StartupError, on_cpu, stop_on_sigterm, threads_record
from vllm_bench import BenchError, Load, VllmBench

IDLE_SECONDS = 5.0
BUSY_PERCENT = 20.0
# Repeats ask the same prompts: cached, their prefill would cost nothing from the second repeat on.
SERVE_ARGS = ("--no-enable-prefix-caching",)


@dataclass(frozen=True)
class Cell:
    """One run for each method and repeat."""

    data: str
    temperature: float
    concurrency: int


class Comparison:
    """Shared by all runs: settings, prompts, the first method's answers, and the measurements so far."""

    def __init__(
        self, args: argparse.Namespace, rows: list[Method], sets: list[PromptSet], folder: Path, console: Console
    ):
        self.args = args
        self.methods = rows
        self.sets = sets
        self.console = console
        self.folder = folder  # for the time of the comparison
        self.raw = with_ending(args.output, "-raw")
        self.raw.mkdir(parents=True, exist_ok=True)
        self.bench = VllmBench(args.target, self.raw / "vllm-bench.log")
        self.files: dict[str, tuple[Path, int]] = {}  # of each dataset: the file for vLLM, and its number of prompts
        self.reference: dict[str, list[str]] = {}  # of each dataset: greedy answers of the first method
        self.measurements: list[Measurement] = []
        self.run: dict = {}

    def cells(self) -> list[Cell]:
        """Temperature 0 first: without a reference there is nothing to compare with."""
        return [
            Cell(data.name, temperature, concurrency)
            for data in self.sets
            for temperature in sorted(self.args.temperature)
            for concurrency in self.args.concurrency
        ]

    def open(self, method: Method) -> AbstractContextManager[Endpoint]:
        if method.base_url:
            return nullcontext(RunningServer(method.base_url))
        # A GPU's memory is shared by all servers; vLLM would take 90 % of it for each.
        own = 1 if self.args.one_at_a_time else sum(not m.base_url for m in self.methods)
        most = max(self.args.concurrency)
        extra = ("--max-num-seqs", str(max(most, 4))) if on_cpu() else ("--gpu-memory-utilization", f"{0.9 / own:.3f}")
        return Server(
            self.args.target, method.speculative_config, method.env, (*SERVE_ARGS, *extra),
            log_path=self.raw / f"{slug(method.name)}.log", label=method.name, console=self.console,
        )  # fmt: skip

    def prepare(self, server: Endpoint) -> None:
        """Write the prompts that leave room for a response, for vLLM to read."""
        room = server.max_model_len() - self.args.max_tokens
        for data in self.sets:
            kept = prompts.fitting(data, self.bench.tokenizer, room, self.args.num_prompts)
            self.files[data.name] = kept.write(self.folder), len(kept.prompts)
        self.run["prompts"] = {name: count for name, (_, count) in self.files.items()}

    def load(self, cell: Cell) -> Load:
        path, count = self.files[cell.data]
        return Load(path, count, self.args.max_tokens, cell.concurrency, cell.temperature)

    def warm_up(self, server: Endpoint) -> None:
        """The first requests pay for lazy initialisation, of greedy and of sampled decoding."""
        if not self.files:
            self.prepare(server)
        most = max(self.args.concurrency)
        for temperature in self.args.temperature:
            load = self.load(Cell(self.sets[0].name, temperature, most))
            few = replace(load, num_prompts=min(load.num_prompts, most))
            self.bench.run(server, few, self.raw / "warm-up.json")
        time.sleep(SETTLE_SECONDS)

    def measure(self, method: Method, server: Endpoint, cell: Cell, repeat: int) -> None:
        where = f"{cell.data}-t{cell.temperature:g}-c{cell.concurrency}-r{repeat + 1}"
        raw = self.raw / f"{slug(f'{where}-{method.name}')}.json"
        before = server.metrics()
        load = self.load(cell)
        result = self.bench.run(server, load, raw)
        time.sleep(SETTLE_SECONDS)
        drafting = drafting_since(server, before)
        same = None
        if cell.temperature == 0:
            reference = self.reference.setdefault(cell.data, result["generated_texts"])
            same = sum(a == b for a, b in zip(reference, result["generated_texts"], strict=True))
        self.measurements.append(
            Measurement(
                method.name, **asdict(cell), repeat=repeat,
                speculative="vllm:spec_decode_num_drafts_total" in before,
                requests=load.num_prompts, seconds=result["duration"], tokens=result["total_output_tokens"],
                ttft_ms=result["median_ttft_ms"], tpot_ms=result["median_tpot_ms"],
                **asdict(drafting), same_output=same, raw=raw.name,
            )
        )  # fmt: skip
        save(self.args.output, self.run, self.measurements)

    def runs(self, servers: dict[str, Endpoint]) -> Iterator[tuple[Method, Endpoint, Cell, int]]:
        """Every method in every cell and repeat, in turns. A server that is not there is started for its turn."""
        for repeat in range(self.args.repeats):
            order = rotated(self.methods, repeat)
            if servers:
                yield from ((m, servers[m.name], cell, repeat) for cell in self.cells() for m in order)
                continue
            for method in order:
                with self.open(method) as server:
                    self.warm_up(server)
                    yield from ((method, server, cell, repeat) for cell in self.cells())

    def measure_all(self, servers: dict[str, Endpoint]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), TimeElapsedColumn())
        # Once a second: this process is the client as well.
        with Progress(
            *columns, TimeRemainingColumn(elapsed_when_finished=True), console=self.console, refresh_per_second=1
        ) as progress:
            total = len(self.methods) * len(self.cells()) * self.args.repeats
            task = progress.add_task("warm-up", total=total)
            for server in servers.values():
                self.warm_up(server)
            for method, server, cell, repeat in self.runs(servers):
                where = f"{cell.data}, T {cell.temperature:g}, {cell.concurrency} at a time"
                progress.update(task, description=f"{where}, {method.name}")
                self.measure(method, server, cell, repeat)
                progress.advance(task)
                if not self.console.is_terminal:
                    progress.console.print(self.measurements[-1].one_line(), highlight=False, soft_wrap=True)


def slug(text: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", text.lower()).strip("-")


def rotated(rows: list[Method], by: int) -> list[Method]:
    by %= len(rows)
    return rows[by:] + rows[:by]


def idle_load(servers: dict[str, Endpoint]) -> tuple[dict[str, float], float]:
    """Without requests: CPU seconds per second of each server, and how busy the whole machine is, in percent."""

    def used(server: Endpoint) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in server.processes())

    before = {name: used(server) for name, server in servers.items()}
    busy = psutil.cpu_percent(IDLE_SECONDS)
    return {name: round((used(server) - before[name]) / IDLE_SECONDS, 4) for name, server in servers.items()}, busy


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    methods.add_arguments(parser)
    prompts.add_arguments(parser)
    parser.add_argument("--num-prompts", type=positive, default=20, help="of each dataset (default: 20)")
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[1, 4], help="default: 1 4")
    parser.add_argument("--temperature", type=temperature, nargs="+", default=[0.0, 1.0], help="default: 0 1")
    parser.add_argument("--max-tokens", type=positive, default=128, help="of a response (default: 128)")
    parser.add_argument("--repeats", type=positive, default=3, help="default: 3")
    parser.add_argument("--one-at-a-time", action="store_true", help="one server at a time, started in every repeat")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve", help="path without suffix")
    return choose_pair(parser.parse_args(argv))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def compare(comparison: Comparison, argv: Sequence[str]) -> None:
    args = comparison.args
    with ExitStack() as stack:
        servers = {}
        if not args.one_at_a_time:
            servers = {m.name: stack.enter_context(comparison.open(m)) for m in comparison.methods}
            time.sleep(SETTLE_SECONDS)
        idle, busy = idle_load(servers)
        if busy > BUSY_PERCENT:
            warning = f"warning: other programs use {busy:.0f} % of this machine; do not trust the speeds"
            comparison.console.print(warning, highlight=False)
        comparison.run = describe_run(
            "benchmarks/serve.py", argv, machine_busy_percent_before=busy,
            prompts={}, max_tokens=args.max_tokens, repeats=args.repeats,
            methods={m.name: m.options() for m in comparison.methods},
            idle_cpu_seconds_per_second=idle, threads=threads_record(args.target),
        )  # fmt: skip
        comparison.measure_all(servers)


def main(argv: list[str]) -> int:
    args = parse(argv)
    stop_on_sigterm()
    for name in V2_RUNNER:  # each row chooses its runner; the shell's choice does not count
        os.environ.pop(name, None)
    ready(args.pair, drafter=False)  # a drafter is needed by some of the methods only
    rows, skipped = methods.chosen(args)
    sets = prompts.read(args)
    console = Console(file=sys.stdout)  # bound to the terminal, also while vLLM's client prints into a log
    for sentence in skipped:
        console.print(sentence, highlight=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(args, rows, sets, Path(folder), console)
            compare(comparison, argv)
    except (StartupError, BenchError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    table = write_report(args.output, [comparison.run], comparison.measurements)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {args.output}.json, .md, -speed.png and -acceptance.png", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
