"""Side by side: the target without speculation, with vLLM's n-gram drafts, and with its CTC drafter's chains and trees.

    python benchmarks/compare.py                               # what `make bench` runs: the embedded pair and prompts
    python benchmarks/compare.py --methods all                 # trees of every size too
    python benchmarks/compare.py --prompts gsm8k_test.jsonl    # a jsonl file with the key `question`

All servers run at once and load goes to one of them at a time (an idle server costs next to no CPU time; it is measured
and written down). The methods take turns within every repeat, and every repeat starts with another one, so that a
machine that gets slower or faster in between favours none. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
from client import SETTLE_SECONDS, ask, drafting_since, read_questions
from pair import DRAFTER, PROMPTS, RESULTS, TARGET, V2_RUNNER, ctc_config, existing
from report import Measurement, describe_run, write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from server import Server, StartupError, on_cpu, stop_on_sigterm

IDLE_SECONDS = 5.0
BUSY_PERCENT = 20.0
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}

console = Console()


@dataclass
class Method:
    name: str
    speculative_config: Mapping | None = None
    env: Mapping[str, str] = field(default_factory=dict)


def methods(drafter: Path) -> list[Method]:
    """The rows; the first is what the outputs of the others are compared with. Trees get smaller in larger batches, as
    users get them; `transform` is the paper's way to a tree, with as many nodes, for drafters with a blank."""

    def tree(nodes: int, **options: str) -> dict:
        return {**ctc_config(drafter), "ctc_draft": "tree", "num_speculative_tokens": nodes, **options}

    rows = [
        Method("none (default runner)"),
        Method("none (V2 runner)", env=V2_RUNNER),
        Method("ngram", NGRAM),
        Method("ctc chain", {**ctc_config(drafter), "ctc_draft": "chain"}),
        *(Method(f"ctc tree {nodes}", tree(nodes)) for nodes in (8, 16, 32, 64)),
    ]
    if has_blank(drafter):
        rows.append(Method(TRANSFORM, tree(16, ctc_search="transform")))
    return rows


def has_blank(drafter: Path) -> bool:
    """False where there is no drafter either: whoever needs one says so."""
    config = drafter / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("lattice", "ctc") == "ctc"


TRANSFORM = "ctc transform 16"
DEFAULT_METHODS = ("none (default runner)", "none (V2 runner)", "ngram", "ctc chain", "ctc tree 16")


def start(method: Method, target: Path, log_folder: Path, servers_at_once: int) -> Server:
    # A GPU's memory is shared by all of them; vLLM would take 90 % of it for each.
    extra_args = () if on_cpu() else ("--gpu-memory-utilization", f"{0.9 / servers_at_once:.3f}")
    log_path = log_folder / f"compare-{re.sub('[^a-z0-9]+', '-', method.name.lower()).strip('-')}.log"
    return Server(
        target, method.speculative_config, method.env, extra_args, log_path=log_path, label=method.name, console=console
    )


def idle_load(servers: dict[str, Server]) -> tuple[dict[str, float], float]:
    """With nobody asking: CPU seconds per second of each server, and how busy the whole machine is, in percent."""

    def used(server: Server) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in server.processes())

    before = {name: used(server) for name, server in servers.items()}
    busy = psutil.cpu_percent(IDLE_SECONDS)
    return {name: (used(server) - before[name]) / IDLE_SECONDS for name, server in servers.items()}, busy


def measure(server: Server, questions: list[str], concurrency: int, max_tokens: int) -> tuple[dict, list[list[int]]]:
    """All questions with `concurrency` of them in flight: the figures, and the tokens of every answer."""
    time.sleep(SETTLE_SECONDS)
    before = server.metrics()
    with server.client() as client, ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda question: ask(client, server.model, question, max_tokens), questions))
        seconds = time.perf_counter() - started
    time.sleep(SETTLE_SECONDS)
    outputs = [answer.token_ids for answer in answers]
    drafting = asdict(drafting_since(server, before))
    return {"seconds": seconds, "tokens": sum(map(len, outputs)), **drafting}, outputs


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def run_all(servers: dict[str, Server], questions: list[str], args: argparse.Namespace) -> list[Measurement]:
    """Every method at every concurrency in every repeat, interleaved."""
    rows: list[Measurement] = []
    reference: list[list[int]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("warm-up", total=len(servers) * len(args.concurrency) * args.repeats)
        for server in servers.values():
            measure(server, questions[: max(args.concurrency)], max(args.concurrency), args.max_tokens)
        for repeat in range(args.repeats):
            for concurrency in args.concurrency:
                for name in rotated(list(servers), repeat):
                    progress.update(task, description=f"repeat {repeat + 1}, {name}, {concurrency} at a time")
                    figures, outputs = measure(servers[name], questions, concurrency, args.max_tokens)
                    reference = reference or outputs  # the first answers of the first method
                    same = sum(a == b for a, b in zip(reference, outputs, strict=True))
                    rows.append(Measurement(name, concurrency, repeat, same_output=same, **figures))
                    progress.advance(task)
                    if not console.is_terminal:
                        progress.console.print(rows[-1].one_line(), highlight=False)
    return rows


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--drafter", type=Path, default=DRAFTER)
    names = list(dict.fromkeys([*(method.name for method in methods(DRAFTER)), TRANSFORM]))
    parser.add_argument(
        "--methods", nargs="+", choices=["all", *names], default=DEFAULT_METHODS, metavar="NAME",
        help="all, or of: " + ", ".join(names),
    )  # fmt: skip
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="jsonl with the key `question`")
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "compare", help="path without suffix")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    stop_on_sigterm()
    for name in V2_RUNNER:  # each row says which runner it wants; the shell has no say
        os.environ.pop(name, None)
    existing(args.target)
    chosen = [method for method in methods(args.drafter) if {method.name, "all"} & set(args.methods)]
    if TRANSFORM in args.methods and not has_blank(args.drafter):
        raise SystemExit(f"error: {TRANSFORM} needs a drafter with a blank, and {args.drafter} has none.")
    if any(method.name.startswith("ctc") for method in chosen):
        existing(args.drafter)
    questions = read_questions(args.prompts, args.num_prompts)
    try:
        with ExitStack() as stack:
            servers = {
                method.name: stack.enter_context(start(method, args.target, args.output.parent, len(chosen)))
                for method in chosen
            }
            time.sleep(SETTLE_SECONDS)
            idle, busy = idle_load(servers)
            if busy > BUSY_PERCENT:
                console.print(f"warning: other programs use {busy:.0f} % of this machine; do not trust the speeds")
            rows = run_all(servers, questions, args)
    except StartupError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    run = describe_run("compare.py", args, argv, len(questions), busy)
    run["idle_cpu_seconds_per_second"] = {name: round(load, 4) for name, load in idle.items()}
    write_report(args.output, run, rows, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
