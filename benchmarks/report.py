"""From measurements to a Markdown table and plots. `serve.py` calls it; it also runs on saved results of `serve.py`.

    python benchmarks/report.py RESULT.json [MORE.json ...] [--step-time STEP.json] [--output PATH]

Several results of the same machine and versions are pooled: more rows, or more repeats of the same rows. Writes
OUTPUT.md, OUTPUT-speed.png, OUTPUT-acceptance.png and, with the times of `step_time.py`, OUTPUT-step.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from record import machine_line

MACHINE = ("vllm", "torch", "vllm_ctc_spec", "python", "cpu", "cores", "gpu")
ACCEPTANCE_LENGTH = (
    "Acceptance length is tokens per target forward, the one that the target adds itself included: 1 + accepted / "
    "drafts by the server's counters. There is no acceptance rate, because vLLM counts padding and every node of a "
    "tree as draft tokens. Steps for which a method finds no draft are not counted; accepted tokens past the end of a "
    "response are, which reads about 1 % high."
)


@dataclass
class Measurement:
    """One run of `vllm bench serve`."""

    method: str
    data: str  # dataset, or category of Spec-Bench
    temperature: float
    concurrency: int
    repeat: int
    speculative: bool  # whether the server speculates at all
    requests: int
    seconds: float
    tokens: int
    ttft_ms: float  # medians over the requests
    tpot_ms: float
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: list[int]
    same_output: int | None  # greedy answers that equal those of the first method
    raw: str  # the file with all that vLLM measured

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def acceptance_length(self) -> float | None:
        return 1 + self.accepted_tokens / self.drafts if self.drafts else None

    def one_line(self) -> str:
        where = f"repeat {self.repeat + 1}, {self.data}, temperature {self.temperature:g}, {self.concurrency} at a time"
        return f"{where}, {self.method}: {self.tokens_per_second:.1f} tokens/s"


@dataclass
class Spread:
    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        middle, lowest, highest = (f"{value:.{digits}f}" for value in (self.median, self.lowest, self.highest))
        return middle if lowest == highest else f"{middle} ({lowest} to {highest})"


@dataclass
class Row:
    """One method on one dataset at one temperature and concurrency, over the repeats."""

    method: str
    data: str
    temperature: float
    concurrency: int
    speculative: bool
    repeats: int
    tokens_per_second: Spread
    ratio: float | None  # of the medians, to the fastest row without speculation
    acceptance_length: Spread | None
    accepted_by_depth: list[float]  # share of the drafts whose first 1, 2, ... tokens were accepted
    ttft_ms: Spread
    tpot_ms: Spread
    same_output: int | None  # the worst repeat
    requests: int

    @property
    def cell(self) -> tuple:
        return self.data, self.temperature, self.concurrency


def summarize(measurements: list[Measurement]) -> list[Row]:
    """Rows by temperature and concurrency; datasets and methods keep the order of the measurements."""
    groups: dict[tuple, list[Measurement]] = {}
    for m in measurements:
        groups.setdefault((m.method, m.data, m.temperature, m.concurrency), []).append(m)
    rows = [summarize_group(group) for group in groups.values()]
    for row in rows:
        plain = [r.tokens_per_second.median for r in rows if r.cell == row.cell and not r.speculative]
        row.ratio = row.tokens_per_second.median / max(plain) if plain else None
    data, methods = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("data", "method"))
    return sorted(rows, key=lambda r: (data.index(r.data), r.temperature, r.concurrency, methods.index(r.method)))


def summarize_group(group: list[Measurement]) -> Row:
    first = group[0]
    lengths = [m.acceptance_length for m in group if m.acceptance_length]
    drafts = sum(m.drafts for m in group)
    depths = [sum(counts) for counts in zip(*(m.accepted_per_position for m in group))]
    same = [m.same_output for m in group if m.same_output is not None]
    return Row(
        first.method, first.data, first.temperature, first.concurrency, first.speculative, len(group),
        tokens_per_second=Spread.of([m.tokens_per_second for m in group]),
        ratio=None,
        acceptance_length=Spread.of(lengths) if lengths else None,
        accepted_by_depth=[count / drafts for count in depths] if drafts else [],
        ttft_ms=Spread.of([m.ttft_ms for m in group]),
        tpot_ms=Spread.of([m.tpot_ms for m in group]),
        same_output=min(same) if same else None,
        requests=first.requests,
    )  # fmt: skip


def header(run: dict) -> list[str]:
    return [
        f"{', '.join(f'{count} prompts of {name}' for name, count in run['prompts'].items())}; at most "
        f"{run['max_tokens']} tokens; median (lowest to highest) of {run['repeats']} interleaved repeats; "
        "`vllm bench serve` against running servers. Ratio: to the fastest row without speculation.",
        "",
        f"{machine_line(run)}; other programs used {run['machine_busy_percent_before']:.0f} % of the "
        f"machine. `{run['command']}`",
    ]


def to_markdown(runs: list[dict], rows: list[Row]) -> str:
    lines = [line for run in runs for line in (*header(run), "")]
    lines += [ACCEPTANCE_LENGTH, ""]
    lines += [
        "| data | temperature | at a time | method | tokens/s | ratio | acceptance length | TTFT, ms | TPOT, ms | "
        "same output |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        length = row.acceptance_length.text(2) if row.acceptance_length else "-"
        ratio = f"{row.ratio:.2f}" if row.ratio else "-"
        same = "-" if row.same_output is None else f"{row.same_output} of {row.requests}"
        cells = (
            row.data, f"{row.temperature:g}", row.concurrency, row.method, row.tokens_per_second.text(1), ratio, length,
            row.ttft_ms.text(1), row.tpot_ms.text(2), same,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += depth_table(rows)
    methods = {name: options for run in runs for name, options in run["methods"].items()}
    lines += ["", "Methods:", "", *(f"- {name}: `{json.dumps(options)}`" for name, options in methods.items())]
    return "\n".join(lines) + "\n"


def depth_table(rows: list[Row], depths: int = 8) -> list[str]:
    """How often a draft is right down to each depth, with the smallest number of requests at a time."""
    least = min(row.concurrency for row in rows)
    drafted = [row for row in rows if row.accepted_by_depth and row.concurrency == least]
    if not drafted:
        return []
    lines = ["", f"Drafts whose first k tokens were accepted, in percent, {least} at a time:", ""]
    lines += ["| data | temperature | method | " + " | ".join(f"k = {k + 1}" for k in range(depths)) + " |"]
    lines += ["|---" * (3 + depths) + "|"]
    for row in drafted:
        shares = [f"{100 * share:.0f}" for share in row.accepted_by_depth[:depths]]
        shares += ["-"] * (depths - len(shares))
        lines.append(f"| {row.data} | {row.temperature:g} | {row.method} | " + " | ".join(shares) + " |")
    return lines


def save(output: Path, run: dict, measurements: list[Measurement]) -> None:
    """Write OUTPUT.json: everything that a report is made from."""
    record = {"run": run, "measurements": [asdict(m) for m in measurements]}
    with_ending(output, ".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def with_ending(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


def write_report(output: Path, runs: list[dict], measurements: list[Measurement], steps: dict | None = None) -> str:
    """OUTPUT.md and the plots; returns the table."""
    import plots

    rows = summarize(measurements)
    title = runs[0]["gpu"] or runs[0]["cpu"]
    table = to_markdown(runs, rows)
    with_ending(output, ".md").write_text(table, encoding="utf-8")
    plots.speed(with_ending(output, "-speed.png"), rows, title)
    plots.acceptance(with_ending(output, "-acceptance.png"), rows, title)
    if steps is not None:
        plots.step_time(with_ending(output, "-step.png"), steps, title)
    return table


def load(path: Path) -> dict:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {path} cannot be read ({error}).") from error
    return record


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--step-time", type=Path, metavar="STEP.json", help="what step_time.py wrote")
    parser.add_argument("--output", type=Path, help="path without suffix (default: the first result's)")
    args = parser.parse_args(argv)
    records = [load(path) for path in args.results]
    for path, record in zip(args.results, records):
        if not isinstance(record, dict) or not record.get("measurements") or "methods" not in record.get("run", {}):
            raise SystemExit(f"error: {path} is no result of benchmarks/serve.py.")
        if different := [name for name in MACHINE if record["run"][name] != records[0]["run"][name]]:
            raise SystemExit(f"error: {path} was not measured as {args.results[0]}: another {different[0]}.")
    steps = load(args.step_time) if args.step_time else None
    if steps is not None and "steps_ms" not in steps:
        raise SystemExit(f"error: {args.step_time} is no result of benchmarks/step_time.py.")
    measurements = [Measurement(**m) for record in records for m in record["measurements"]]
    output = args.output or args.results[0].with_suffix("")
    output.parent.mkdir(parents=True, exist_ok=True)
    print(write_report(output, [record["run"] for record in records], measurements, steps))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
