"""`tests/soak.py` finds what is wrong with a server, and nothing wrong with a sound one."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "soak.py"


@pytest.fixture
def fake() -> Iterator[Callable[[str], str]]:
    """fake(what is wrong): the address of a server."""
    servers = []

    def start(fault: str) -> str:
        command = [sys.executable, str(HERE / "fake_soak_server.py"), fault]
        servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return f"http://127.0.0.1:{int(servers[-1].stdout.readline())}"

    yield start
    for server in servers:
        server.kill()
        server.communicate()


def run(*arguments: str, timeout: float = 60) -> tuple[int, dict, str]:
    """Exit status, report and what was printed meanwhile."""
    done = subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


SECONDS = ("--minutes", "0.04", "--hang-seconds", "2", "--seed", "5")


def test_a_sound_server_passes(fake):
    status, report, shown = run("--base-url", fake(""), "--reference-url", fake(""), *SECONDS)
    assert (status, report["faults"]) == (0, [])
    assert report["compared"] > 10 and report["acceptance_length"] == 3
    assert len(report["answers"]) == 12, "some kind of request was never sent"
    assert "seed 5" in shown and "compared" in shown


RARER = [
    ("cut", "expected "),
    ("falls", "fell from"),
    ("fails", "status 500"),
    ("idle", "no drafted token was accepted"),
    ("accepts", "expected 400"),
]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("wrong", "token 1 is 1"),
        ("hang", "no answer within 2 s"),
        ("leak", "not given back when idle: {'vllm:kv_cache_usage_perc': 0.02}"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in RARER),
    ],
)
def test_a_planted_fault_is_found(fault, found, fake):
    status, report, shown = run("--base-url", fake(fault), "--reference-url", fake(""), *SECONDS)
    assert status == 1
    assert any(found in text for text in report["faults"]), report["faults"]
    assert "FAULT at" in shown


def test_a_server_that_is_not_there(fake):
    status, report, _ = run("--base-url", "http://127.0.0.1:9", "--reference-url", fake(""), *SECONDS)
    assert status == 1 and "no vLLM server answers at http://127.0.0.1:9" in report["faults"][0]


def test_half_of_the_addresses(fake):
    done = subprocess.run([sys.executable, str(PROGRAM), "--base-url", "http://x"], capture_output=True, text=True)
    assert done.returncode == 2 and "belong together" in done.stderr


@pytest.fixture(scope="module")
def soak_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak_report", HERE / "soak_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_memory_is_judged_after_the_warm_up(soak_report):
    report = soak_report.Report(seed=0, draft="chain", seconds=400)
    assert report.growth_mib() is None
    report.idle_mib = [(0, 100), (50, 900), (110, 1000), (150, 1002), (190, 1001), (310, 1010), (390, 1012)]
    assert report.growth_mib() == 10
    report.idle_mib[-2:] = [(310, 2000), (390, 2002)]
    assert report.growth_mib() > soak_report.MAX_GROWTH_MIB


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_two_minutes_of_the_embedded_pair(draft):
    """Two servers one after the other and two minutes of traffic: about four minutes."""
    status, report, shown = run("--draft", draft, "--minutes", "2", timeout=580)
    assert (status, report["faults"]) == (0, []), shown
    assert report["compared"] > 50 and report["acceptance_length"] > 2 and report["growth_mib"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_servers(number):
    """A server starts, about half a minute, and is gone when the program has ended."""
    program = subprocess.Popen([sys.executable, str(PROGRAM)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (started := psutil.Process(program.pid).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(program.pid, number)
    assert program.wait(60) not in (0, -number)
    assert started and not [process for process in started if process.is_running()]
