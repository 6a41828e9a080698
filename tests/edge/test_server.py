"""What goes over the network, and what is made of every way in which it can go wrong."""

import socket
import time

import pytest
from vllm import envs

import vllm_ctc_spec.edge.server as edge_server
from vllm_ctc_spec.edge.loop import Client, Patience
from vllm_ctc_spec.edge.protocol import Delta, Policy, ServerAway, Text
from vllm_ctc_spec.edge.server import DraftRounds, PromptRounds, Refused, Server, verdict
from vllm_ctc_spec.errors import EdgeError

from .fake import END, VOCABULARY, Clock, FakeDevice, answer
from .fake_http import MAX_MODEL_LEN, MODEL, running

GREEDY = {"temperature": 0.0}
LONG = next([token] for token in range(1000) if len(answer([token], 40)) == 40)
SHORT = next([token] for token in range(1000) if 5 < len(answer([token], 40)) < 20)


@pytest.fixture(scope="module")
def fake():
    with running() as (url, behaviour):
        yield url, behaviour


@pytest.fixture
def server(fake):
    """A server that behaves, and its behaviour."""
    url, behaviour = fake
    behaviour.__init__()
    server = Server(url, timeout=5)
    yield server, behaviour
    server.close()


def complete(rounds, prompt, agreement=0.8, timeout=5.0, tries=3, length=40) -> Text:
    clock = Clock()
    patience = Patience(timeout, retry=0.01, tries=tries)
    client = Client(FakeDevice(clock, agreement), rounds, Policy(4, 0.2, 5), patience)
    return client.complete(Text(prompt, length, {END}))


def everything(reply, wait: float = 5.0) -> list[Delta]:
    parts: list[Delta] = []
    while not parts or not parts[-1].closes_round:
        part = reply.next(wait)
        assert part is not None
        parts.append(part)
    return parts


def test_the_card_is_read(fake):
    for url in (fake[0], fake[0] + "/", fake[0] + "/v1"):
        server = Server(url)
        assert (server.model, server.max_model_len) == (MODEL, MAX_MODEL_LEN)


@pytest.mark.parametrize("rounds", [DraftRounds, PromptRounds])
@pytest.mark.parametrize("prompt", [LONG, SHORT], ids=["cut", "ended"])
@pytest.mark.parametrize("agreement", [0.0, 0.8, 1.0])
def test_the_text_is_the_servers_own(server, rounds, prompt, agreement):
    text = complete(rounds(server[0], GREEDY), prompt, agreement)
    assert (text.verified, text.finished, text.ended) == (answer(prompt, 40), True, prompt == SHORT)
    assert text.counts.lost_rounds == 0
    assert agreement < 1 or text.counts.accepted == text.counts.drafted > 0


def test_a_draft_is_beside_the_prompt(server):
    rounds, (_, behaviour) = DraftRounds(server[0], {"temperature": 0.5, "seed": 3}), server
    parts = everything(rounds.ask(LONG, [1, 2], 4))
    assert [token for part in parts for token in part.tokens] == answer(LONG, 4) and len(parts) == 2
    everything(rounds.ask(LONG, [], 4))
    common = {"model": MODEL, "stream": True, "prompt": LONG, "max_tokens": 4, "return_token_ids": True,
              "temperature": 0.5, "seed": 3}  # fmt: skip
    assert behaviour.bodies == [{**common, "vllm_xargs": {"ctc_draft": [1, 2]}}, common]


def test_one_prompt_for_each_prefix_of_a_draft(server):
    rounds, (_, behaviour) = PromptRounds(server[0], GREEDY), server
    right = answer(LONG, 3)
    (part,) = everything(rounds.ask(LONG, right[:2], 9))
    assert part == Delta(right, True)
    assert behaviour.bodies[0]["prompt"] == [LONG, LONG + right[:1], LONG + right[:2]]
    assert behaviour.bodies[0]["max_tokens"] == 1 and "vllm_xargs" not in behaviour.bodies[0]
    wrong = [next(token for token in range(VOCABULARY) if token != right[0]), right[1]]
    assert everything(rounds.ask(LONG, wrong, 9)) == [Delta(right[:1], True)]


@pytest.mark.parametrize("rounds", [DraftRounds, PromptRounds])
def test_rounds_share_connections(server, rounds):
    """A new one would cost a round trip each, and on https two more."""
    text = complete(rounds(server[0], GREEDY), LONG, 0.5)
    assert text.counts.rounds >= 8 and len(server[1].connections) <= 3


def test_an_idle_connection_is_not_used_again(fake, monkeypatch):
    """The server closes it some time, and the round on its way then would be lost."""
    assert edge_server.IDLE_SECONDS < envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE
    monkeypatch.setattr(edge_server, "IDLE_SECONDS", 1.0)
    url, behaviour = fake
    behaviour.__init__()
    server = Server(url)
    for idle, connections in ((0, 1), (0, 1), (1.5, 2)):
        time.sleep(idle)
        server.tokenize(prompt="a")
        assert len(behaviour.connections) == connections
    server.close()


def test_a_verdict_ends_at_the_first_difference_or_at_the_end():
    one, two, end = Delta([1], True), Delta([2], True), Delta([0], True, True)
    assert verdict([one, two, one], [1, 2]) == Delta([1, 2, 1], True)
    assert verdict([one, two, one], [1, 1]) == Delta([1, 2], True)
    assert verdict([two, one, one], [1, 2]) == Delta([2], True)
    assert verdict([one, end, one], [1, 0]) == Delta([1, 0], True, True)


@pytest.mark.parametrize("in_the_stream", [False, True])
def test_a_server_that_refuses_drafts_is_asked_without_them(server, in_the_stream):
    server, behaviour = server
    behaviour.refuses_drafts, behaviour.refuses_in_the_stream = True, in_the_stream
    rounds = DraftRounds(server, GREEDY)
    text = complete(rounds, LONG, 1.0)
    assert text.verified == answer(LONG, 40) and text.counts.lost_rounds == 0
    assert rounds.refusal == "HTTP 400: unknown key ctc_draft" and text.counts.rounds == 2  # then a stream
    assert sum("vllm_xargs" in body for body in behaviour.bodies) == 1


@pytest.mark.parametrize("ignores", [False, True])
def test_a_server_that_ignores_drafts_is_found_out(server, ignores):
    server, behaviour = server
    behaviour.ignores_drafts = ignores
    rounds = DraftRounds(server, GREEDY)
    rounds.probe(LONG)
    assert rounds.takes_drafts != ignores and rounds.refusal == ("it ignores them" if ignores else None)
    assert complete(rounds, LONG).verified == answer(LONG, 40)
    assert len(behaviour.bodies) == 2 if ignores else len(behaviour.bodies) > 5


@pytest.mark.parametrize("rounds", [DraftRounds, PromptRounds])
@pytest.mark.parametrize("status", [400, 404])
def test_a_request_that_is_wrong_is_no_absence(server, rounds, status):
    server, behaviour = server
    behaviour.status = status
    with pytest.raises(Refused, match=f"HTTP {status}: as it was told"):
        complete(rounds(server, GREEDY), LONG)


@pytest.mark.parametrize("rounds", [DraftRounds, PromptRounds])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_away(server, rounds, status):
    server, behaviour = server
    behaviour.status = status
    text = complete(rounds(server, GREEDY), SHORT)
    assert text.verified == [] and text.unverified and text.counts.lost_rounds >= 3
    with pytest.raises(ServerAway, match=f"HTTP {status}: as it was told"):
        rounds(server, GREEDY).ask(LONG, [1], 3).next(5)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"dies_after": 1}, "peer closed connection"),
        ({"error_after": 1}, "the engine is dead"),
        ({"finish_reason": "abort"}, "gave up"),
        ({"silent_seconds": 0.3}, "timed out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_came_before_a_failure_counts(server, fake, trouble, reason):
    for name, value in trouble.items():
        setattr(server[1], name, value)
    patient = Server(fake[0], timeout=0.1)
    rounds, parts = DraftRounds(patient, GREEDY), []
    reply = rounds.ask(LONG, [], 6)
    with pytest.raises(ServerAway, match=reason):
        while True:
            part = reply.next(5)
            assert part is not None
            parts += part.tokens
    assert parts == answer(LONG, 6)[: len(parts)]
    server[1].__init__()
    text = complete(rounds, LONG)
    assert text.verified == answer(LONG, 40)


def test_a_lost_server_leaves_the_device_alone():
    with running() as (url, _):
        rounds = DraftRounds(Server(url, timeout=1), GREEDY)
    text = complete(rounds, SHORT, 1.0)
    assert (text.verified, text.unverified, text.finished) == ([], answer(SHORT, 40), False)


def test_a_silent_server_costs_one_timeout_a_round(server, fake):
    server[1].silent_seconds = 30
    started = time.monotonic()
    text = complete(DraftRounds(Server(fake[0], timeout=5), GREEDY), SHORT, 1.0, timeout=0.05, tries=2)
    assert not text.finished and text.unverified == answer(SHORT, 40) and text.counts.lost_rounds == 2
    assert time.monotonic() - started < 10


def test_something_else_than_vllm_is_refused(server):
    server, behaviour = server
    behaviour.hides_token_ids = True
    with pytest.raises(EdgeError, match="returns no token ids"):
        complete(DraftRounds(server, GREEDY), LONG)


def test_nobody_there_is_one_sentence():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(EdgeError, match=f"no vLLM server answers at {url} .*: give the URL of one"):
            Server(url, timeout=1)
