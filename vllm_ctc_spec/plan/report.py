"""A plan for people: the table, and a picture where matplotlib is installed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_ctc_spec.plan.file import Plan
from vllm_ctc_spec.plan.solve import MERGED, NONE, Choice, Lengths, StepTimes, mean_speed

COLUMNS = f"{'draft':>10}{'ms a step':>11}{'accepted':>10}{'speedup':>9}"


def text(plan: Plan, kind: str, by_kind: Mapping[str, Sequence[Choice]], path: Path, plot: Path | None) -> str:
    """kind: the better one; its columns come first."""
    kinds = [kind, *(other for other in by_kind if other != kind)]
    lines = [f"{'batch':>5}" + " |".join(COLUMNS for _ in kinds)]
    for choices in zip(*(by_kind[name] for name in kinds), strict=True):
        lines.append(f"{choices[0].batch_size:>5}" + " |".join(map(_cells, choices)))
    speeds = ", ".join(f"{mean_speed(by_kind[name]):.1f} with {_plural(name)}" for name in kinds)
    lines.append(f"Tokens a second, geometric mean over the batch sizes: {speeds}.")
    if plan.draft == NONE:
        lines.append("No draft pays on this machine: a server that follows the plan drafts nothing; serve without it.")
    else:
        config = json.dumps({"method": "ctc", "model": "DRAFTER", "ctc_plan": str(path)})
        lines.append(f"Serve with --speculative-config '{config}'.")
    lines.append(f"Written to {path}{f' and {plot}' if plot else ''}.")
    return "\n".join(lines)


def _plural(kind: str) -> str:
    return f"trees of {kind}" if kind == MERGED else f"{kind}s"


def _cells(choice: Choice) -> str:
    return f"{choice.draft:>10}{choice.step_ms:>11.2f}{choice.acceptance_length:>10.2f}{choice.speedup:>9.2f}"


def plot(path: Path, steps: StepTimes, lengths: Lengths, choices: Sequence[Choice], device: str) -> Path | None:
    """Speedup by batch size of every draft, and of the plan; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    batches = sorted(steps)
    for draft, length in lengths.items():
        axis.plot(batches, [length * steps[batch][NONE] / steps[batch][draft] for batch in batches], "o-", label=draft)
    axis.plot(batches, [choice.speedup for choice in choices], "k--", linewidth=2, label="the plan")
    axis.axhline(1, color="tab:gray", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, list(map(str, batches)))
    axis.set_xlabel("batch size")
    axis.set_ylabel("speedup")
    axis.set_title(device, fontsize=9)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
