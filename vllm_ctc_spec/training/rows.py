"""Rows of files of prompts and the dialogue in each. Kept free of torch: the benchmarks read their prompts here too."""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_ctc_spec.errors import shown
from vllm_ctc_spec.training.prompt_files import read_records

Message = dict[str, Any]
"""`role` and `content`, as the target's chat template reads them, and what else the row has of it."""

# The first field with a dialogue is taken: a dialogue often lies beside a copy of its first turn.
PROMPT_FIELDS = ("messages", "conversations", "conversation", "turns", "question", "instruction", "prompt")
FIELD_NAMES = "question, prompt, instruction, turns, messages, conversations, conversation"  # the simplest first
SYSTEM_FIELDS = ("system", "system_prompt")  # beside the dialogue
COLUMNS = {*PROMPT_FIELDS, *SYSTEM_FIELDS, "input", "tools", "category", "answer", "test_list"}
NO_FIELD = f"none of the fields {FIELD_NAMES}"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Speakers of public files, and the role of each in a chat template."""


class Unusable(ValueError):
    """No dialogue can be made of a row; the message says why."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """Messages since the last answer, up to where the assistant has the word, and what it says there in the file."""

    asked: list[Message]
    answer: list[Message] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None  # as the chat template takes them

    def user_turns(self) -> list[int]:
        """For each turn the user messages up to it: 1 for the first, the same again after a tool's result."""
        counts, number = [], 0
        for turn in self.turns:
            number += sum(message["role"] == "user" for message in turn.asked)
            counts.append(max(1, number))
        return counts


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's fields and its dialogue; problem: why there is none."""

    place: str  # in its file, for a user to find it
    fields: dict[str, Any]
    dialogue: Dialogue | None = None
    problem: str = ""


@dataclasses.dataclass
class LeftOut:
    """What no prompt is made of: how many of each kind, why, and where the first one is."""

    found: dict[tuple[str, str], tuple[int, str]] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, reason: str, first: str, count: int = 1) -> None:
        """kind: such as "row"."""
        before, first = self.found.get((kind, reason), (0, first))
        self.found[kind, reason] = (before + count, first)

    def count(self, reason: str) -> int:
        """Of all reasons that begin so."""
        return sum(count for (_, why), (count, _) in self.found.items() if why.startswith(reason))

    def reasons(self) -> list[str]:
        return [
            f"{count} {kind}{'s' * (count != 1)} left out: {reason} (the first: {first})"
            for (kind, reason), (count, first) in self.found.items()
        ]

    def __str__(self) -> str:
        """To go on with in a sentence."""
        return "".join(f"; {reason}" for reason in self.reasons())

    def below(self, sentence: str) -> str:
        """The sentence, and a line for each reason."""
        return "\n".join([sentence, *(f"  {reason}" for reason in self.reasons())])


def read_rows(path: str | Path, names: Iterable[str] = PROMPT_FIELDS) -> Iterator[Row]:
    """All rows of a file or folder that are not blank, each read when it is asked for (TrainingError).

    names: the fields that may hold a dialogue; the first that does in a row is taken.
    """
    names = tuple(names)
    for record in read_records(Path(path), COLUMNS):
        try:
            if record.problem:
                raise Unusable(record.problem)
            yield Row(record.place, record.fields, _dialogue(record.fields, names))
        except Unusable as reason:
            yield Row(record.place, record.fields, problem=str(reason))


def _dialogue(fields: dict[str, Any], names: Iterable[str]) -> Dialogue:
    """Unusable, for the reason that the first of the fields gives."""
    reasons = []
    for name in names:
        if fields.get(name) is None:
            continue
        try:
            turns = READERS.get(name, _plain)(fields[name], fields)
            _check_text(turns)
            return Dialogue(turns, _tools(fields))
        except Unusable as reason:
            reasons.append(f"{name} has {reason}")
    raise Unusable(reasons[0] if reasons else NO_FIELD)


def _plain(value: Any, fields: dict[str, Any]) -> list[Turn]:
    """One user message, or a dialogue in its place."""
    if isinstance(value, list):
        return _messages(value, fields)
    return [Turn([*_system(fields), _user(value)])]


def _instruction(value: Any, fields: dict[str, Any]) -> list[Turn]:
    """Alpaca's form: the text that the instruction is about lies beside it."""
    text = fields.get("input")
    return _plain(f"{value}\n\n{text}" if isinstance(text, str) and text.strip() else value, fields)


def _turns(value: Any, fields: dict[str, Any]) -> list[Turn]:
    """User messages alone, as MT-bench has them."""
    if not isinstance(value, list) or not value:
        raise Unusable("no list of user messages")
    turns = [Turn([_user(text)]) for text in value]
    return [Turn([*_system(fields), *turns[0].asked]), *turns[1:]]


def _messages(value: Any, fields: dict[str, Any]) -> list[Turn]:
    """Messages by `role` and `content`, or by `from` and `value` as ShareGPT has them."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("no list of messages")
    messages = [_message(given) for given in value]
    if not messages or messages[0]["role"] not in ("system", "developer"):
        messages = [*_system(fields), *messages]
    turns, asked = [], []
    for message, following in zip(messages, [*messages[1:], None]):
        if message["role"] == "assistant" and turns and not asked:
            turns[-1].answer.append(message)
            continue
        asked.append(message)
        assistant_follows = following is None or following["role"] == "assistant"
        if assistant_follows and any(each["role"] in ("user", "tool") for each in asked):
            turns.append(Turn(asked))
            asked = []
    if not turns:
        raise Unusable("no user message")
    return turns


READERS = {
    "messages": _messages,
    "conversations": _messages,
    "conversation": _messages,
    "turns": _turns,
    "instruction": _instruction,
}


def _message(given: dict[str, Any]) -> Message:
    # A parquet file has every field in every message, and templates ask whether a field is there.
    given = _without_nulls(given)
    speaker = given.pop("role", None) or given.pop("from", None)
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise Unusable(f"a message by {shown(speaker)}, which is no speaker of a chat")
    content = given.pop("content", None)
    text = _text(given.pop("value", None) if content is None else content)
    if role == "user" and not text.strip():
        raise Unusable("an empty user message")
    message = {"role": role, "content": text, **given}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return message


def _text(content: Any) -> str:
    """Of a content in parts the text, one part a line as vLLM's server joins them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable("a message whose content is no text")
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Unusable(f"a message part that is no text ({shown(kind)})")
        parts.append(text)
    return "\n".join(parts)


def _tool_call(call: Any) -> Any:
    """Templates take arguments as an object; clients send them as JSON, which vLLM's server parses too."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        return {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    return call


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _user(text: Any) -> Message:
    if not isinstance(text, str):
        raise Unusable("a user message that is no text")
    return _message({"role": "user", "content": text})


def _system(fields: dict[str, Any]) -> list[Message]:
    """A system message that lies beside the dialogue."""
    texts = (fields.get(name) for name in SYSTEM_FIELDS)
    return [{"role": "system", "content": text} for text in texts if isinstance(text, str) and text.strip()][:1]


def _tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Descriptions of functions, in the request's own form or as its JSON."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools)
    if isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools):
        return _without_nulls(tools)
    return None


def _check_text(turns: list[Turn]) -> None:
    """JSON can spell half of a character, which no tokenizer takes."""
    try:
        for turn in turns:
            for message in (*turn.asked, *turn.answer):
                message["content"].encode()
    except UnicodeEncodeError:
        raise Unusable("half a character (a lone surrogate)") from None
