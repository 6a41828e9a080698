"""Rows of a jsonl file and the dialogue in each. Kept free of torch: the benchmarks read their prompts here too."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_ctc_spec.errors import TrainingError

Messages = list[dict[str, str]]


def _user(text: Any) -> Messages | None:
    return [{"role": "user", "content": text}] if isinstance(text, str) and text.strip() else None


def _first_turn(turns: Any) -> Messages | None:
    return _user(turns[0]) if isinstance(turns, list) and turns else None


def _dialogue(messages: Any) -> Messages | None:
    """Everything up to the last user turn: the target answers that turn itself."""
    if not isinstance(messages, list):
        return None
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return None
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return messages[: users[-1] + 1] if users else None


# The first field that a row has is taken: a dialogue often lies beside a copy of its first turn.
PROMPT_FIELDS: dict[str, Callable[[Any], Messages | None]] = {
    "messages": _dialogue,
    "turns": _first_turn,
    "question": _user,
    "prompt": _user,
}
FIELD_NAMES = "question, prompt, turns, messages"  # for messages to a user: the simplest first


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a file: its fields, none if it is no JSON object, and its dialogue, None without a known field."""

    fields: dict[str, Any]
    messages: Messages | None


def read_rows(path: str | Path, names: Iterable[str] = PROMPT_FIELDS) -> list[Row]:
    """All lines that are not blank; names: the fields that may hold a dialogue, the first that a row has is taken."""
    try:
        # Not splitlines, which also cuts at characters that JSON allows within strings, such as U+2028.
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"The data file {path} cannot be read ({error}).") from error
    return [_parse(line, names) for line in lines]


def _parse(line: str, names: Iterable[str]) -> Row:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = {}
    if not isinstance(fields, dict):
        fields = {}
    found = (PROMPT_FIELDS[name](fields.get(name)) for name in names)
    return Row(fields, next((messages for messages in found if messages), None))
