"""The comparison: what is started, asked, compared and written. The client is vLLM's own; the servers are fake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import serve
from client import read_questions
from methods import NGRAM
from server import Server

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "assets/target"  # its tokenizer is needed
NONE = "none (V2 runner)"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(serve, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(serve, "IDLE_SECONDS", 0.05)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # the rows choose their runner, not the shell
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    monkeypatch.setenv("no_proxy", "")


@pytest.fixture
def run(fake_vllm, pair, tmp_path):
    """Run with three prompts; the status and what was saved."""

    def run(*more: str) -> tuple[int, dict]:
        output = tmp_path / "out" / "small"
        fixed = ["--target", str(TARGET), "--drafter", str(pair[1]), "--output", str(output)]
        fixed += ["--num-prompts", "3", "--repeats", "1", "--concurrency", "1", "--temperature", "0"]
        status = serve.main([*fixed, *more])
        return status, json.loads(output.with_suffix(".json").read_text()) if status == 0 else {}

    return run


def test_writes_all_figures(run, fake_vllm, tmp_path):
    methods = NONE, "ctc tree 16"
    more = ["--methods", *methods, "--concurrency", "1", "2", "--temperature", "0", "1", "--repeats", "2"]
    status, record = run(*more)
    assert status == 0
    measurements = record["measurements"]
    assert len(measurements) == len(methods) * 2 * 2 * 2
    for m in measurements:
        assert (m["requests"], m["tokens"], m["data"]) == (3, 12, "demo")
        assert m["speculative"] is (m["method"] != NONE)
        assert (m["drafts"], m["accepted_per_position"]) == ((6, [3, 0]) if m["speculative"] else (0, []))
        assert m["same_output"] == (3 if m["temperature"] == 0 else None)
        raw = json.loads((tmp_path / "out/small-raw" / m["raw"]).read_text())
        assert raw["generated_texts"] == ["<5><6><7><8>"] * 3
        assert raw["median_ttft_ms"] == m["ttft_ms"] > 0 and raw["median_tpot_ms"] == m["tpot_ms"] > 0
    assert len({m["raw"] for m in measurements}) == len(measurements)
    assert record["run"]["prompts"] == {"demo": 3}
    assert set(record["run"]["idle_cpu_seconds_per_second"]) == set(methods)
    assert str(tmp_path) not in json.dumps(record)
    assert "| demo | 1 | 2 | ctc tree 16 |" in (tmp_path / "out/small.md").read_text()
    for plot in ("speed", "acceptance"):
        assert (tmp_path / f"out/small-{plot}.png").read_bytes().startswith(b"\x89PNG")
    fake_vllm.assert_gone()


def test_requests_are_chat_requests_with_the_settings_given(run, fake_vllm):
    run("--methods", "ngram", "--max-tokens", "9", "--temperature", "0.5", "--concurrency", "1")
    settings = {(r["max_completion_tokens"], r["temperature"], r["model"]) for r in fake_vllm.requests}
    assert settings == {(9, 0.5, "target")}
    asked = [request["messages"][0]["content"] for request in fake_vllm.requests]
    asked = [turn if isinstance(turn, str) else turn[0]["text"] for turn in asked]
    questions = read_questions(ROOT / "benchmarks/demo_prompts.jsonl", 3)
    assert asked == [questions[0], *questions]  # one to warm up; bare: the server applies the chat template


def test_the_methods_take_turns(run):
    _, record = run("--methods", NONE, "ngram", "ctc chain", "--repeats", "2", "--concurrency", "1", "2")
    order = [(m["repeat"], m["method"]) for m in record["measurements"] if m["concurrency"] == 2]
    assert order == [(0, NONE), (0, "ngram"), (0, "ctc chain"), (1, "ngram"), (1, "ctc chain"), (1, NONE)]


def test_one_at_a_time_starts_each_anew(run, fake_vllm, monkeypatch):
    alive, started = [], serve.Comparison.open

    class Watched:
        def __init__(self, server: Server):
            self.server = server

        def __enter__(self):
            alive.append(1 + (alive[-1] if alive else 0))
            return self.server.__enter__()

        def __exit__(self, *error):
            self.server.__exit__(*error)
            alive.append(alive[-1] - 1)

    monkeypatch.setattr(serve.Comparison, "open", lambda self, method: Watched(started(self, method)))
    _, record = run("--methods", NONE, "ngram", "--repeats", "2", "--concurrency", "1", "2", "--one-at-a-time")
    assert alive == [1, 0] * 4
    order = [(m["repeat"], m["method"], m["concurrency"]) for m in record["measurements"]]
    first, second = (NONE, "ngram"), ("ngram", NONE)
    assert order == [(i, m, c) for i, names in enumerate((first, second)) for m in names for c in (1, 2)]
    fake_vllm.assert_gone()


def test_each_method_gets_its_own_server(run, fake_vllm, pair):
    run("--methods", "none (default runner)", NONE, "ngram", "ctc chain", "ctc tree 16", "--concurrency", "6")
    default, v2, ngram, chain, tree = fake_vllm.started
    assert v2["environment"]["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in default["environment"] | ngram["environment"]
    assert json.loads(ngram["arguments"][-1]) == NGRAM
    ctc = {"method": "ctc", "model": str(pair[1])}
    assert json.loads(chain["arguments"][-1]) == {**ctc, "ctc_draft": "chain"}
    assert json.loads(tree["arguments"][-1]) == {**ctc, "ctc_draft": "tree", "num_speculative_tokens": 16}
    for server in fake_vllm.started:
        words = server["arguments"]
        assert "--no-enable-prefix-caching" in words
        limits = [words[i + 1] for i, word in enumerate(words) if word == "--max-num-seqs"]
        assert limits[-1] == "6"  # the last one counts


def test_gpu_memory_is_shared_by_the_servers_at_once(run, fake_vllm, monkeypatch):
    monkeypatch.setattr(serve, "on_cpu", lambda: False)
    run("--methods", NONE, "ngram")
    run("--methods", NONE, "ngram", "--one-at-a-time")
    shares = [s["arguments"][s["arguments"].index("--gpu-memory-utilization") + 1] for s in fake_vllm.started]
    assert shares == ["0.450", "0.450", "0.900", "0.900"]


def test_a_running_server_is_measured_and_left_alone(run, fake_vllm, tmp_path):
    with Server(TARGET, log_path=tmp_path / "log", label="other") as other:
        status, record = run("--base-url", other.base_url, "--label", "theirs")
        assert status == 0
        assert len(other.processes()) == 2
    assert [m["method"] for m in record["measurements"]] == ["theirs"]
    assert record["run"]["methods"] == {"theirs": {"running": True, "vllm": "0.0.fake"}}


def test_a_running_server_that_does_not_answer_is_named(run, capsys):
    assert run("--base-url", "http://127.0.0.1:9", "--label", "theirs")[0] == 1
    assert "no vLLM server answers at http://127.0.0.1:9" in capsys.readouterr().out


def test_a_changed_output_is_counted(run, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "wrong")
    _, record = run("--methods", NONE, "ctc tree 16")
    assert [(m["method"], m["same_output"]) for m in record["measurements"]] == [(NONE, 3), ("ctc tree 16", 0)]


def test_datasets_and_categories_are_rows(run, tmp_path, fake_vllm):
    bench = tmp_path / "bench.jsonl"
    bench.write_text("".join(json.dumps({"category": c, "turns": [f"{c}?", "more?"]}) + "\n" for c in "abc"))
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"question": "one?"}\n\n{"prompt": "two?"}\n')
    more = ["--data", f"mine={mine}", "--spec-bench", str(bench), "--categories", "c", "a"]
    _, record = run("--methods", NONE, "ngram", *more)
    assert [m["data"] for m in record["measurements"][::2]] == ["mine", "c", "a"]
    assert record["run"]["prompts"] == {"mine": 2, "c": 1, "a": 1}
    assert "mine=mine.jsonl --spec-bench bench.jsonl" in record["run"]["command"]
    assert all(m["same_output"] == m["requests"] for m in record["measurements"])


def test_a_server_that_does_not_start_fails_the_run(run, fake_vllm, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "crash")
    assert run()[0] == 1
    assert "out of cheese" in capsys.readouterr().out


def test_requests_that_fail_fail_the_run(run, fake_vllm, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "refuse")
    assert run("--methods", NONE)[0] == 1
    printed = capsys.readouterr().out
    assert "1 of 1 requests" in printed and "the first with: Bad Request" in printed
    fake_vllm.assert_gone()


@pytest.mark.parametrize("busy", [5.0, 80.0])
def test_a_busy_machine_is_written_down(run, monkeypatch, tmp_path, capsys, busy):
    monkeypatch.setattr(serve.psutil, "cpu_percent", lambda seconds: busy)
    assert run("--methods", NONE)[0] == 0
    assert ("do not trust the speeds" in capsys.readouterr().out) is (busy > 20)
    assert f"other programs used {busy:.0f} %" in (tmp_path / "out/small.md").read_text()


@pytest.mark.parametrize(
    "arguments", [("--repeats", "0"), ("--concurrency", "0"), ("--temperature", "-1"), ("--methods", "magic")]
)
def test_impossible_settings_are_refused_at_once(run, fake_vllm, arguments):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert not fake_vllm.started


@pytest.mark.slow
def test_the_embedded_pair(tmp_path):
    """About two minutes: `pytest -m slow tests/benchmarks/test_serve.py`."""
    command = [sys.executable, str(ROOT / "benchmarks/serve.py"), "--output", str(tmp_path / "real"), "--repeats", "1"]
    command += ["--methods", NONE, "ctc chain", "--num-prompts", "2", "--concurrency", "2", "--max-tokens", "40"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}
    subprocess.run(command, check=True, env=environment)
    measurements = json.loads((tmp_path / "real.json").read_text())["measurements"]
    order = [(m["temperature"], m["method"]) for m in measurements]
    assert order == [(t, method) for t in (0, 1) for method in (NONE, "ctc chain")]
    none, chain, *_ = measurements
    assert none["drafts"] == 0 and chain["accepted_tokens"] > 0
    assert sum(chain["accepted_per_position"]) == chain["accepted_tokens"]
    assert chain["same_output"] == none["same_output"] == 2
