"""`tests/soak.py` finds what is wrong with a server, and nothing wrong with a sound one."""

import contextlib
import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import httpx
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


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_two_minutes_of_the_embedded_pair(draft):
    """One for each kind of draft, with two servers one after the other: about two and a half minutes each."""
    status, report, shown = run("--draft", draft, "--minutes", "1", timeout=580)
    assert (status, report["faults"]) == (0, []), shown
    assert report["compared"] > 50 and report["acceptance_length"] > 2 and report["growth_mib"] is not None


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupt(program: subprocess.Popen, number: int) -> dict:
    """The report that the program prints after the signal."""
    program.send_signal(number)
    printed, shown = program.communicate(timeout=60)
    assert program.returncode == 1, shown
    report = json.loads(printed.splitlines()[-1])
    assert report["faults"] == ["interrupted"], shown
    assert "soak, " in shown and "acceptance length" in shown and "Traceback" not in shown
    return report


@SIGNALS
def test_a_signal_in_the_midst_of_traffic_ends_in_a_report(number, fake):
    """Some requests are under way for certain, and their end is no fault of the server's."""
    url = fake("hang")
    program = start("--base-url", url, "--reference-url", fake(""), "--minutes", "5")
    try:
        deadline = time.monotonic() + 60
        while counted(url) < 30:
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        report = interrupt(program, number)
    finally:
        program.kill()
        program.wait()
    assert sum(report["answers"].values()) > 10 and 0 < report["seconds"] < 100


def counted(url: str) -> int:
    """Requests that a fake server has answered."""
    with httpx.Client(trust_env=False) as client:
        text = client.get(f"{url}/metrics").text
    return int(re.search(r"num_drafts_total (\d+)", text)[1])


@pytest.mark.slow
@SIGNALS
def test_a_signal_stops_the_servers(number):
    """A server starts, about half a minute, and is gone when the program has ended."""
    program, servers = start(), []
    try:
        deadline = time.monotonic() + 60
        while not servers and time.monotonic() < deadline:
            time.sleep(0.1)
            servers = psutil.Process(program.pid).children(recursive=True)
        report = interrupt(program, number)
        left = [process for process in servers if process.is_running()]
    finally:
        program.kill()
        program.wait()
        for process in servers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert report["seconds"] == 0 and not report["answers"]
    assert servers and not left
