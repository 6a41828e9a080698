"""A fake `vllm` command beside the Python that runs the benchmark, and what is left of it afterwards."""

import json
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import server as server_module

FAKE = Path(__file__).parent / "fake_vllm.py"


class FakeVllm:
    """The servers that were started so far."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    def started(self) -> list[dict]:
        files = sorted(self.folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        return [json.loads(file.read_text()) for file in files]

    @property
    def requests(self) -> list[dict]:
        """The bodies of all requests, by server."""
        return [json.loads(line) for file in self.folder.glob("*.requests") for line in file.read_text().splitlines()]

    def assert_no_process(self) -> None:
        assert self.started
        for server in self.started:
            for pid in server["processes"]:
                assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    def assert_gone(self) -> None:
        """No process and no listening socket of any server is left."""
        self.assert_no_process()
        for server in self.started:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", server["port"])) != 0


@pytest.fixture(autouse=True)
def heeds_interrupts() -> Iterator[None]:
    """A script starts what it runs in the background with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch) -> FakeVllm:
    """The benchmarks find `vllm` beside `sys.executable`: put both into a folder of the test."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    command.chmod(0o755)
    record = tmp_path / "record"
    record.mkdir()
    monkeypatch.setenv("FAKE_RECORD", str(record))
    monkeypatch.setattr(sys, "executable", str(command.parent / "python"))
    return FakeVllm(record)


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def occupied_port(monkeypatch) -> Iterator[int]:
    """The port that every server is given, which another program took after it was found free."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        monkeypatch.setattr(server_module, "free_port", lambda: other.server_port)
        yield other.server_port
        other.shutdown()


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    """Folders that pass for a target and its drafter."""
    folders = tmp_path / "target", tmp_path / "drafter"
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    return folders
