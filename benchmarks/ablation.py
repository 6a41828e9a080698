"""The ablation: drafters of one size, on the same data, for the same steps, that differ in loss, lattice or heads.

    vllm-ctc data --target assets/target --prompts gsm8k_train.jsonl --output dataset --hidden-states
    python benchmarks/ablation.py --data dataset --prompts gsm8k_test.jsonl --spec-bench spec_bench.jsonl

`--table widening` varies the best row of the ablation instead, one setting at a time; `--table architectures` compares
the Attention Draft Module with SpecFormer, what they cost included (of a draft's time, what `draft_time.py` measured).

The work folder keeps every run, so none is repeated. Started again, or several times at once with other seeds or
methods, the program adds the missing runs and writes the table of all runs (OUTPUT.json, OUTPUT.md, OUTPUT.png).
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path

import torch
from pair import RESULTS, add_pair_arguments, choose_pair, ready
from record import machine
from torch import Tensor

from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.training.acceptance import Acceptance, walk
from vllm_ctc_spec.training.checkpoint import RunPaths
from vllm_ctc_spec.training.config import DTYPES, TrainConfig
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.drafting import Drafting
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.evaluate import read_eval_prompts, response_log_probs
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.hidden_states import HiddenStates, in_process
from vllm_ctc_spec.training.measure import draft_everywhere, measure_chain, measure_sampled_chain, measure_trees
from vllm_ctc_spec.training.run import train
from vllm_ctc_spec.training.target import Target, TargetText

METHODS: dict[str, dict] = {
    "CE (DFlash-like), 8 slots": {"loss": "ce", "markov_rank": 0, "num_frames": 8},
    "CE + label-conditional (DSpark-like), 8 slots": {"loss": "ce", "num_frames": 8},
    "CE + label-conditional (DSpark-like), 24 slots": {"loss": "ce", "num_frames": 24},
    "CTC as published, 12 frames": {"loss": "ctc", "num_frames": 12},
    "CTC prefix, 12 frames": {"markov_rank": 0, "num_frames": 12},
    "CTC prefix + label-conditional, 12 frames": {"num_frames": 12},
    "CTC prefix + label-conditional, 24 frames": {"num_frames": 24},
    "transitions + label-conditional, 12 frames": {"lattice": "transitions", "num_frames": 12},
    "transitions + label-conditional, 24 frames": {"lattice": "transitions", "num_frames": 24},
}
SIZES = (8, 16, 32, 64)
COMMAND = "python benchmarks/ablation.py --data dataset --prompts gsm8k_test.jsonl --spec-bench spec_bench.jsonl"
TWIN_8 = "CE + label-conditional (DSpark-like), 8 slots"
OURS, TWIN = "transitions + label-conditional, 24 frames", "CE + label-conditional (DSpark-like), 24 slots"
ALL_LAYERS = tuple(range(1, 9))  # of the tiny target
VARIATIONS: dict[str, dict] = {
    "2 draft layers": {"num_layers": 2},
    "3 draft layers": {"num_layers": 3},
    "32 frames": {"num_frames": 32},
    "48 frames": {"num_frames": 48},
    "12 labels": {"num_labels": 12},
    "position decay 2": {"position_decay": 2.0},
    "position decay 8": {"position_decay": 8.0},
    "from the twin's weights": {"init": TWIN},
    "reads layer 7 alone": {"aux_layers": (7,)},
    "reads layers 1, 4, 7": {"aux_layers": (1, 4, 7)},
    "reads layers 2, 5, 6, 7, 8": {"aux_layers": (2, 5, 6, 7, 8), "features": "target"},
    "reads all 8 layers": {"aux_layers": ALL_LAYERS, "features": "target"},
    "1200 steps": {"steps": 1200},
}
WIDENING = {OURS: METHODS[OURS]}
WIDENING |= {f"the same, {name}": {**METHODS[OURS], **settings} for name, settings in VARIATIONS.items()}
WIDENING[TWIN] = METHODS[TWIN]
WIDENING |= {f"the twin, {name}": {**METHODS[TWIN], **VARIATIONS[name]} for name in ("2 draft layers", "1200 steps")}
TRANSITIONS = {"lattice": "transitions"}
SPECFORMER = {"architecture": "specformer"}
ARCHITECTURES = {
    TWIN_8: METHODS[TWIN_8],
    "SpecFormer, CE + label-conditional, 8 slots": {**METHODS[TWIN_8], **SPECFORMER},
    "transitions + label-conditional, 12 frames": {**TRANSITIONS, "num_frames": 12},
    "SpecFormer, transitions + label-conditional, 12 frames": {**TRANSITIONS, **SPECFORMER, "num_frames": 12},
    OURS: METHODS[OURS],
    "SpecFormer, transitions + label-conditional, 24 frames": {**TRANSITIONS, **SPECFORMER, "num_frames": 24},
    "SpecFormer, the same, causal among frames": {
        **TRANSITIONS, **SPECFORMER, "num_frames": 24, "frame_attention": "causal",
    },
    "SpecFormer, the same, positional rank 64": {**TRANSITIONS, **SPECFORMER, "num_frames": 24, "positional_rank": 64},
}  # fmt: skip
TABLES = {"ablation": METHODS, "widening": WIDENING, "architectures": ARCHITECTURES}
TITLES = {
    "ablation": "# Ablation: acceptance length by loss, lattice and head",
    "widening": "# One setting at a time: what makes the best row of the ablation better",
    "architectures": "# Attention Draft Module and SpecFormer: acceptance length and cost",
}
SHARED = {"num_layers": 1, "num_labels": 8, "batch_size": 8, "anchors": 16}


def slug(method: str, seed: int) -> str:
    return "".join(c if c.isalnum() else "-" for c in method.lower()) + f"-seed-{seed}"


@torch.no_grad()
def measure_published(
    drafter: CTCDrafter, hidden_states: HiddenStates, examples: Sequence[Example]
) -> dict[str, Acceptance]:
    """Drafts as the paper makes them: arg-max frames, and its transform of a tree, with as many symbols as nodes."""
    found: dict[str, Acceptance] = {"arg-max chain": Acceptance([], [])}
    found |= {f"transform {size}": Acceptance([], []) for size in SIZES}

    def depths(part: Drafting) -> list[Tensor]:
        trees = (part.tree(size, "transform", width=size) for size in SIZES)
        return [part.accepted(part.chain("argmax")), *map(part.accepted_in, trees)]

    for _, parts in draft_everywhere(drafter, hidden_states, examples, depths):
        for acceptance, accepted in zip(found.values(), zip(*parts)):
            every = torch.cat(accepted).tolist()
            acceptance.tokens.append(len(every))
            acceptance.steps.append(walk(every))
    return found


class Bench:
    """The target, and its responses to the prompts of each test set, which all drafters share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.target = Target.load(str(args.target), torch.device("cpu"), torch.float32)
        self.sets = {"GSM8K test": (args.prompts, None, args.num_prompts)}
        if args.spec_bench:
            for category in ("math_reasoning", "qa"):
                self.sets[f"Spec-Bench {category}"] = (args.spec_bench, category, args.num_prompts // 2)

    def responses(self, name: str, temperature: float) -> list[Example]:
        data, category, count = self.sets[name]
        path = self.args.work / "responses" / f"{slug(name, int(temperature))}-{count}.json"
        if not path.is_file():
            config = EvalConfig(
                str(self.args.target), "", str(data), num_prompts=count, category=category, temperature=(temperature,)
            )
            prompts = read_eval_prompts(config, TargetText.load(str(self.args.target))).prompts
            examples = respond(self.target, prompts, config.max_new_tokens, temperature, config.seed)
            rows = [[e.prompt, e.response] for e in examples]
            write(path, rows)
        return [Example(*row) for row in json.loads(path.read_text())]

    def train(self, method: str, seed: int) -> CTCDrafter:
        folder = self.args.work / slug(method, seed)
        here = {"steps": self.args.steps, "dtype": self.args.dtype, "features": self.args.features}
        settings = {**SHARED, **here, **TABLES[self.args.table][method]}
        if "init" in settings:
            settings["init"] = str(self.args.work / slug(settings["init"], seed))
        config = TrainConfig(
            target=str(self.args.target), data=str(self.args.data), seed=seed, eval_every=settings["steps"], **settings
        )
        print(train(config, RunPaths(folder, folder / "work", folder / "labels"), overwrite=False))
        return CTCDrafter.load(folder, self.target.embedding, self.target.head)

    def measure(self, drafter: CTCDrafter) -> dict[str, dict]:
        """By test set, then by drafts."""
        hidden_states = in_process(self.target, drafter.config.aux_hidden_state_layer_ids)
        results: dict[str, dict] = {}
        for name in self.sets:
            examples = self.responses(name, 0.0)
            found = {"chain": measure_chain(drafter, hidden_states, examples)}
            found |= {f"tree {n}": a for n, a in measure_trees(drafter, hidden_states, examples, SIZES).items()}
            if name == "GSM8K test":
                sampled = self.responses(name, 1.0)
                found["chain at temperature 1"] = measure_sampled_chain(
                    drafter, hidden_states, sampled, partial(response_log_probs, self.target)
                )
            if drafter.config.lattice == "ctc" and drafter.markov_head is None:
                found |= measure_published(drafter, hidden_states, examples)
            results[name] = {drafts: asdict(acceptance) for drafts, acceptance in found.items()}
        return results


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def run(args: argparse.Namespace) -> None:
    bench = Bench(args)
    for seed in args.seeds:
        for method in args.methods:
            result = args.work / "results" / f"{slug(method, seed)}.json"
            if result.is_file():
                continue
            drafter = bench.train(method, seed)
            parameters = sum(parameter.numel() for parameter in drafter.parameters())
            sets = bench.measure(drafter)
            write(
                result,
                {"method": method, "seed": seed, "steps": args.steps, "parameters": parameters, "sets": sets},
            )
            print(f"==> {method}, seed {seed}: done", flush=True)


Lengths = dict[tuple[str, str, str], list[float]]
"""(method, test set, drafts) to the acceptance length of each seed."""


def read_results(args: argparse.Namespace) -> list[dict]:
    """Those of the table's methods, in its order."""
    order = {method: i for i, method in enumerate(TABLES[args.table])}
    results = [json.loads(path.read_text()) for path in (args.work / "results").glob("*.json")]
    chosen = [result for result in results if result["method"] in order]
    return sorted(chosen, key=lambda result: (order[result["method"]], result["seed"]))


def collect(results: Sequence[dict]) -> Lengths:
    lengths: Lengths = {}
    for result in results:
        for test_set, drafts in result["sets"].items():
            for name, acceptance in drafts.items():
                key = (result["method"], test_set, name)
                lengths.setdefault(key, []).append(Acceptance(**acceptance).length)
    return lengths


def mean_and_spread(values: list[float]) -> str:
    """Mean over seeds, and half the range where there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def table(lengths: Lengths, test_set: str) -> list[str]:
    drafts = list(dict.fromkeys(name for _, where, name in lengths if where == test_set))
    columns = [name for name in drafts if not name.startswith(("arg-max", "transform"))]
    lines = ["| drafter (seeds) | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in dict.fromkeys(method for method, where, _ in lengths if where == test_set):
        cells = [lengths.get((method, test_set, name)) for name in columns]
        seeds = max(len(cell) for cell in cells if cell)
        lines.append(f"| {method} ({seeds}) | " + " | ".join(mean_and_spread(c) if c else "" for c in cells) + " |")
        own = [lengths.get((method, test_set, "arg-max chain"))]
        own += [lengths.get((method, test_set, f"transform {size}")) for size in SIZES]
        if own[0]:
            own += [None] * (len(columns) - len(own))
            text = " | ".join(mean_and_spread(c) if c else "" for c in own)
            lines.append(f"| the same, drafted as in the paper | {text} |")
    return lines


def cost(lengths: Lengths, results: Sequence[dict], draft_times: Path) -> list[str]:
    """What a drafter is judged by beside acceptance: its size, its time, and tokens a verified row, which count where
    rows are what a step costs. Times are those of `draft_time.py`, where it has measured this row."""
    times = json.loads(draft_times.read_text(encoding="utf-8"))["drafts"] if draft_times.is_file() else {}
    sizes = list(dict.fromkeys(size for of_drafter in times.values() for size in of_drafter["ms"]))
    verified = {"chain": 1 + SHARED["num_labels"], "tree 16": 1 + 16}
    columns = ["parameters", *(f"{drafts}, tokens a verified row" for drafts in verified)]
    columns += [f"ms a draft, {size} at a time" for size in sizes]
    lines = ["## Cost", "", "| drafter | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for method, parameters in {result["method"]: result["parameters"] for result in results}.items():
        cells = [f"{parameters / 1e6:.2f} M"]
        for drafts, rows in verified.items():
            cells.append(f"{statistics.mean(lengths[method, 'GSM8K test', drafts]) / rows:.3f}")
        of_drafter = times.get(method, {"ms": {}})["ms"]
        cells += [f"{of_drafter[size]:.2f}" if size in of_drafter else "" for size in sizes]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(lengths: Lengths, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    drafts = ["chain", *(f"tree {size}" for size in SIZES)]
    for method in dict.fromkeys(method for method, where, _ in lengths if where == "GSM8K test"):
        seeds = [lengths[method, "GSM8K test", name] for name in drafts]
        line = axes.plot(drafts, [statistics.mean(s) for s in seeds], marker="o", label=method)[0]
        axes.fill_between(drafts, [min(s) for s in seeds], [max(s) for s in seeds], color=line.get_color(), alpha=0.15)
    axes.set_ylabel("acceptance length, GSM8K test, greedy")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def header(args: argparse.Namespace, results: Sequence[dict]) -> list[str]:
    seeds, steps = (sorted({result[field] for result in results}) for field in ("seed", "steps"))
    shape = {**SHARED, "dtype": args.dtype}
    counts, here = " or ".join(map(str, steps)), machine()
    options = "" if args.table == "ablation" else f" --table {args.table}"
    options += "" if args.dtype == "bf16" else f" --dtype {args.dtype}"
    options += "" if args.features == "stored" else f" --features {args.features}"
    return [
        f"Drafters for {args.target.name}, trained from scratch for {counts} steps on the same data, where a row says "
        f"nothing else, with {', '.join(f'{name} {value}' for name, value in shape.items())}; mean over seeds, of "
        f"{', '.join(map(str, seeds))}, ± half their range. Tokens per target forward, the target's own included; "
        "greedy target and drafts, except the column at temperature 1: responses sampled at temperature 1, chains "
        "sampled from the exact q, in expectation.",
        f"torch {here['torch']}, Python {here['python']}, {here['cpu']}; {date.today()}. `{COMMAND}{options}`",
    ]


def report(args: argparse.Namespace) -> None:
    results = read_results(args)
    if not results:
        raise SystemExit("error: there is no result yet.")
    lengths = collect(results)
    lines = [TITLES[args.table], "", *header(args, results), ""]
    for test_set in dict.fromkeys(where for _, where, _ in lengths):
        lines += [f"## {test_set}", "", *table(lengths, test_set), ""]
        pair = [lengths.get((method, test_set, "chain")) for method in (OURS, TWIN)]
        if all(pair):
            ratio = statistics.mean(pair[0]) / statistics.mean(pair[1])
            lines += [f"Chain of {OURS} against the DSpark-like twin with as many slots: {ratio:.3f}.", ""]
    if args.table == "architectures":
        lines += cost(lengths, results, args.draft_times)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"method": m, "set": s, "drafts": d, "lengths": v} for (m, s, d), v in lengths.items()]
    write(args.output.with_suffix(".json"), rows)
    plot(lengths, args.output.with_suffix(".png"))
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser, overrides=["target"])
    parser.add_argument("--data", type=Path, help="dataset with hidden states; without it only the table is made")
    parser.add_argument("--prompts", type=Path, help="jsonl of test prompts")
    parser.add_argument("--spec-bench", type=Path, help="jsonl of Spec-Bench; two of its categories are measured too")
    parser.add_argument("--work", type=Path, default=Path("build/ablation"))
    parser.add_argument("--table", choices=list(TABLES), default="ablation")
    parser.add_argument("--output", type=Path, help="path without suffix (default: benchmarks/results/TABLE)")
    parser.add_argument(
        "--draft-times", type=Path, default=RESULTS / "draft_time.json", metavar="FILE.json",
        help="what draft_time.py measured",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the training")
    parser.add_argument("--features", choices=("stored", "target"), default="stored", help="as of `vllm-ctc train`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="rows of the table (default: all)")
    parser.add_argument("--num-prompts", type=int, default=40, help="of the first test set, half of it of the others")
    args = choose_pair(parser.parse_args())
    rows = list(TABLES[args.table])
    args.methods = args.methods or rows
    if unknown := set(args.methods) - set(rows):
        parser.error(f"unknown --methods {sorted(unknown)}; the rows of the {args.table} are {rows}")
    args.output = args.output or RESULTS / args.table
    if not math.isfinite(args.steps) or args.steps < 1:
        parser.error("--steps must be 1 or more")
    try:
        if args.data is not None:
            ready(args.pair, drafter=False)
            run(args)
        report(args)
    except (TrainingError, DrafterConfigError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
