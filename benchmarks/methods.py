"""The rows of a comparison: servers to start, with their drafts, and servers that run already."""

import argparse
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pair import V2_RUNNER, ctc_config, existing
from server import RunningServer

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 24}
EAGLE3_TOKENS = 3  # where the checkpoint names no number: as in vLLM's documentation
TREE_SIZES = (8, 16, 32, 64)
TRANSFORM = "ctc transform 16"
FOREIGN = ("eagle3", "dflash", "dspark")  # vLLM's methods that need a checkpoint of their own
LOSSY = ("fly", "synthetic")  # vLLM's ways to accept what the target would not say
DEFAULT_METHODS = ("none (V2 runner)", "ngram", "ctc chain", "ctc tree 16")


@dataclass(frozen=True)
class Method:
    name: str
    speculative_config: Mapping | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    base_url: str | None = None  # of a server that runs already

    def options(self) -> dict:
        """How to get this row, without paths of this machine."""
        if self.base_url:
            return {"running": True, "vllm": RunningServer(self.base_url).version()}
        config = dict(self.speculative_config or {})
        if "model" in config:
            config["model"] = Path(config["model"]).name
        return {"speculative_config": config or None, "env": dict(self.env)}


def own_methods(drafter: Path) -> list[Method]:
    """The rows that need nothing but vLLM, this plugin and a CTC drafter. Trees get smaller in larger batches, as in a
    user's server; `transform` is the paper's way to a tree, for drafters with a blank."""

    def ctc(name: str, draft: str, **options) -> Method:
        return Method(f"ctc {name}", {**ctc_config(drafter), "ctc_draft": draft, **options})

    return [
        Method("none (default runner)"),
        Method("none (V2 runner)", env=V2_RUNNER),
        Method("ngram", NGRAM),
        Method("suffix", SUFFIX),
        ctc("chain", "chain"),
        ctc("chain, sampled", "chain", draft_sample_method="probabilistic"),
        *(ctc(f"tree {nodes}", "tree", num_speculative_tokens=nodes) for nodes in TREE_SIZES),
        Method("cache 16", {"method": "ctc", "ctc_sources": "cache", "num_speculative_tokens": 16}),
        Method("ctc+cache 16", {**ctc_config(drafter), "ctc_sources": "ctc+cache", "num_speculative_tokens": 16}),
        ctc(TRANSFORM.removeprefix("ctc "), "tree", num_speculative_tokens=16, ctc_search="transform"),
    ]


NAMES = [method.name for method in own_methods(Path())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", nargs="*", choices=["all", *NAMES], metavar="NAME",
        help=f"all, or of: {'; '.join(NAMES)} (default: {'; '.join(DEFAULT_METHODS)}; with --base-url: none of them)",
    )  # fmt: skip
    for name in FOREIGN:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"a row for this {name} checkpoint")
    parser.add_argument(
        "--speculative-config", action="append", default=[], metavar="NAME=JSON",
        help="a row of this name with this vLLM option; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--base-url", action="append", default=[], metavar="URL",
        help="a row for a server that runs (with --no-enable-prefix-caching, or repeats get faster); repeatable",
    )  # fmt: skip
    parser.add_argument("--label", action="append", default=[], help="its name, one for each --base-url")


def chosen(args: argparse.Namespace) -> tuple[list[Method], list[str]]:
    """The rows that were asked for, and a sentence for each that this machine cannot serve. The outputs of all rows are
    compared with the first row's."""
    names = args.methods if args.methods is not None else () if args.base_url else DEFAULT_METHODS
    everything = "all" in names
    rows, skipped = [], []
    for method in own_methods(args.drafter):
        if not everything and method.name not in names:
            continue
        if method.name == "suffix" and importlib.util.find_spec("arctic_inference") is None:
            skipped.append("suffix is skipped: it needs `pip install arctic-inference`.")
            continue
        if method.name.startswith("ctc"):
            existing(args.drafter)
        if method.name == TRANSFORM and not has_blank(args.drafter):
            if not everything:
                raise SystemExit(f"error: {TRANSFORM} needs a drafter with a blank, and {args.drafter} has none.")
            skipped.append(f"{TRANSFORM} is skipped: the drafter has no blank.")
            continue
        rows.append(method)
    rows += [foreign(name, getattr(args, name)) for name in FOREIGN if getattr(args, name)]
    rows += [named_config(text) for text in args.speculative_config]
    if len(args.label) != len(args.base_url):
        raise SystemExit("error: every --base-url needs a --label, in the same order.")
    rows += [Method(label, base_url=url) for label, url in zip(args.label, args.base_url)]
    twice = {row.name for row in rows if [other.name for other in rows].count(row.name) > 1}
    if twice:
        raise SystemExit(f"error: there are two rows called {sorted(twice)[0]}: give one of them another name.")
    for row in rows:
        options = row.speculative_config or {}
        if options.get("rejection_sample_method") in LOSSY or options.get("ctc_acceptance") is not None:
            raise SystemExit(
                f"error: {row.name} is lossy, and speed says nothing without what it costs: use benchmarks/quality.py."
            )
    if not rows:
        raise SystemExit("error: there is nothing to measure: name some of --methods.")
    return rows, skipped


def has_blank(drafter: Path) -> bool:
    return json.loads((drafter / "config.json").read_text(encoding="utf-8")).get("lattice", "ctc") == "ctc"


def foreign(name: str, folder: Path) -> Method:
    """A row of another method's checkpoint. vLLM wants the number of tokens of all but DSpark, which has its own."""
    config = json.loads((existing(folder) / "config.json").read_text(encoding="utf-8"))
    tokens = config.get("block_size", 0) - 1 if name == "dflash" else EAGLE3_TOKENS  # a block begins with the anchor
    env = {} if name == "eagle3" else V2_RUNNER  # on a CPU EAGLE-3 runs on V1 alone, and the others on V2
    if "speculators_config" in config:
        tokens = config["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    elif name == "dspark":
        return Method(name, {"method": name, "model": str(folder)}, env)
    if tokens < 1:
        raise SystemExit(
            f"error: {folder}/config.json names no block_size: give the row as --speculative-config "
            f'\'{name}={{"method": "{name}", "model": ..., "num_speculative_tokens": ...}}\'.'
        )
    return Method(name, {"method": name, "model": str(folder), "num_speculative_tokens": tokens}, env)


def named_config(text: str, option: str = "--speculative-config") -> Method:
    name, _, config = text.partition("=")
    try:
        value = json.loads(config)
    except ValueError:
        value = None
    if not name or not isinstance(value, dict):
        raise SystemExit(f"error: {option} takes NAME=JSON with a JSON object, not {text!r}.")
    return Method(name, value)
