"""Whatever a device drafts and whatever becomes of its rounds: verified tokens are the server's own."""

import random

import pytest

from vllm_ctc_spec.edge.loop import Client, Patience, Watcher
from vllm_ctc_spec.edge.protocol import Delta, Drafted, Policy, Text

from .fake import END, VOCABULARY, Clock, FakeDevice, FakeReply, FakeServer, answer, says

LONG = next([token] for token in range(1000) if len(answer([token], 50)) == 50)  # its answer does not end early
FATES = ("answers", "refuses", "dies", "hangs")


class Wrong:
    """Always drafts another token than the target's, at the edge of the vocabulary or far beyond it."""

    def __init__(self, clock: Clock):
        self.clock, self.rng = clock, random.Random(2)

    def draft(self, tokens):
        self.clock.now += 0.01
        wrong = [token for token in (*range(VOCABULARY), VOCABULARY, 2**31) if token != says(tokens)]
        return Drafted(self.rng.choice(wrong), 1.0)


class Silent:
    def draft(self, tokens):
        return None


DEVICES = {
    "perfect": lambda clock: FakeDevice(clock, 1.0),
    "good": lambda clock: FakeDevice(clock, 0.9),
    "random": lambda clock: FakeDevice(clock, 0.0),
    "wrong": Wrong,
    "silent": lambda clock: Silent(),
    "often at a loss": lambda clock: FakeDevice(clock, 0.7, at_a_loss=0.3),
}


class Log(Watcher):
    """What was verified must stay, and must be the server's own at any time."""

    def __init__(self, expected: list[int]):
        self.expected, self.reasons, self.shown = expected, [], []

    def verified(self, text: Text) -> None:
        assert text.verified == self.expected[: len(text.verified)]

    def alone(self, text: Text, reason: str) -> None:
        self.verified(text)
        self.reasons.append(reason)
        self.shown.append(text.unverified)


def client(device, server, watcher=None, **options) -> Client:
    patience = Patience(timeout=0.5, retry=0.2, longest_retry=1.0, tries=3)
    settings = {"policy": Policy(4, 0.2, 5), "patience": patience, **options}
    clock = server.clock
    return Client(device, server, watcher=watcher or Watcher(), clock=clock, sleep=clock.sleep, **settings)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("troubled", [False, True], ids=["healthy", "troubled"])
def test_the_text_is_the_servers_own(name, troubled):
    for case in range(60):
        rng, clock = random.Random(case), Clock()
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 6))]
        length = rng.randint(1, 40)
        policy = Policy(rng.randint(0, 6), rng.choice([0.0, 0.5]), rng.randint(1, 12))
        fates = [rng.choice(FATES) if troubled and rng.random() < 0.4 else "answers" for _ in range(1000)]
        server = FakeServer(clock, rng, fates.__getitem__)
        expected = answer(prompt, length)
        log = Log(expected)
        # It never gives up: the server comes back.
        patience = Patience(0.5, 0.2, 1.0, tries=10**6)
        device = DEVICES[name](clock)
        text = client(device, server, log, policy=policy, patience=patience).complete(Text(prompt, length, {END}))
        assert (text.verified, text.unverified, text.finished) == (expected, [], True)
        assert text.ended == (expected[-1] == END)
        assert text.counts.rounds + text.counts.lost_rounds == len(server.asked)
        assert bool(log.reasons) == bool(text.counts.lost_rounds)
        assert 0 <= text.counts.accepted <= text.counts.drafted
        assert all(reply.closed for reply in server.replies)
        for tokens, draft, num_tokens in server.asked:
            assert tokens == [*prompt, *expected[: len(tokens) - len(prompt)]]
            assert len(draft) <= policy.max_draft and num_tokens <= length - (len(tokens) - len(prompt))


def test_perfect_drafts_are_all_accepted():
    clock = Clock()
    server, device = FakeServer(clock), FakeDevice(clock, 1.0)
    text = client(device, server, policy=Policy(4, 0.2, 5)).complete(Text(LONG, 50, {END}))
    assert text.counts.rounds == 10 and text.counts.accepted == text.counts.drafted == 40
    assert [len(draft) for _, draft, _ in server.asked] == [4] * 10
    assert device.drafted <= 50  # none twice


def test_a_round_follows_the_one_before_without_a_pause_for_drafting():
    """The device is as fast as the round trip allows: four tokens are drafted within it."""
    clock = Clock()

    class Steady(FakeServer):
        def ask(self, tokens, draft, num_tokens):
            self.asked.append((list(tokens), list(draft), self.clock.now))
            return FakeReply(self.clock, [(self.clock.now + 0.1, Delta(answer(tokens, num_tokens), True))])

    server = Steady(clock)
    client(FakeDevice(clock, 1.0, seconds=0.01), server).complete(Text(LONG, 50, {END}))
    starts = [start for _, _, start in server.asked]
    gaps = [later - earlier for earlier, later in zip(starts, starts[1:])]
    assert len(gaps) == 9 and max(gaps) < 0.12


def test_a_draft_ends_where_the_device_is_not_sure():
    drafts = [Drafted(1, 0.9), Drafted(2, 0.5), Drafted(3, 0.4), Drafted(1, 0.9)]
    assert Policy(8, 0.5).sendable(drafts) == [1, 2]
    assert Policy(8, 0.0).sendable(drafts) == [1, 2, 3, 1]
    assert Policy(1, 0.5).sendable(drafts) == [1]
    assert Policy(8, 0.95).sendable(drafts) == []
    assert [Policy(8, 0.5).is_settled(drafts[:n]) for n in range(5)] == [False, False, False, True, True]
    assert [Policy(1, 0.5).is_settled(drafts[:n]) for n in range(3)] == [False, True, True]
    assert Policy(0, 0.5).is_settled([])


def test_without_a_server_the_device_answers_and_says_so():
    clock = Clock()
    server = FakeServer(clock, fate=lambda number: "refuses")
    log = Log([])
    text = client(FakeDevice(clock, 0.8), server, log).complete(Text([1, 2], 20, {END}))
    assert text.verified == [] and not text.finished
    assert len(text.unverified) == 20 or text.unverified[-1] == END
    assert set(log.reasons) == {"connection refused"} and log.shown[-1] == text.unverified
    assert text.counts.lost_rounds == len(server.asked) >= 3 and text.counts.drafted == 0


def test_what_was_verified_before_the_server_went_stays():
    clock = Clock()
    server = FakeServer(clock, fate=lambda number: "answers" if number < 2 else "hangs")
    log = Log(answer(LONG, 30))
    text = client(FakeDevice(clock, 1.0), server, log).complete(Text(LONG, 30, {END}))
    assert 10 <= len(text.verified) < 30
    assert text.verified + text.unverified == answer(LONG, 30)
    assert set(log.reasons) == {"no answer for 0.5 s"}


def test_a_server_that_returns_verifies_what_was_answered_without_it():
    """The device's own answer is the next draft: what the server confirms stays, the rest is replaced."""
    clock = Clock()
    server = FakeServer(clock, fate=lambda number: "refuses" if number == 0 else "answers")
    log = Log(answer(LONG, 30))
    policy = Policy(64, 0.0, 65)
    text = client(FakeDevice(clock, 1.0, seconds=0.02), server, log, policy=policy).complete(Text(LONG, 30, {END}))
    assert text.verified == answer(LONG, 30) and text.unverified == []
    assert log.shown and log.shown[-1] == server.asked[1][1] == answer(LONG, 30)


def test_a_server_that_takes_no_drafts_streams():
    clock = Clock()
    server = FakeServer(clock, takes_drafts=False, fate=lambda number: "answers" if number else "dies")
    text = client(FakeDevice(clock, 0.9), server).complete(Text(LONG, 30, {END}))
    assert text.verified == answer(LONG, 30) and len(server.asked) == 2
    assert all(draft == [] and len(tokens) - 1 + asked == 30 for tokens, draft, asked in server.asked)


def test_an_answer_without_a_token_is_a_lost_round():
    clock = Clock()

    class Mute(FakeServer):
        def ask(self, tokens, draft, num_tokens):
            self.asked.append((list(tokens), list(draft), num_tokens))
            return FakeReply(self.clock, [(self.clock.now, Delta([], True))])

    server, log = Mute(clock), Log([])
    text = client(Silent(), server, log).complete(Text([1], 5, {END}))
    assert (text.verified, text.finished, len(server.asked)) == ([], False, 3)
    assert set(log.reasons) == {"an answer without a token"}


def test_a_server_that_says_more_than_it_was_asked_for():
    text = Text([1], 3)
    text.accept(Delta([1, 2, 3, 1], True))
    assert text.verified == [1, 2, 3] and text.finished


def test_pauses_between_tries_grow():
    assert [Patience(retry=1, longest_retry=5).pause(n) for n in (1, 2, 3, 4, 9)] == [1, 2, 4, 5, 5]


def test_an_error_that_is_not_the_servers_absence_is_passed_on():
    """A refusal with a sentence, for example."""
    clock = Clock()

    class Refusing(FakeServer):
        def ask(self, tokens, draft, num_tokens):
            raise ValueError("too long")

    with pytest.raises(ValueError, match="too long"):
        client(Silent(), Refusing(clock)).complete(Text([1], 5))
