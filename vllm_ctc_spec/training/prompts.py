"""Prompts from a jsonl file: which rows can be used, and which are held out."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tqdm import tqdm

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.target import Target, TargetText

Messages = list[dict[str, str]]


def _user(text: Any) -> Messages | None:
    return [{"role": "user", "content": text}] if isinstance(text, str) and text.strip() else None


def _first_turn(turns: Any) -> Messages | None:
    return _user(turns[0]) if isinstance(turns, list) and turns else None


def _dialogue(messages: Any) -> Messages | None:
    """Everything up to the last user turn: what follows is for the target to say."""
    if not isinstance(messages, list):
        return None
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return None
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[-1] + 1] if users else None


# The first that a row has is taken: a dialogue often lies beside a copy of its first turn.
PROMPT_FIELDS: dict[str, Callable[[Any], Messages | None]] = {
    "messages": _dialogue,
    "turns": _first_turn,
    "question": _user,
    "prompt": _user,
}
FIELD_NAMES = "question, prompt, turns, messages"  # for a reader: the simplest first

# What a chat template that prints the date is told, so that a run continues with the prompts that it began with.
TODAY = datetime.datetime(2026, 1, 1)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids of the usable rows, in file order."""

    train: list[list[int]]
    held_out: list[list[int]]
    unusable: int  # rows without any known field
    too_long: int  # rows that leave no room for a response in the target's positions
    refusals: tuple[str, ...] = ()  # why the target's chat template refused rows, one reason each
    chat_template_kwargs: dict[str, Any] | None = None

    def report(self) -> str:
        prompts = f"{len(self.train)} prompts for training, {len(self.held_out)} held out"
        return prompts + skipped_rows(self.unusable, self.too_long, self.refusals) + "."


def skipped_rows(unusable: int, too_long: int, refusals: Sequence[str] = ()) -> str:
    text = ""
    if unusable:
        text += f"; {unusable} rows skipped: none of the fields {FIELD_NAMES}"
    if refusals:
        text += f"; {len(refusals)} rows skipped: refused by the target's chat template (the first: {refusals[0]})"
    if too_long:
        text += f"; {too_long} rows skipped: longer than the target's positions"
    return text


def parse_row(line: str) -> Messages | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    return next((found for name, read in PROMPT_FIELDS.items() if (found := read(row.get(name)))), None)


def read_lines(path: str) -> list[str]:
    try:
        # Not splitlines, which also cuts at characters that JSON allows within strings, such as U+2028.
        return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The data file {path} cannot be read ({error}).") from error


class RefusedRow(ValueError):
    """The target's chat template, or its tokenizer, cannot do anything with a dialogue; the message says why."""


def token_ids(
    messages: Messages, target: Target | TargetText, chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """The prompt after which the target answers the dialogue (RefusedRow)."""
    try:
        text = target.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            strftime_now=TODAY.strftime,
            **chat_template_kwargs or {},
        )
        return target.tokenizer(text, add_special_tokens=False).input_ids
    except (TemplateError, TypeError) as error:  # such as roles in another order, or a content that is no text
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RefusedRow(f"{type(error).__name__}: {reason.rstrip('.')}") from error


def fits(ids: Sequence[int], target: Target | TargetText, max_new_tokens: int) -> bool:
    """Whether there is room for a response in the target's positions."""
    return 0 < len(ids) <= target.max_length - min(max_new_tokens, target.max_length // 2)


def read_prompts(
    path: str,
    target: Target | TargetText,
    max_new_tokens: int,
    held_out: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Prompts:
    """Prompts of `path`; the last `held_out` usable rows, at most a tenth of them, are never trained on."""
    lines = read_lines(path)
    dialogues = [messages for line in lines if (messages := parse_row(line))]
    encoded, refusals = [], []
    for messages in tqdm(dialogues, desc="tokens of the prompts", unit="row", delay=2):
        try:
            encoded.append(token_ids(messages, target, chat_template_kwargs))
        except RefusedRow as reason:
            refusals.append(str(reason))
    rows = [ids for ids in encoded if fits(ids, target, max_new_tokens)]
    unusable, too_long = len(lines) - len(dialogues), len(encoded) - len(rows)
    if len(rows) < 2:
        raise TrainingError(
            f"{path} has {len(rows)} usable rows of {len(lines)}, and training needs two or more; each row needs one "
            f"of the fields {FIELD_NAMES} and must fit the target's {target.max_length} positions"
            f"{skipped_rows(unusable, too_long, refusals)}."
        )
    split = len(rows) - max(1, min(held_out, len(rows) // 10))
    return Prompts(rows[:split], rows[split:], unusable, too_long, tuple(refusals), chat_template_kwargs)
