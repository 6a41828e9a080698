"""A server that says what a function of the text says, a device that knows it more or less, and a clock for both."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_ctc_spec.edge.protocol import Delta, Drafted, ServerAway

VOCABULARY = 4  # so few that wrong drafts are right now and then
END = 0


def says(tokens: Sequence[int]) -> int:
    """The target: its next token, a function of everything before it. About one token in 40 ends the text."""
    digest = hashlib.sha256(bytes(token % 256 for token in tokens)).digest()
    return END if digest[0] < 6 else 1 + digest[1] % (VOCABULARY - 1)


def answer(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The server's own: what one uninterrupted request gets."""
    tokens: list[int] = []
    while len(tokens) < max_tokens and (not tokens or tokens[-1] != END):
        tokens.append(says([*prompt, *tokens]))
    return tokens


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


class Nobody(Exception):
    """The fake server hangs for ever."""


@dataclass
class FakeReply:
    """Parts of an answer with the times at which they come."""

    clock: Clock
    parts: list[tuple[float, Delta | Exception]]
    closed: bool = False

    def next(self, wait: float) -> Delta | None:
        assert not self.closed
        at = self.parts[0][0] if self.parts else float("inf")
        if at > self.clock.now + wait:
            self.clock.now += wait
            return None
        self.clock.now = max(self.clock.now, at)
        part = self.parts.pop(0)[1]
        if isinstance(part, Exception):
            raise part
        return part

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeServer:
    """Answers in parts of random sizes. `fate(round)` is "answers", "refuses" (no connection), "dies" (in mid-answer)
    or "hangs" (in mid-answer)."""

    clock: Clock
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    fate: Callable[[int], str] = lambda number: "answers"
    round_trip: float = 0.1
    takes_drafts: bool = True
    asked: list[tuple[list[int], list[int], int]] = field(default_factory=list)
    replies: list[FakeReply] = field(default_factory=list)

    def ask(self, tokens: Sequence[int], draft: Sequence[int], num_tokens: int) -> FakeReply:
        assert num_tokens >= 1 and len(draft) <= num_tokens
        fate = self.fate(len(self.asked))
        self.asked.append((list(tokens), list(draft), num_tokens))
        if fate == "refuses":
            raise ServerAway("connection refused")
        left, at, parts = answer(tokens, num_tokens), self.clock.now, []
        while left:
            size = self.rng.randint(1, len(left))
            part, left = left[:size], left[size:]
            at += self.rng.random() * self.round_trip
            parts.append((at, Delta(part, not left, not left and part[-1] == END)))
        if fate != "answers":
            parts = parts[: self.rng.randrange(len(parts))]
        if fate == "dies":
            parts.append((at, ServerAway("connection reset")))
        self.replies.append(FakeReply(self.clock, parts))
        return self.replies[-1]


@dataclass
class FakeDevice:
    """Drafts what the target would say with probability `agreement`, else any token; sure of itself at random."""

    clock: Clock
    agreement: float
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    seconds: float = 0.01  # a token
    at_a_loss: float = 0.0  # how often it has no guess
    drafted: int = 0

    def draft(self, tokens: Sequence[int]) -> Drafted | None:
        self.clock.now += self.seconds
        self.drafted += 1
        if self.rng.random() < self.at_a_loss:
            return None
        token = says(tokens) if self.rng.random() < self.agreement else self.rng.randrange(VOCABULARY)
        return Drafted(token, 1.0 if self.agreement == 1 else self.rng.random())
