"""Prompts from rows, as the target reads them: the usable ones, and the held-out ones among them."""

import array
import dataclasses
import datetime
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.conversations import Conversation
from vllm_ctc_spec.training.prompt_files import SUFFIXES, prompt_files
from vllm_ctc_spec.training.rows import FIELD_NAMES, Dialogue, LeftOut, Message, Row, Turn, read_rows
from vllm_ctc_spec.training.target import TargetText

# The date for chat templates that print it: a run that is continued on another day has the same prompts.
TODAY = datetime.datetime(2026, 1, 1)

TOO_LONG = "longer than the target's positions"
DUPLICATE = "the same as one before"
REFUSED = "refused by the target's chat template"
NO_TOKEN = "with a token that the model lacks"
ROOM_OF_A_TURN = 64  # tokens of a chat template around the messages of one
UNANSWERED = "the file has no answer before them, which --regenerate lets the target give"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The usable rows, in file order."""

    train: list[Conversation]
    held_out: list[Conversation]
    left_out: LeftOut = dataclasses.field(default_factory=LeftOut)
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def regenerate(self) -> bool:
        """Whether conversations go on with the target's own answers."""
        return any(conversation.regenerate is not None for conversation in self.train + self.held_out)

    def report(self) -> str:
        usable = f"{amount(self.train, 'prompts')} for training, {amount(self.held_out)} held out."
        return self.left_out.below(usable)


def amount(conversations: Sequence[Conversation], what: str = "") -> str:
    """The number of prompts, and of conversations if these are fewer."""
    num_prompts = sum(conversation.num_answers for conversation in conversations)
    rows = len(conversations)
    among = f" in {rows} conversation{'s' * (rows != 1)}" if num_prompts != rows else ""
    return f"{num_prompts} {what}".rstrip() + among


class LeaveOut(ValueError):
    """Why a prompt is left out; is_final: and with it all that go on from it."""

    def __init__(self, reason: str, detail: str = "", is_final: bool = False):
        super().__init__(reason)
        self.reason, self.detail, self.is_final = reason, detail, is_final


@dataclasses.dataclass(frozen=True)
class PromptBuilder:
    """Dialogues to token ids, for one target."""

    text: TargetText
    max_length: int  # positions of a prompt and its response
    max_new_tokens: int
    chat_template_kwargs: dict[str, Any] | None = None

    def token_ids(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The prompt after which the target answers these messages (LeaveOut)."""
        tokenizer, given = self.text.tokenizer, {"tools": tools} if tools else {}
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                strftime_now=TODAY.strftime,
                **given,
                **self.chat_template_kwargs or {},
            )
            ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        except Exception as error:  # a template is the target's own program, which may raise anything
            reason = (str(error).strip().splitlines() or [""])[0]
            raise LeaveOut(REFUSED, f", {type(error).__name__}: {reason.rstrip('.')}") from error

        vocab_size = self.text.config.get_text_config().vocab_size
        unknown = next((token for token in ids if token >= vocab_size), None)
        if unknown is not None:  # such as one that somebody has added to the tokenizer alone
            token = tokenizer.convert_ids_to_tokens(unknown)
            raise LeaveOut(NO_TOKEN, f", {token!r}, number {unknown} of {vocab_size}")
        return ids

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether there is room for a response in the target's positions."""
        return 0 < len(ids) <= self.max_length - min(self.max_new_tokens, self.max_length // 2)

    def follow(self, dialogue: Dialogue, responses: Sequence[list[int]]) -> list[int] | None:
        """The prompt of the turn behind these responses of the target; None behind the last, or where it does not fit
        or is refused. Calls of tools, whose results come next in the file, stay as they are there."""
        if len(responses) == len(dialogue.turns):
            return None
        messages: list[Message] = []
        for turn, following, response in zip(dialogue.turns, dialogue.turns[1:], responses):
            messages += [*turn.asked, *(turn.answer if _calls_tools(following) else [self._answer(response)])]
        try:
            ids = self.token_ids([*messages, *dialogue.turns[len(responses)].asked], dialogue.tools)
        except LeaveOut:
            return None
        return ids if self.fits(ids) else None

    def _answer(self, response: list[int]) -> Message:
        """As a client sends it back."""
        return {"role": "assistant", "content": self.text.tokenizer.decode(response, skip_special_tokens=True)}

    def longest(self, conversations: Iterable[Conversation]) -> int:
        """Tokens that the longest prompt may have. The target's own earlier answers count as `max_new_tokens` each."""
        lengths = [0]
        for conversation in conversations:
            lengths += map(len, conversation.prompts)
            if (dialogue := conversation.regenerate) is not None:
                following = list(zip(dialogue.turns, dialogue.turns[1:]))
                texts = [m["content"] for _, turn in following for m in turn.asked]
                texts += [m["content"] for turn, after in following if _calls_tools(after) for m in turn.answer]
                words = sum(map(len, self.text.tokenizer(texts, add_special_tokens=False).input_ids))
                later = (self.max_new_tokens + ROOM_OF_A_TURN) * len(following)
                lengths.append(len(conversation.prompts[0]) + words + later)
        return min(self.max_length, max(lengths))


def _calls_tools(following: Turn) -> bool:
    """Whether the answer before this turn called tools."""
    return following.asked[0]["role"] == "tool"


class _Reading:
    """Conversations from rows, and what of them is left out."""

    def __init__(self, build: PromptBuilder, regenerate: bool):
        self._build, self._regenerate = build, regenerate
        self._seen: set[bytes] = set()
        self.left_out = LeftOut()

    def conversation(self, row: Row) -> Conversation | None:
        """None if nothing of the row can be used."""
        if row.dialogue is None:
            self.left_out.add("row", row.problem, row.place)
            return None
        if self._regenerate:
            return self._to_regenerate(row.dialogue, row.place)
        return self._as_given(row.dialogue, row.place)

    def _as_given(self, dialogue: Dialogue, place: str) -> Conversation | None:
        """A prompt for each answer, behind the dialogue as it stands in the file."""
        messages: list[Message] = []
        prompts, numbers = [], []
        for index, (turn, number) in enumerate(zip(dialogue.turns, dialogue.user_turns())):
            messages += turn.asked
            try:
                ids = self._usable(messages, dialogue.tools)
            except LeaveOut as problem:
                rest = len(dialogue.turns) - index
                self.left_out.add("prompt", problem.reason, place + problem.detail, rest if problem.is_final else 1)
                if problem.is_final:
                    break
            else:
                prompts.append(ids)
                numbers.append(number)
            if not turn.answer:
                if rest := len(dialogue.turns) - index - 1:
                    self.left_out.add("later turn", UNANSWERED, place, rest)
                break
            messages += turn.answer
        return Conversation(prompts, numbers) if prompts else None

    def _to_regenerate(self, dialogue: Dialogue, place: str) -> Conversation | None:
        try:
            ids = self._usable(dialogue.turns[0].asked, dialogue.tools)
        except LeaveOut as problem:
            self.left_out.add("row", problem.reason, place + problem.detail)
            return None
        return Conversation([ids], dialogue.user_turns()[:1], dialogue if len(dialogue.turns) > 1 else None)

    def _usable(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        """LeaveOut if this is no prompt."""
        ids = self._build.token_ids(messages, tools)
        if not self._build.fits(ids):
            raise LeaveOut(TOO_LONG, is_final=True)
        digest = hashlib.blake2b(array.array("q", ids).tobytes(), digest_size=16).digest()
        if digest in self._seen:
            raise LeaveOut(DUPLICATE)
        self._seen.add(digest)
        return ids


def usable_conversations(
    rows: Iterable[Row], build: PromptBuilder, regenerate: bool = False, limit: int | None = None
) -> tuple[list[Conversation], LeftOut]:
    """The usable rows, at most `limit` of them; nothing behind the last of these is counted as left out."""
    reading, found = _Reading(build, regenerate), []
    for row in tqdm(rows, desc="tokens of the prompts", unit="row", delay=2):
        conversation = reading.conversation(row)
        if conversation is not None:
            found.append(conversation)
        if len(found) == limit:
            break
    return found, reading.left_out


def read_prompts(path: str, build: PromptBuilder, held_out: int, regenerate: bool = False) -> Prompts:
    """Prompts of a file or folder. `held_out` usable rows, at most a tenth of them, are never trained on: the last ones
    of a file, and of a folder as many in each part of it."""
    conversations, left_out = usable_conversations(read_rows(path), build, regenerate)
    for file in prompt_files(Path(path))[1]:
        left_out.add("file", f"its name ends with none of {', '.join(SUFFIXES)}", file.name)
    if len(conversations) < 2:
        raise TrainingError(
            f"{path} has {len(conversations)} usable rows, and training needs two or more; each row needs one of the "
            f"fields {FIELD_NAMES} and must fit the target's {build.max_length} positions{left_out}."
        )
    count, total = max(1, min(held_out, len(conversations) // 10)), len(conversations)
    if Path(path).is_dir():
        last = {(index + 1) * total // count - 1 for index in range(count)}  # of each of as many equal parts
    else:
        last = set(range(total - count, total))
    parts = ([c for row, c in enumerate(conversations) if (row in last) == held] for held in (False, True))
    return Prompts(*parts, left_out, build.chat_template_kwargs)
