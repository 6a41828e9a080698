"""From measurements to OUTPUT.json (everything), OUTPUT.md (a table) and OUTPUT.png (a plot)."""

import argparse
import json
import platform
import re
import shlex
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from rich.console import Console
from server import on_cpu


@dataclass
class Measurement:
    """One method, one concurrency, one repeat."""

    method: str
    concurrency: int
    repeat: int
    seconds: float
    tokens: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    same_output: int  # answers that equal the reference, token for token

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def one_line(self) -> str:
        where = f"repeat {self.repeat + 1}, {self.method}, {self.concurrency} at a time"
        return f"{where}: {self.tokens_per_second:.1f} tokens/s"


@dataclass
class Row:
    """One method at one concurrency, over the repeats."""

    method: str
    concurrency: int
    tokens_per_second: float  # the median
    lowest: float
    highest: float
    acceptance_length: float | None  # over all repeats; the anchor's successor included
    ratio: float | None  # to the fastest row without speculation
    same_output: int  # the worst repeat


def summarize(measurements: list[Measurement]) -> list[Row]:
    rows = []
    for method, concurrency in dict.fromkeys((m.method, m.concurrency) for m in measurements):
        group = [m for m in measurements if (m.method, m.concurrency) == (method, concurrency)]
        speeds = [m.tokens_per_second for m in group]
        drafts, accepted = sum(m.drafts for m in group), sum(m.accepted_tokens for m in group)
        length = 1 + accepted / drafts if drafts else None
        same = min(m.same_output for m in group)
        rows.append(Row(method, concurrency, median(speeds), min(speeds), max(speeds), length, None, same))
    for row in rows:
        plain = [r.tokens_per_second for r in rows if r.concurrency == row.concurrency and r.method.startswith("none")]
        row.ratio = row.tokens_per_second / max(plain) if plain else None
    return sorted(rows, key=lambda row: row.concurrency)


def processor() -> str:
    match = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else platform.processor()


def gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def describe_run(program: str, args: argparse.Namespace, argv: list[str], num_prompts: int, busy: float) -> dict:
    """All that is needed to repeat the run of benchmarks/`program`; no path of this machine."""
    shown = [Path(word).name if "/" in word else word for word in argv]
    return {
        "command": shlex.join(["python", f"benchmarks/{program}", *shown]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompts": args.prompts.name,
        "num_prompts": num_prompts,
        "max_tokens": args.max_tokens,
        "repeats": getattr(args, "repeats", 1),
        "vllm": version("vllm"),
        "torch": version("torch"),
        "vllm_ctc_spec": version("vllm-ctc-spec"),
        "python": platform.python_version(),
        "cpu": processor(),
        "gpu": None if on_cpu() else gpu(),
        "machine_busy_percent_before": busy,
    }


def to_markdown(run: dict, rows: list[Row]) -> str:
    machine = run["gpu"] or run["cpu"]
    lines = [
        f"{run['num_prompts']} prompts of {run['prompts']}, greedy, at most {run['max_tokens']} tokens; "
        f"median (lowest to highest) of {run['repeats']} interleaved repeats.",
        f"vLLM {run['vllm']}, torch {run['torch']}, Python {run['python']}, {machine}; {run['date'][:10]}; "
        f"other programs used {run['machine_busy_percent_before']:.0f} % of the machine. `{run['command']}`",
        "Acceptance length is 1 + accepted / drafts as vLLM counts them: a step for which n-gram finds no draft is not "
        "counted, so its tokens per target forward are fewer.",
        "",
        "| at a time | method | tokens/s | x fastest none | acceptance length | same output |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        length = f"{row.acceptance_length:.2f}" if row.acceptance_length else "-"
        ratio = f"{row.ratio:.2f}" if row.ratio else "-"
        speed = f"{row.tokens_per_second:.1f} ({row.lowest:.1f} to {row.highest:.1f})"
        same = f"{row.same_output} of {run['num_prompts']}"
        lines.append(f"| {row.concurrency} | {row.method} | {speed} | {ratio} | {length} | {same} |")
    return "\n".join(lines) + "\n"


def plot(path: Path, run: dict, rows: list[Row]) -> None:
    """One panel per concurrency: median tokens/s, with the range over the repeats, and the acceptance length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    concurrencies = list(dict.fromkeys(row.concurrency for row in rows))
    rows_each = len(rows) // len(concurrencies)
    size = (5 * len(concurrencies), 1 + 0.45 * rows_each)
    figure, panels = pyplot.subplots(1, len(concurrencies), figsize=size, squeeze=False)
    for panel, concurrency in zip(panels[0], concurrencies, strict=True):
        group = [row for row in rows if row.concurrency == concurrency]
        speeds = [row.tokens_per_second for row in group]
        errors = [
            [row.tokens_per_second - row.lowest for row in group],
            [row.highest - row.tokens_per_second for row in group],
        ]
        colors = ["tab:orange" if row.method.startswith("ctc") else "tab:gray" for row in group]
        panel.barh([row.method for row in group], speeds, xerr=errors, color=colors, capsize=3)
        for y, row in enumerate(group):
            if row.acceptance_length:
                panel.text(0, y - 0.2, f"  acceptance length {row.acceptance_length:.2f}", color="white", fontsize=8)
        panel.invert_yaxis()
        panel.set_xlabel("tokens/s (median; bars: lowest to highest)")
        panel.set_title(f"{concurrency} at a time", fontsize=10)
    figure.suptitle(f"{run['num_prompts']} prompts, greedy, {run['gpu'] or run['cpu']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write_report(output: Path, run: dict, measurements: list[Measurement], console: Console) -> None:
    rows = summarize(measurements)
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"run": run, "rows": [asdict(row) for row in rows], "measurements": [asdict(m) for m in measurements]}
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = to_markdown(run, rows)
    output.with_suffix(".md").write_text(table, encoding="utf-8")
    plot(output.with_suffix(".png"), run, rows)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {output}.json, .md and .png", highlight=False)
