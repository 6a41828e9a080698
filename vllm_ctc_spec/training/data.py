"""Prompts from a jsonl file: which rows can be used, and which are held out."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_ctc_spec.training.settings import TrainingError
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


PROMPT_FIELDS: dict[str, Callable[[Any], Messages | None]] = {
    "question": _user,
    "prompt": _user,
    "turns": _first_turn,
    "messages": _dialogue,
}


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids of the usable rows, in file order."""

    train: list[list[int]]
    held_out: list[list[int]]
    unusable: int  # rows without any known field
    too_long: int  # rows that leave no room for a response in the target's positions

    def report(self) -> str:
        prompts = f"{len(self.train)} prompts for training, {len(self.held_out)} held out"
        return prompts + skipped_rows(self.unusable, self.too_long) + "."


def skipped_rows(unusable: int, too_long: int) -> str:
    text = ""
    if unusable:
        text += f"; {unusable} rows skipped: none of the fields {', '.join(PROMPT_FIELDS)}"
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
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The data file {path} cannot be read ({error}).") from error


def encode(dialogues: Sequence[Messages], target: Target | TargetText, max_new_tokens: int) -> list[list[int]]:
    """Token ids of the dialogues that leave room for a response in the target's positions."""
    encoded = [
        target.tokenizer(
            target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        ).input_ids
        for messages in dialogues
    ]
    room = target.max_length - min(max_new_tokens, target.max_length // 2)
    return [ids for ids in encoded if 0 < len(ids) <= room]


def read_prompts(path: str, target: Target | TargetText, max_new_tokens: int, held_out: int) -> Prompts:
    """Prompts of `path`; the last `held_out` usable rows, at most a tenth of them, are never trained on."""
    lines = read_lines(path)
    usable = [messages for line in lines if (messages := parse_row(line))]
    rows = encode(usable, target, max_new_tokens)
    if len(rows) < 2:
        raise TrainingError(
            f"{path} has {len(rows)} usable rows of {len(lines)}, and training needs two or more; each row needs one "
            f"of the fields {', '.join(PROMPT_FIELDS)} and must fit the target's {target.max_length} positions."
        )
    split = len(rows) - max(1, min(held_out, len(rows) // 10))
    return Prompts(rows[:split], rows[split:], len(lines) - len(usable), len(usable) - len(rows))
