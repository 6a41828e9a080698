"""The device's loop: draft, ask, draft on while waiting, and go on alone while the server is away."""

import dataclasses
import time
from collections.abc import Callable

from vllm_ctc_spec.edge.protocol import Device, Policy, Reply, ServerAway, Text, Verifier


@dataclasses.dataclass(frozen=True)
class Patience:
    timeout: float = 10.0
    """Seconds without a word after which the server counts as away."""
    retry: float = 1.0
    """Seconds from a lost round to the next one; doubled for each that is lost after it."""
    longest_retry: float = 30.0
    tries: int = 3
    """Rounds lost one after the other, after which a device that has nothing to add gives up."""

    def pause(self, lost_in_a_row: int) -> float:
        return min(self.retry * 2 ** (lost_in_a_row - 1), self.longest_retry)


class Watcher:
    """Sees a text as it grows."""

    def verified(self, text: Text) -> None:
        """There are more verified tokens."""

    def alone(self, text: Text, reason: str) -> None:
        """The server is away, and the device's drafts are the answer for now: at once, and with each that it adds."""


@dataclasses.dataclass
class Client:
    """A device with its server.

    `clock` and `sleep` are those of `time`, in seconds; tests have their own.
    """

    device: Device
    verifier: Verifier
    policy: Policy = Policy()
    patience: Patience = Patience()
    watcher: Watcher = dataclasses.field(default_factory=Watcher)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def complete(self, text: Text) -> Text:
        """Let the server finish this text with the device's drafts, or the device while the server stays away.

        Returns:
            The same text: finished; or, if the server was still away when the device had nothing to add, with drafts
            behind the verified tokens that nobody has verified.
        """
        lost = 0  # in a row
        while not text.finished:
            while not (self.policy.is_settled(text.drafts) or text.drafted_to_the_end):
                text.extend(self.device)
            try:
                self._round(text)
                lost = 0
            except ServerAway as reason:
                text.lost()
                lost += 1
                if text.drafted_to_the_end and lost >= self.patience.tries:
                    break
                self._alone(text, str(reason), self.clock() + self.patience.pause(lost))
        return text

    def _alone(self, text: Text, reason: str, until: float) -> None:
        self.watcher.alone(text, reason)
        while (left := until - self.clock()) > 0:
            if text.drafted_to_the_end:
                self.sleep(left)
            else:
                text.extend(self.device)
                self.watcher.alone(text, reason)

    def _round(self, text: Text) -> None:
        """One request, from its draft to the last part of its answer.

        Raises:
            ServerAway: the server did not answer to the end. What it said before that stays verified.
        """
        draft, num_tokens = self._request(text)
        text.sent(draft)
        reply = self.verifier.ask([*text.prompt, *text.verified], draft, num_tokens)
        try:
            self._follow(text, reply, num_tokens)
        finally:
            reply.close()

    def _request(self, text: Text) -> tuple[list[int], int]:
        """The draft of the next round, and how many tokens to ask for."""
        if not self.verifier.takes_drafts:
            return [], text.room
        draft = self.policy.sendable(text.drafts)[: text.room]
        return draft, min(max(self.policy.round_tokens, len(draft) + 1), text.room)

    def _follow(self, text: Text, reply: Reply, due: int) -> None:
        """Take the answer's parts as they come. In between draft on, for the next round: it is ready at once if all
        that is on its way turns out to be as the device expects."""
        before, heard = len(text.verified), self.clock()
        while True:
            ahead = len(text.drafts) < due + self.policy.max_draft and not text.drafted_to_the_end
            left = heard + self.patience.timeout - self.clock()
            delta = reply.next(0.0 if ahead else max(left, 0.0))
            if delta is not None:
                heard, due = self.clock(), due - len(delta.tokens)
                text.accept(delta)
                self.watcher.verified(text)
                if delta.closes_round:
                    break
            elif left <= 0:
                raise ServerAway(f"no answer for {self.patience.timeout:g} s")
            elif ahead:
                text.extend(self.device)
        if len(text.verified) == before and not text.ended:
            raise ServerAway("an answer without a token")
