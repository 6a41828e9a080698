"""What a device and a server say to each other, and who is right. No network, no model, no clock.

The server's word is final. A text is the prompt, then tokens that the server has said (*verified*), then tokens that
the device drafts behind them. A *round* is one request: "continue the prompt and the verified tokens; I expect these
drafts". Whatever the server answers becomes verified; drafts that it confirms are dropped from the front of the
device's, and the first that it does not takes all behind it along. So whatever the drafts were, and however often a
round was lost, the verified tokens are those that the server gives to one uninterrupted request: greedy, and sampled
with a seed where the server's draw depends on text, seed and position alone (Model Runner V2 without drafts, or with
trees).
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol


class Drafted(NamedTuple):
    """One token of the device, and how sure the device is that the server says it too, 0 to 1."""

    token: int
    confidence: float


class Device(Protocol):
    """A small model, or anything else that guesses the next token."""

    def draft(self, tokens: Sequence[int]) -> Drafted | None:
        """The token after these, prompt included; None where the device has no guess."""
        ...


class Delta(NamedTuple):
    """A part of the server's answer to one round. All parts together hold a token at least, or end the text."""

    tokens: Sequence[int]
    closes_round: bool = False
    ends_text: bool = False  # the server has nothing more to say: end of text, or no room left


class ServerAway(Exception):
    """No answer: no connection, a time-out, a server that failed. A later try may succeed."""


class Reply(Protocol):
    """The answer to one round, as it comes."""

    def next(self, wait: float) -> Delta | None:
        """The next part; None if there is none after `wait` seconds.

        Raises:
            ServerAway: the answer will not come.
        """
        ...

    def close(self) -> None:
        """No longer wanted. Idempotent."""
        ...


class Verifier(Protocol):
    """The server's side of a round."""

    @property
    def takes_drafts(self) -> bool:
        """Whether a draft can make an answer faster. If not, one round gets all of it: a stream."""
        ...

    def ask(self, tokens: Sequence[int], draft: Sequence[int], num_tokens: int) -> Reply:
        """Ask for the server's continuation of `tokens`, at most `num_tokens` (at least one) of it.

        `draft` is what the device expects: it may change how fast the answer comes, never what it says.

        Raises:
            ServerAway: as in `Reply.next`.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a device drafts and asks for. It decides speed alone."""

    max_draft: int = 8
    min_confidence: float = 0.3
    """A draft ends before a token that the device is less sure of."""
    round_tokens: int = 9
    """Tokens that a round asks for."""

    def sendable(self, drafts: Sequence[Drafted]) -> list[int]:
        """The draft of the next round: as long as the device is sure of it."""
        draft: list[int] = []
        for drafted in drafts[: self.max_draft]:
            if drafted.confidence < self.min_confidence:
                break
            draft.append(drafted.token)
        return draft

    def is_settled(self, drafts: Sequence[Drafted]) -> bool:
        """Whether further drafts would not change what is sent."""
        return len(self.sendable(drafts)) == self.max_draft or len(drafts) > len(self.sendable(drafts))


@dataclasses.dataclass
class Counts:
    rounds: int = 0  # that were answered to the end
    lost_rounds: int = 0
    drafted: int = 0  # tokens that were sent as drafts in rounds that were answered
    accepted: int = 0  # of them


@dataclasses.dataclass
class Text:
    """One answer in the making."""

    prompt: Sequence[int]
    max_tokens: int
    end_tokens: Collection[int] = ()
    """Tokens that end a text. The device stops drafting behind one; whether the text ends is the server's to say."""
    verified: list[int] = dataclasses.field(default_factory=list)
    drafts: list[Drafted] = dataclasses.field(default_factory=list)
    ended: bool = False  # the server has said so
    at_a_loss: bool = False  # the device has no guess for the next token
    counts: Counts = dataclasses.field(default_factory=Counts)
    _in_question: list[int] = dataclasses.field(default_factory=list)  # sent drafts that are neither accepted nor not

    @property
    def tokens(self) -> list[int]:
        """Prompt, verified tokens, drafts."""
        return [*self.prompt, *self.verified, *self.unverified]

    @property
    def unverified(self) -> list[int]:
        return [drafted.token for drafted in self.drafts]

    @property
    def room(self) -> int:
        """Tokens that the server may still say."""
        return self.max_tokens - len(self.verified)

    @property
    def finished(self) -> bool:
        return self.ended or self.room <= 0

    @property
    def drafted_to_the_end(self) -> bool:
        """Whether the device has nothing to add."""
        at_end = bool(self.drafts) and self.drafts[-1].token in self.end_tokens
        return at_end or self.at_a_loss or len(self.drafts) >= self.room

    def extend(self, device: Device) -> None:
        """Draft one token more; not to be called when `drafted_to_the_end`."""
        drafted = device.draft(self.tokens)
        if drafted is None:
            self.at_a_loss = True
        else:
            self.drafts.append(drafted)

    def sent(self, draft: Iterable[int]) -> None:
        """A round with this draft is on its way."""
        self._in_question = list(draft)
        self.counts.drafted += len(self._in_question)

    def lost(self) -> None:
        """The round on its way will not be answered to the end. What was answered counts."""
        self.counts.lost_rounds += 1
        self.counts.drafted -= len(self._in_question)
        self._in_question = []

    def accept(self, delta: Delta) -> None:
        """Take a part of the server's answer."""
        tokens = list(delta.tokens)[: self.room]
        confirmed = common_length(tokens, self._in_question)
        self.counts.accepted += confirmed
        # Behind the first difference nothing of the draft is in question any more: it was wrong.
        self._in_question = self._in_question[confirmed:] if confirmed == len(tokens) else []
        agreed = common_length(tokens, self.unverified)
        self.drafts = self.drafts[agreed:] if agreed == len(tokens) else []
        self.verified += tokens
        self.at_a_loss = self.at_a_loss and not tokens
        if delta.closes_round:
            self._in_question = []
            self.counts.rounds += 1
        if delta.ends_text:
            self.ended = True
        if self.finished:
            self.drafts = []


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = 0
    for a, b in zip(left, right):
        if a != b:
            break
        length += 1
    return length
