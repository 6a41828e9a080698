"""Server: what it starts, and that it leaves nothing behind whatever happens."""

import json
import os
import signal
import threading
import time

import pytest
import server as server_module
from server import CPU_ARGS, RunningServer, Server, StartupError


def make(tmp_path, **options) -> Server:
    options = {"log_path": tmp_path / "logs" / "server.log", "grace_seconds": 10} | options
    return Server("models/small", **options)


def test_serves_the_target_and_stops(fake_vllm, tmp_path):
    with make(tmp_path, speculative_config={"method": "ctc"}, extra_args=["--seed", "7"]) as server:
        assert len(server.processes()) == 2
    (started,) = fake_vllm.started
    arguments = started["arguments"]
    assert arguments[:2] == ["serve", "models/small"]
    assert arguments[arguments.index("--served-model-name") + 1] == server.model == "small"
    assert json.loads(arguments[arguments.index("--speculative-config") + 1]) == {"method": "ctc"}
    assert arguments[arguments.index("--seed") + 1] == "7"
    fake_vllm.assert_gone()


def test_no_speculative_config_by_default(fake_vllm, tmp_path):
    with make(tmp_path):
        pass
    assert "--speculative-config" not in fake_vllm.started[0]["arguments"]


@pytest.mark.parametrize("cpu", [True, False])
def test_cpu_flags_only_on_a_cpu(fake_vllm, tmp_path, monkeypatch, cpu):
    monkeypatch.setattr(server_module, "on_cpu", lambda: cpu)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    with make(tmp_path):
        pass
    (started,) = fake_vllm.started
    assert (set(CPU_ARGS) <= set(started["arguments"])) is cpu
    assert started["environment"].get("VLLM_CPU_KVCACHE_SPACE") == ("1" if cpu else None)
    assert started["environment"]["HF_HUB_OFFLINE"] == "1"


def test_environment_given_wins_over_the_shell(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    with make(tmp_path, env={"HF_HUB_OFFLINE": "2"}):
        pass
    environment = fake_vllm.started[0]["environment"]
    assert (environment["HF_HUB_OFFLINE"], environment["VLLM_NO_USAGE_STATS"]) == ("2", "0")


def test_metrics_are_summed_over_labels(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    with make(tmp_path, speculative_config={"method": "ctc"}) as server:
        client = server.client()
        client.chat.completions.create(model=server.model, messages=[{"role": "user", "content": "?"}])
        metrics = server.metrics()
    assert metrics["vllm:spec_decode_num_drafts_total"] == 2
    assert metrics["vllm:spec_decode_num_accepted_tokens_per_pos_total[0]"] == 1
    assert metrics["vllm:spec_decode_num_accepted_tokens_per_pos_total[1]"] == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_stops_when_the_body_raises(fake_vllm, tmp_path, error):
    with pytest.raises(error), make(tmp_path):
        raise error
    fake_vllm.assert_gone()


def test_kills_what_ignores_sigterm(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "stubborn")
    with make(tmp_path, grace_seconds=0.5):
        pass
    fake_vllm.assert_gone()


def test_a_second_interrupt_does_not_leave_the_server_behind(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "stubborn")
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), make(tmp_path, grace_seconds=30):
        interrupt.start()
        raise KeyboardInterrupt
    assert time.monotonic() - started < 25
    fake_vllm.assert_gone()


def test_stops_a_child_that_outlives_the_leader(fake_vllm, tmp_path):
    with make(tmp_path) as server:
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        assert len(server.processes()) == 1
    fake_vllm.assert_gone()


def test_a_crash_shows_the_end_of_the_log(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "crash")
    with pytest.raises(StartupError) as failure, make(tmp_path, label="small server"):
        pytest.fail("a crashed server was used")
    message = str(failure.value).splitlines()
    assert message[0].startswith("small server ended with status 1")
    assert message[-1] == "out of cheese"
    assert len(message) == 1 + 30


def test_a_server_that_never_gets_healthy_is_stopped(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "hang")
    with pytest.raises(StartupError, match="not healthy after"), make(tmp_path, startup_seconds=1.5):
        pytest.fail("an unhealthy server was used")
    fake_vllm.assert_gone()


def test_a_port_that_somebody_else_took_is_named_and_not_asked(fake_vllm, occupied_port, tmp_path):
    """The other program answers as a healthy server would."""
    with pytest.raises(StartupError) as failure, make(tmp_path, label="small server"):
        pytest.fail("another program was taken for the server")
    assert str(failure.value) == f"small server: another program has taken port {occupied_port}; start it again."
    fake_vllm.assert_no_process()


def test_an_interrupt_while_starting_stops_the_server(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "hang")

    def interrupt_when_started() -> None:
        while not fake_vllm.started:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt_when_started)
    waiting.start()
    with pytest.raises(KeyboardInterrupt), make(tmp_path):
        pytest.fail("an unhealthy server was used")
    waiting.join()
    fake_vllm.assert_gone()


def test_sigterm_unwinds_the_stack(fake_vllm, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    try:
        server_module.stop_on_sigterm()
        with pytest.raises(SystemExit), make(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)
    fake_vllm.assert_gone()


def test_a_missing_vllm_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(FileNotFoundError, match="vllm"), make(tmp_path):
        pytest.fail("a server that does not exist was used")


def test_a_running_server_says_what_it_serves(fake_vllm, tmp_path):
    with make(tmp_path) as started:
        running = RunningServer(f"{started.base_url}/v1/")
        assert (running.base_url, running.model, running.max_model_len()) == (started.base_url, "small", 256)
        assert running.version() == "0.0.fake"


def test_no_running_server_is_named():
    url = f"http://127.0.0.1:{server_module.free_port()}"
    with pytest.raises(StartupError, match=f"no vLLM server answers at {url}"):
        RunningServer(url)
