"""The benchmark of edge clients: what is simulated, and what is counted."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import edge
import plots
import pytest
from delay import HOST, delay
from edge import DRAFTS, PROMPTS, STREAM, WHOLE, Cell, SimulatedDevice

from vllm_ctc_spec.edge.server import Server

from ..edge.fake import answer
from ..edge.fake_http import running


@pytest.fixture
def echo():
    """The port of a server that sends back what it gets, and then closes."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while data := connection.recv(100):
                    connection.sendall(data)

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_relay_is_late_and_keeps_the_order(echo):
    with delay(echo, 0.2) as port, socket.create_connection((HOST, port), timeout=20) as connection:
        started, got = time.monotonic(), b""
        for part in (b"one ", b"two ", b"three"):
            connection.sendall(part)
        while len(got) < 13:
            got += connection.recv(100)
        assert got == b"one two three" and time.monotonic() - started >= 0.2
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # the end comes too


def test_without_a_round_trip_there_is_no_relay(echo):
    with delay(echo, 0) as port:
        assert port == echo


@pytest.mark.parametrize("agreement", [0.0, 0.6, 1.0])
def test_a_simulated_device_is_right_as_often_as_it_is_told(agreement):
    prompt, said = [5, 6], [token % 900 for token in range(2000)]
    device = SimulatedDevice(prompt, said, agreement, 0.0, seed=1)
    right = [device.draft(prompt + said[:position]).token == said[position] for position in range(len(said))]
    assert sum(right) / len(right) == pytest.approx(agreement, abs=0.04)
    again = SimulatedDevice(prompt, said, agreement, 0.0, seed=1)
    assert right == [again.draft(prompt + said[:position]).token == said[position] for position in range(len(said))]


def test_a_simulated_device_that_was_wrong_stays_wrong():
    device = SimulatedDevice([1], [2, 3, 4, 5], 1.0, 0.0, seed=1)
    assert [device.draft([1, *said]).token for said in ([], [2], [2, 3])] == [2, 3, 4]
    assert device.draft([1, 9]).token != 3 and device.draft([1, 2, 9]).token != 4


@pytest.mark.parametrize("way", [STREAM, DRAFTS, PROMPTS, WHOLE])
def test_all_clients_get_the_servers_own_answers(way, tmp_path, monkeypatch):
    monkeypatch.setattr(edge, "SETTLE_SECONDS", 0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"question": text}) + "\n" for text in ("ab", "bca", "cc")))
    args = edge.parse(["--max-tokens", "12", "--draft-tokens", "3", "--device-ms", "0", "--prompts", str(prompts)])
    with running() as (url, behaviour):
        port = int(url.rpartition(":")[2])
        steps = iter([3, 10])
        server = SimpleNamespace(port=port, base_url=url, metrics=lambda: {edge.STEPS: next(steps)})
        asked = edge.own_answers(server, args)
        assert [said for _, said in asked] == [answer(prompt, 12) for prompt, _ in asked]
        assert len(Server(url).tokenize(prompt="abc")) == 3
        behaviour.bodies.clear()
        cell = Cell("ctc", way, None if way == STREAM else 1.0, 2, 0)
        row = edge.measure(server, cell, args, asked)
    assert (row.same, row.answers, row.steps) == (8, 8, 7)
    assert row.tokens == sum(len(asked[number % 3][1]) for number in range(8))
    assert (row.drafted > 0) == (way != STREAM) and row.accepted == row.drafted
    rounds = {STREAM: 8, WHOLE: 8}.get(way)
    assert rounds is None and row.rounds > 8 or row.rounds == rounds == len(behaviour.bodies)
    salts = {body["cache_salt"] for body in behaviour.bodies}
    assert len(salts) == 8  # one for each text: no text helps another
    run = {"command": "c", "python": "3", "gpu": None, "cpu": "x", "cores": 2, "date": "2026-11-29"}
    assert edge.table(run, [row]).splitlines()[-1] == f"| {' | '.join(row.row(row if way == STREAM else None))} |"


def test_every_way_is_measured_with_every_agreement_but_the_stream():
    args = edge.parse(["--clients", "1", "2", "--round-trip-ms", "0", "--agreement", "0.5", "0.9"])
    cells = edge.cells(args)
    assert len(cells) == 2 * 2 * (1 + 3 * 2) and len(set(cells)) == len(cells)
    assert {cell.agreement for cell in cells if cell.way == STREAM} == {None}


def test_what_is_compared_takes_turns(monkeypatch, tmp_path):
    """Repeats of one cell are apart; speeds are their medians, relative to the first server's stream."""
    args = edge.parse(["--clients", "1", "4", "--round-trip-ms", "0", "--agreement", "1", "--ways", STREAM, DRAFTS])
    asked_of, seconds = [], {("ctc+client", STREAM): [1, 9, 2], ("client", DRAFTS): [4, 4, 40]}

    def measured(server, cell, args, asked):
        asked_of.append((server, cell))
        turn = sum(other == cell for _, other in asked_of) - 1
        second = seconds.get((cell.sources, cell.way), [5, 5, 5])[turn]
        return edge.Measurement(cell, [second], 20, 10, 4, 3, 2, 1, 1)

    monkeypatch.setattr(edge, "measure", measured)
    monkeypatch.setattr(edge, "own_answers", lambda server, args: [])
    rows = edge.measure_all({"ctc+client": "A", "client": "B"}, args)
    assert [server for server, _ in asked_of[:8]] == ["A", "A", "B", "B"] * 2
    assert {cell.clients for _, cell in asked_of[:12]} == {1} and len(rows) == 8 and len(asked_of) == 24
    (row,) = [row for row in rows if row.cell == edge.Cell("client", DRAFTS, 1.0, 4, 0)]
    assert (row.tokens_per_second, row.tokens, row.answers) == (5, 60, 3)
    assert edge.stream_of(rows, row.cell).tokens_per_second == 10
    assert dict(zip(edge.HEADER, row.row(edge.stream_of(rows, row.cell))))["of the stream's"] == "0.50"
    plots.edge(tmp_path / "edge.png", rows, "title")
    assert (tmp_path / "edge.png").stat().st_size > 1000


def test_a_drafter_is_named_where_it_drafts():
    args = edge.parse(["--nodes", "9", "--speculative-config", '{"ctc_tree_rows": 99}'])
    common = {"method": "ctc", "num_speculative_tokens": 9, "ctc_tree_rows": 99}
    assert edge.speculative_config(args, "client") == {**common, "ctc_sources": "client"}
    both = {**common, "ctc_sources": "ctc+client", "model": str(args.drafter)}
    assert edge.speculative_config(args, "ctc+client") == both
