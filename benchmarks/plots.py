"""The plots of a report: speed by concurrency, acceptance length by dataset or source of drafts, the parts of a step,
quality by speed, edge clients against streams."""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from edge import Measurement
    from quality import Quality
    from report import Row

# Names in `step_time.py`, and names beside other methods' figures.
PARTS = {"drafter": "draft", "target forward": "verify", "verification": "sample"}


def styles(rows: list["Row"]) -> dict[str, dict]:
    """By method. No speculation is grey: colours are for the drafts."""
    colors = cycle(pyplot.rcParams["axes.prop_cycle"].by_key()["color"])
    speculative = {row.method: row.speculative for row in rows}
    return {
        method: {"color": next(colors), "linestyle": "-"} if drafts else {"color": "tab:gray", "linestyle": "--"}
        for method, drafts in speculative.items()
    }


def unique(values) -> list:
    return list(dict.fromkeys(values))


def speed(path: Path, rows: list["Row"], title: str) -> None:
    """One panel per dataset and temperature: tokens/s against concurrency, medians and ranges."""
    data, temperatures = unique(row.data for row in rows), unique(row.temperature for row in rows)
    style = styles(rows)
    size = (4.5 * len(temperatures) + 2.5, 3.5 * len(data) + 0.5)
    figure, panels = pyplot.subplots(len(data), len(temperatures), figsize=size, squeeze=False)
    for name, line in zip(data, panels):
        for temperature, panel in zip(temperatures, line):
            for method, look in style.items():
                group = [r for r in rows if (r.method, r.data, r.temperature) == (method, name, temperature)]
                speeds = [row.tokens_per_second for row in group]
                below = [s.median - s.lowest for s in speeds]
                above = [s.highest - s.median for s in speeds]
                x, y = [row.concurrency for row in group], [s.median for s in speeds]
                panel.errorbar(x, y, [below, above], label=method, marker="o", capsize=3, **look)
            panel.set_xscale("log", base=2)
            panel.set_xticks(unique(row.concurrency for row in rows), unique(str(row.concurrency) for row in rows))
            panel.set_ylim(bottom=0)
            panel.set_xlabel("requests at a time")
            panel.set_ylabel("tokens/s")
            panel.set_title(f"{name}, temperature {temperature:g}", fontsize=10)
            panel.grid(alpha=0.3)
    save(figure, panels[0][-1], path, title)


def acceptance(path: Path, rows: list["Row"], title: str) -> None:
    """One panel per temperature: acceptance length by dataset, with the smallest number of requests at a time."""
    least = min(row.concurrency for row in rows)
    rows = [row for row in rows if row.concurrency == least]
    data, temperatures = unique(row.data for row in rows), unique(row.temperature for row in rows)
    style = styles([row for row in rows if row.acceptance_length])
    size = (2.5 + len(data) * max(1.5, 0.3 * len(style)), 3.2 * len(temperatures) + 0.5)
    figure, panels = pyplot.subplots(len(temperatures), 1, figsize=size, squeeze=False)
    for temperature, panel in zip(temperatures, panels[:, 0]):
        lengths = {
            method: {
                r.data: r.acceptance_length.median for r in rows
                if (r.method, r.temperature) == (method, temperature) and r.acceptance_length
            }
            for method in style
        }  # fmt: skip
        length_bars(panel, data, lengths, {method: look["color"] for method, look in style.items()})
        panel.set_title(f"temperature {temperature:g}, {least} at a time", fontsize=10)
    save(figure, panels[0][0], path, title)


def sources(path: Path, lengths: dict[str, dict[str, float]], title: str) -> None:
    """Acceptance length by set of prompts, one bar for each source of drafts."""
    data = list(next(iter(lengths.values())))
    figure, panels = pyplot.subplots(figsize=(2.5 + 1.5 * len(data), 3.5), squeeze=False)
    length_bars(panels[0][0], data, lengths, {})
    save(figure, panels[0][0], path, title)


def length_bars(panel, data: list[str], lengths: dict[str, dict[str, float]], colors: dict[str, str]) -> None:
    """A group of bars for each of `data`, in which a name has one if it has a length there."""
    width = 0.8 / max(len(lengths), 1)
    for i, (name, row) in enumerate(lengths.items()):
        bars = [(x + i * width, row[each]) for x, each in enumerate(data) if each in row]
        panel.bar([x for x, _ in bars], [y for _, y in bars], width, label=name, color=colors.get(name))
    panel.set_xticks([x + 0.4 - width / 2 for x in range(len(data))], data)
    panel.axhline(1, color="tab:gray", linestyle="--", linewidth=1)  # without speculation
    panel.set_ylabel("acceptance length")


def edge(path: Path, rows: list["Measurement"], title: str) -> None:
    """One panel for each server and round trip: the speed of every way by the number of clients, relative to the first
    server's stream over the same round trip."""
    from edge import STREAM, stream_of

    servers, trips = unique(row.cell.sources for row in rows), unique(row.cell.round_trip_ms for row in rows)
    highest = 1.0
    size = (3.2 * len(trips) + 2.5, 3 * len(servers) + 0.5)
    figure, panels = pyplot.subplots(len(servers), len(trips), figsize=size, squeeze=False, sharey=True)
    for server, line in zip(servers, panels):
        for trip, panel in zip(trips, line):
            here = [row for row in rows if (row.cell.sources, row.cell.round_trip_ms) == (server, trip)]
            for way, agreement in unique((row.cell.way, row.cell.agreement) for row in here):
                group = [row for row in here if (row.cell.way, row.cell.agreement) == (way, agreement)]
                ratios = {
                    row.cell.clients: row.tokens_per_second / stream.tokens_per_second
                    for row in group
                    if (stream := stream_of(rows, row.cell))
                }
                label = way if agreement is None else f"{way}, {agreement:g} right"
                look = {"color": "tab:gray", "linestyle": "--"} if way == STREAM else {}
                highest = max(highest, *ratios.values())
                panel.plot(list(ratios), list(ratios.values()), marker="o", label=label, **look)
            panel.set_xscale("log", base=2)
            panel.set_xticks(unique(row.cell.clients for row in rows), unique(str(row.cell.clients) for row in rows))
            panel.minorticks_off()
            panel.set_xlabel("clients")
            panel.set_title(f"{server}, {trip:g} ms", fontsize=10)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"speed, of {servers[0]}'s stream", fontsize=9)
    panels[0][0].set_ylim(0, 1.05 * highest)  # of all, which share it
    save(figure, panels[0][-1], path, title)


def step_time(path: Path, steps: dict, title: str) -> None:
    """One panel per batch size: a step's milliseconds by kind of draft, split into its parts."""
    batches = steps["steps_ms"]
    longest = max(map(len, batches.values()))
    size = ((1.5 + 0.8 * longest) * len(batches) + 1.5, 4)
    figure, panels = pyplot.subplots(1, len(batches), figsize=size, squeeze=False)
    for (batch, drafts), panel in zip(batches.items(), panels[0]):
        names = list(drafts)
        bottom = [0.0] * len(names)
        parts = {shown: [drafts[name][part] for name in names] for part, shown in PARTS.items()}
        known = [sum(values) for values in zip(*parts.values())]
        # The parts are medians of their own: their sum may exceed the whole step's.
        parts["rest"] = [max(drafts[name]["whole step"] - k, 0) for name, k in zip(names, known)]
        for shown, values in parts.items():
            panel.bar(names, values, bottom=bottom, label=shown)
            bottom = [b + v for b, v in zip(bottom, values)]
        panel.set_title(f"batch {batch}", fontsize=10)
        panel.set_ylabel("milliseconds a step")
        panel.tick_params(axis="x", rotation=45)
    save(figure, panels[0][-1], path, title)


def quality(path: Path, rows: list["Quality"], title: str) -> None:
    """Against speed, each relative to the first row, which is exact: right answers, and the target's nats a token."""
    exact = rows[0]
    name, speeds = "tokens a second", [row.tokens_per_second for row in rows]
    if None in speeds:
        name, speeds = "tokens a step", [row.tokens_per_step or 1.0 for row in rows]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), squeeze=False)
    for row, fast in zip(rows, speeds):
        gain = 100 * (fast / speeds[0] - 1)
        look = {"color": "tab:gray", "marker": "s"} if row is exact else {"marker": "o"}
        panels[0][0].plot(gain, 100 * (row.accuracy - exact.accuracy), linestyle="", label=row.rule, **look)
        panels[0][1].plot(gain, row.nats_per_token - exact.nats_per_token, linestyle="", label=row.rule, **look)
    for panel, what in zip(panels[0], ("right answers, percentage points", "nats a token (less is better)")):
        panel.axhline(0, color="tab:gray", linewidth=0.8)
        panel.axvline(0, color="tab:gray", linewidth=0.8)
        panel.set_xlabel(f"{name}, percent more than exact")
        panel.set_ylabel(f"{what}, against exact")
        panel.grid(alpha=0.3)
    save(figure, panels[0][-1], path, title)


def save(figure, panel, path: Path, title: str) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
