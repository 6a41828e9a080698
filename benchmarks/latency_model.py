"""The time of a decoding step by batch size and verified nodes, and from it the acceptance length at which drafts pay.

    python benchmarks/latency_model.py                              # the tiny embedded pair
    python benchmarks/latency_model.py --shape 8b                   # on a GPU: dummy weights, a random drafter
    python benchmarks/latency_model.py --steps RESULT.json --acceptance EVAL.json     # no measurement, other lengths

A step costs the same whatever is accepted of its drafts, so that times of random weights are as good as others; with an
acceptance length L (`vllm-ctc eval --nodes 7,15,31,63 --json EVAL.json`),

    speedup = (L / step_time_spec) / (1 / step_time_none),    break-even L = step_time_spec / step_time_none

Every kind of draft is measured beside no speculation, two engines in one process of their own that take turns, over the
steps in which all requests of the batch are decoding; medians. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean

# vLLM warms up its chat template and warns, with a traceback, that there is no tokenizer.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
from pair import RESULTS, add_pair_arguments, choose_pair, ready
from random_pair import LOAD_FORMAT, SHAPES, make_pair, register_load_format
from record import describe_run, machine_line, write_record
from server import on_cpu
from step_time import BUSY_SECONDS, speculative_config
from tqdm import tqdm

from vllm_ctc_spec.plan.process import in_own_process
from vllm_ctc_spec.plan.solve import NONE
from vllm_ctc_spec.plan.step_times import ROOM, Steps, StepSettings, combine, measure_pair
from vllm_ctc_spec.serving.options import SMALLEST_TREE, TREE_SIZES, smaller_trees, tree_schedule

DRAFTS = ("chain:8", *(f"tree:{nodes}" for nodes in sorted(TREE_SIZES) if nodes >= SMALLEST_TREE))
BATCH_SIZES = {True: (1, 2, 4, 8), False: (1, 2, 4, 8, 16, 32, 64, 128, 256)}  # on a CPU or not
EXAMPLES = (2.0, 3.0, 4.0)  # acceptance lengths to plot where none are given

Lengths = dict[str, float]  # acceptance length by draft


def speedup(steps: dict[str, float], draft: str, length: float) -> float:
    """Tokens a second against no speculation, both in the same batch."""
    return length * steps[NONE] / steps[draft]


def break_even(steps: dict[str, float], draft: str) -> float:
    return steps[draft] / steps[NONE]


def largest_paying_batch(steps: Steps, draft: str, length: float) -> int | None:
    """The last batch size, from 1 on, up to which this draft is faster than none."""
    last = None
    for batch in sorted(steps):
        if speedup(steps[batch], draft, length) <= 1:
            break
        last = batch
    return last


def scheduled_speedup(steps: Steps, lengths: Lengths, num_nodes: int, rows: int) -> float:
    """Geometric mean over the batch sizes, with the trees that `ctc_tree_rows` gives each of them."""
    schedule = tree_schedule(num_nodes, rows)
    speedups = []
    for batch, times in steps.items():
        nodes = next(nodes for first, last, nodes in schedule if first <= batch <= last)
        draft = f"tree:{nodes}"
        speedups.append(speedup(times, draft, lengths[draft]) if nodes else 1.0)
    return geometric_mean(speedups)


def suggest_tree_rows(steps: Steps, lengths: Lengths) -> dict[int, tuple[int, float]]:
    """By `num_speculative_tokens`: the `ctc_tree_rows` of the highest mean speedup over the measured batch sizes, the
    fewest rows among equals, and that speedup. Trees of which a smaller size was not measured are left out."""
    measured = {int(draft.removeprefix("tree:")) for draft in lengths if draft.startswith("tree:")}
    suggested = {}
    for num_nodes in sorted(measured):
        sizes = {num_nodes, *smaller_trees(num_nodes)}
        if not sizes <= measured:
            continue
        candidates = sorted({batch * (1 + nodes) for batch in steps for nodes in sizes} | {1})
        best = max(candidates, key=lambda rows: scheduled_speedup(steps, lengths, num_nodes, rows))
        suggested[num_nodes] = (best, scheduled_speedup(steps, lengths, num_nodes, best))
    return suggested


def read_acceptance(path: Path, temperature: float) -> Lengths:
    """From `vllm-ctc eval --json`: its `chain of 8` is `chain:8` here, its `tree of 16 nodes` is `tree:16`."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))["results"]
        rows = [(row["drafts"].split(), row["acceptance_length"], row["temperature"]) for row in results]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"error: {path} is no result of `vllm-ctc eval --json` ({error!r}).") from error
    lengths = {
        f"{words[0]}:{words[2]}": length
        for words, length, at in rows
        if words[0] in ("chain", "tree") and at == temperature
    }
    if not lengths:
        raise SystemExit(f"error: {path} has no acceptance length at temperature {temperature:g}.")
    return lengths


def measure_draft(settings: argparse.Namespace, draft: str) -> Steps:
    """In a process of its own."""
    engine = {"dtype": "float32"} if on_cpu() else {}
    if settings.shape:
        register_load_format()
        engine["load_format"] = LOAD_FORMAT
    steps = StepSettings(
        target=str(settings.target), batch_sizes=tuple(settings.batch_sizes), context=settings.context,
        max_tokens=settings.max_tokens, repeats=settings.repeats,
        max_model_len=settings.context + 2 * settings.max_tokens + ROOM, engine=engine,
    )  # fmt: skip
    return measure_pair(steps, draft, speculative_config(settings.drafter, draft))


def measure(settings: argparse.Namespace) -> tuple[Steps, dict[str, Steps]]:
    """The times of all drafts as if beside one engine without: no speculation is the median over the processes, and a
    draft keeps its ratio to the one that it took turns with. Also what was measured."""
    pairs = {draft: in_own_process(measure_draft, settings, draft) for draft in tqdm(settings.drafts, desc="drafts")}
    return combine(pairs), pairs


def table(title: str, steps: Steps, drafts: list[str], cell) -> list[str]:
    lines = ["", f"| {title} | " + " | ".join(drafts) + " |", "|---|" + "---|" * len(drafts)]
    return lines + [
        f"| {batch} | " + " | ".join(cell(steps[batch], draft) for draft in drafts) + " |" for batch in steps
    ]


def to_markdown(run: dict, steps: Steps, lengths: Lengths) -> str:
    drafts = [draft for draft in next(iter(steps.values())) if draft != NONE]
    lines = [
        f"Medians over the decoding steps in which the whole batch decodes, {run['context']} tokens of context, "
        f"{run['weights']}; each kind of draft beside an engine without, in turns.",
        f"{machine_line(run)}; `{run['command']}`.",
    ]
    lines += table("milliseconds a step, batch", steps, [NONE, *drafts], lambda times, draft: f"{times[draft]:.2f}")
    lines += table("break-even acceptance length, batch", steps, drafts, lambda t, d: f"{break_even(t, d):.2f}")
    known = [draft for draft in drafts if draft in lengths]
    if not known:
        return "\n".join(lines) + "\n"
    lines += table("speedup, batch", steps, known, lambda t, d: f"{speedup(t, d, lengths[d]):.2f}")
    lines.append("| acceptance length | " + " | ".join(f"{lengths[draft]:.2f}" for draft in known) + " |")
    largest = [largest_paying_batch(steps, draft, lengths[draft]) for draft in known]
    lines.append("| pays up to a batch of | " + " | ".join("-" if x is None else str(x) for x in largest) + " |")
    suggested = suggest_tree_rows(steps, {draft: lengths[draft] for draft in known})
    if suggested:
        lines += ["", "| num_speculative_tokens | suggested ctc_tree_rows | mean speedup over the batch sizes |"]
        lines.append("|---|---|---|")
        lines += [f"| {nodes} | {rows} | {mean:.2f} |" for nodes, (rows, mean) in suggested.items()]
    return "\n".join(lines) + "\n"


def plot(path: Path, steps: Steps, lengths: Lengths, machine: str) -> None:
    """Speedup against batch size at the given acceptance lengths, or a panel for each of some examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drafts = [draft for draft in next(iter(steps.values())) if draft != NONE]
    panels = {f"acceptance length {length:g}": dict.fromkeys(drafts, length) for length in EXAMPLES}
    if lengths:
        panels = {"measured acceptance lengths": {draft: lengths[draft] for draft in drafts if draft in lengths}}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, sharey=True)
    for axis, (title, at) in zip(axes[0], panels.items(), strict=True):
        for draft, length in at.items():
            axis.plot(list(steps), [speedup(times, draft, length) for times in steps.values()], "o-", label=draft)
        axis.axhline(1, color="tab:gray", linestyle="--", label=NONE)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(steps), [str(batch) for batch in steps])
        axis.set_xlabel("batch size")
        axis.set_ylabel("speedup")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8)
    figure.suptitle(machine, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser, overrides=["target", "drafter"])
    parser.add_argument("--shape", choices=SHAPES, help="dummy weights of this shape in place of a pair")
    parser.add_argument("--drafts", nargs="+", default=DRAFTS, metavar="DRAFT", help="chain:N, tree:N")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES[on_cpu()])
    parser.add_argument("--context", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--max-tokens", type=int, default=64, help="of every request")
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size")
    parser.add_argument("--steps", type=Path, metavar="FILE.json", help="what an earlier run measured")
    parser.add_argument("--acceptance", type=Path, metavar="FILE.json", help="of `vllm-ctc eval --json`")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the acceptance lengths")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency_model", help="path without suffix")
    return choose_pair(parser.parse_args(argv))


def measured_record(args: argparse.Namespace, argv: list[str]) -> dict:
    weights = f"dummy weights of the shape {args.shape}" if args.shape else f"the pair {args.pair.name}"
    busy = psutil.cpu_percent(BUSY_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            args.target, args.drafter = make_pair(args.shape, Path(folder))
        else:
            ready(args.pair)
        steps, pairs = measure(args)
    run = describe_run(
        "benchmarks/latency_model.py", argv, context=args.context, weights=weights, repeats=args.repeats,
        machine_busy_percent_before=busy,
    )  # fmt: skip
    return {"run": run, "step_ms": steps, "pairs_ms": pairs}


def main(argv: list[str]) -> int:
    args = parse(argv)
    lengths = read_acceptance(args.acceptance, args.temperature) if args.acceptance else {}
    record = json.loads(args.steps.read_text(encoding="utf-8")) if args.steps else measured_record(args, argv)
    steps = {int(batch): times for batch, times in record["step_ms"].items()}
    record["acceptance_length"] = lengths
    record["suggested_tree_rows"] = suggest_tree_rows(
        steps, {draft: length for draft, length in lengths.items() if draft in next(iter(steps.values()))}
    )
    write_record(args.output, record, to_markdown(record["run"], steps, lengths))
    plot(args.output.with_suffix(".png"), steps, lengths, record["run"]["gpu"] or record["run"]["cpu"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
