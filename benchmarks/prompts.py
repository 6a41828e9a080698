"""Prompts of a comparison: jsonl files of several known forms, turned into files that `vllm bench serve` reads."""

import argparse
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from vllm_ctc_spec.errors import UserError
from vllm_ctc_spec.training.rows import Row, read_rows

FIELDS = ("question", "prompt", "turns")
# Spec-Bench has these under their own names, ten prompts each, and its own tables have them as one.
MT_BENCH = "mt_bench"
MT_BENCH_PARTS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass
class PromptSet:
    """A dataset, or one category of Spec-Bench."""

    name: str
    prompts: list[str]

    def write(self, folder: Path) -> Path:
        """As vLLM's dataset `custom`. Its `spec_bench` would apply the chat template, and the server apply it again."""
        path = folder / f"{self.name.replace('/', '-')}.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in self.prompts), encoding="utf-8")
        return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE.jsonl",
        help=f"rows with one of the keys {', '.join(FIELDS)} (of turns the first); repeatable (default: --prompts)",
    )  # fmt: skip
    parser.add_argument("--spec-bench", type=Path, metavar="FILE.jsonl", help="Spec-Bench's question.jsonl")
    parser.add_argument(
        "--categories",
        nargs="+",
        metavar="NAME",
        help=f"of Spec-Bench, or {MT_BENCH} for a mixture of its eight (default: all, one by one)",
    )


def read(args: argparse.Namespace) -> list[PromptSet]:
    """All sets that were asked for, whole."""
    sets = []
    for text in args.data:
        name, separator, path = text.partition("=")
        if not name or not separator:
            raise SystemExit(f"error: --data takes NAME=FILE.jsonl, not {text!r}.")
        sets.append(PromptSet(name, read_prompts(Path(path))))
    if args.categories and not args.spec_bench:
        raise SystemExit("error: --categories belongs to --spec-bench FILE.jsonl.")
    if args.spec_bench:
        sets += categories(args.spec_bench, args.categories)
    if args.prompts or not sets:
        name = args.prompts.stem if args.prompts else "demo"
        sets = [PromptSet(name, read_prompts(args.pair.prompts)), *sets]
    names = [prompts.name for prompts in sets]
    if len(set(names)) < len(names):
        raise SystemExit("error: two datasets have the same name.")
    return sets


def categories(path: Path, wanted: list[str] | None) -> list[PromptSet]:
    by_category: dict[str, list[str]] = {}
    for row in rows_of(path):
        by_category.setdefault(row.fields.get("category", ""), []).append(first_turn(row, path))
    if MT_BENCH in (wanted or ()) and by_category.keys() >= set(MT_BENCH_PARTS):
        parts = zip(*(by_category[name] for name in MT_BENCH_PARTS))  # the first few are then of every kind
        by_category[MT_BENCH] = list(chain.from_iterable(parts))
    missing = set(wanted or ()) - by_category.keys()
    if missing:
        raise SystemExit(f"error: {path} has no category {sorted(missing)[0]}, but {', '.join(sorted(by_category))}.")
    return [PromptSet(name, by_category[name]) for name in wanted or by_category]


def read_prompts(path: Path) -> list[str]:
    return [first_turn(row, path) for row in rows_of(path)]


def rows_of(path: Path) -> list[Row]:
    try:
        rows = list(read_rows(path, FIELDS))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if not rows or not all(row.fields for row in rows):
        raise SystemExit(f"error: {path} needs a JSON object in every line.")
    return rows


def first_turn(row: Row, path: Path) -> str:
    if row.dialogue is None:
        raise SystemExit(f"error: a row of {path} has none of the keys {', '.join(FIELDS)}.")
    return row.dialogue.turns[0].asked[-1]["content"]


def fitting(prompts: PromptSet, tokenizer, room: int, limit: int) -> PromptSet:
    """The first `limit` prompts of at most `room` tokens as the server sees them, chat template included."""

    def length(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    kept = []
    for text in prompts.prompts:
        if len(kept) == limit:
            break
        if length(text) <= room:
            kept.append(text)
    if not kept:
        raise SystemExit(f"error: no prompt of {prompts.name} is short enough: the model has room for {room} tokens.")
    return PromptSet(prompts.name, kept)
