"""What goes wrong under a running server, and when one starts. docs/operations.md is the table of these drills.

The slow ones start `vllm serve`, about half a minute each on an idle machine.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import openai
import psutil
import pytest
import server as benchmark_server
from server import Server
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.serving import plugin

from .conftest import DRAFTS, Pair

SOON = 60  # seconds in which a client hears of it, and the server ends; few of them on an idle machine
PATIENCE = 15  # seconds of a client that waits in vain


@pytest.fixture
def copied(tiny_pair, tmp_path) -> Pair:
    """A pair that the test may spoil."""
    pair = Pair(tmp_path / "target", tmp_path / "drafter")
    shutil.copytree(tiny_pair.target, pair.target)
    shutil.copytree(tiny_pair.drafter, pair.drafter)
    return pair


@pytest.mark.parametrize("draft", DRAFTS)
def test_an_engine_goes_on_when_target_and_drafter_are_deleted(draft, copied, engine):
    llm = engine(
        copied.target, {"method": "ctc", "model": str(copied.drafter), **DRAFTS[draft]}, enable_prefix_caching=False
    )

    def answers() -> list[list[int]]:
        parameters = SamplingParams(temperature=0, max_tokens=24)
        outputs = llm.generate(["one", "and another"], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    before = answers()
    shutil.rmtree(copied.target)
    shutil.rmtree(copied.drafter)
    drafts = llm.counters["drafts"]
    assert answers() == before and llm.counters["drafts"] > drafts


def test_a_target_that_is_gone_is_named_by_vllm(copied):
    shutil.rmtree(copied.target)
    speculative = {"method": "ctc", "model": str(copied.drafter)}
    with pytest.raises((OSError, ValueError), match=str(copied.target)):
        EngineArgs(str(copied.target), speculative_config=speculative).create_engine_config()


def users_environment(monkeypatch) -> None:
    """No setting of the tests reaches a server."""
    for name in (plugin.V2_VARIABLE, "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def long_answer(server: Server, seconds: float = SOON) -> Iterator[Future[str]]:
    """A request under way: its first token is there. The future is how it ended, for a client with so much patience."""
    client, begun = server.client().with_options(max_retries=0, timeout=seconds), Event()

    def read() -> str:
        asked = {"model": server.model, "prompt": "A farmer has", "max_tokens": 450, "extra_body": {"ignore_eos": True}}
        for chunk in client.completions.create(stream=True, **asked):
            begun.set()
            ending = chunk.choices[0].finish_reason
        return ending

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(read)
        assert begun.wait(SOON)
        yield answer


def short_answer(server: Server) -> str:
    client = server.client().with_options(max_retries=0, timeout=SOON)
    asked = {"model": server.model, "prompt": "A farmer has", "max_tokens": 20, "temperature": 0}
    return client.completions.create(**asked).choices[0].text


def left(processes: list[psutil.Process], seconds: float = SOON) -> set[str]:
    """Names of those that have not ended by then."""
    alive = psutil.wait_procs(processes, timeout=seconds)[1]
    return {process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE}


def kill_and_see(server: Server, name: str) -> None:
    """SIGKILL for the process of that name in the midst of a request: the client hears of it, so does the next one, and
    the whole server ends by itself."""
    with long_answer(server) as answer:
        processes = server.processes()
        (victim,) = [process for process in processes if process.name() == name]
        victim.kill()
        with pytest.raises(openai.APIError):
            answer.result()
    with pytest.raises(openai.APIError):
        short_answer(server)
    server.process.wait(timeout=SOON)
    assert not left(processes)
    assert "EngineDeadError" in server.log_path.read_text(encoding="utf-8", errors="replace")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_engine_or_worker_ends_the_server_and_the_next_one_serves(demo_pair, tmp_path, monkeypatch):
    users_environment(monkeypatch)
    drafter = {"method": "ctc", "model": str(demo_pair.drafter), "ctc_draft": "tree", "num_speculative_tokens": 8}
    said = []
    for victim in ("VLLM::Worker", "VLLM::EngineCore"):
        options = {"log_path": tmp_path / f"{len(said)}.log", "extra_args": ("--max-model-len", "512")}
        with Server(demo_pair.target, drafter, **options) as server:
            said.append(short_answer(server))
            kill_and_see(server, victim)
    assert said[0] and said[0] == said[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_signals_to_the_api_server_and_a_new_one_on_its_port(demo_pair, tmp_path, monkeypatch):
    """Three servers one after the other, about two minutes on an idle machine."""
    users_environment(monkeypatch)
    port = benchmark_server.free_port()
    monkeypatch.setattr(benchmark_server, "free_port", lambda: port)
    drafter = {"method": "ctc", "model": str(demo_pair.drafter), "ctc_draft": "tree", "num_speculative_tokens": 8}

    def start(name: str, *options: str) -> Server:
        options = ("--max-model-len", "512", *options)
        return Server(demo_pair.target, drafter, extra_args=options, log_path=tmp_path / name)

    with start("terminated") as server:
        said = short_answer(server)
        with long_answer(server, PATIENCE) as answer:
            processes = server.processes()
            server.process.terminate()
            # vLLM ends the engine without a word to the client, and the API server waits for the client to give up.
            with pytest.raises(openai.APIError):
                answer.result()
        assert server.process.wait(timeout=SOON) == 0 and not left(processes)
    with start("killed") as server:
        assert short_answer(server) == said
        with long_answer(server) as answer:
            processes = server.processes()
            server.process.kill()
            with pytest.raises(openai.APIConnectionError):
                answer.result(timeout=PATIENCE)
        assert {"VLLM::EngineCore", "VLLM::Worker"} <= left(processes, PATIENCE)
        # What is left holds memory, and not the port.
        with start("drained", "--shutdown-timeout", "60") as server:
            assert short_answer(server) == said
            with long_answer(server) as answer:
                processes = server.processes()
                server.process.terminate()
                assert answer.result() == "length"
            assert server.process.wait(timeout=SOON) == 0 and not left(processes)


@pytest.mark.slow
def test_a_port_that_is_taken_ends_vllm_serve_before_anything_loads(demo_pair, tmp_path, monkeypatch):
    users_environment(monkeypatch)
    log = tmp_path / "log"
    with socket.socket() as taken, log.open("wb") as output:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [str(Path(sys.executable).parent / "vllm"), "serve", str(demo_pair.target), "--dtype=float32"]
        command += ["--enforce-eager", "--host=127.0.0.1", f"--port={taken.getsockname()[1]}"]
        command += ["--speculative-config", f'{{"method": "ctc", "model": "{demo_pair.drafter}"}}']
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            assert server.wait(timeout=120) != 0
            left = [process.pid for process in psutil.process_iter() if is_of_session(process, server.pid)]
        finally:
            try:
                os.killpg(server.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # as it should be: nobody is left
    text = log.read_text(errors="replace")
    assert "Address already in use" in text and "Loading safetensors" not in text and "EngineCore" not in text
    assert not left


def is_of_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
