"""The demo: what passes, what fails, and what it leaves behind."""

import client as client_module
import demo
import pytest


@pytest.fixture(autouse=True)
def quick_and_contained(fake_vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(demo, "RESULTS", tmp_path / "results")


def run(pair, monkeypatch, *arguments) -> int:
    target, drafter = map(str, pair)
    monkeypatch.setattr("sys.argv", ["demo.py", "--target", target, "--drafter", drafter, *arguments])
    return demo.main()


def test_passes_when_the_tokens_are_equal(fake_vllm, pair, monkeypatch, capsys):
    assert run(pair, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "tokens identical under greedy: yes" in printed
    assert "<5><6><7><8>" in printed  # the streamed answer
    assert "1.50" in printed  # 1 + accepted / drafts, the warm-up request left out
    drafted, plain = fake_vllm.started
    assert drafted["arguments"][1] == plain["arguments"][1] == str(pair[0])
    assert str(pair[1]) in drafted["arguments"][-1]
    assert "--speculative-config" not in plain["arguments"]
    fake_vllm.assert_gone()


@pytest.mark.parametrize(("gap", "status"), [("1", 1), ("0.00005", 0)])
def test_a_difference_fails_unless_it_is_a_tie(pair, monkeypatch, capsys, gap, status):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "wrong")
    monkeypatch.setenv("FAKE_GAP", gap)
    assert run(pair, monkeypatch) == status
    printed = capsys.readouterr().out
    assert "tokens identical under greedy: no" in printed
    assert "differs from token 2 on" in printed


def test_fails_when_nothing_was_drafted(pair, monkeypatch, capsys):
    monkeypatch.setattr(demo, "drafting_since", lambda server, before: client_module.Drafting(0, 0, 0))
    assert run(pair, monkeypatch) == 1
    assert "made no drafts" in capsys.readouterr().out


def test_fails_when_a_server_does_not_start(pair, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "crash")
    assert run(pair, monkeypatch) == 1
    assert "out of cheese" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--serve"]], ids=["demo", "serve"])
def test_a_port_that_somebody_else_took_is_one_sentence(occupied_port, pair, monkeypatch, capsys, arguments):
    assert run(pair, monkeypatch, *arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(
        f"error: server with CTC drafter: another program has taken port {occupied_port}; start it again."
    )


def test_a_missing_pair_is_named(pair, monkeypatch):
    (pair[1] / "config.json").unlink()
    with pytest.raises(SystemExit, match="drafter: config.json is missing"):
        run(pair, monkeypatch)


def test_serve_prints_a_request_and_stops_on_interrupt(fake_vllm, pair, monkeypatch, capsys):
    class Interrupted:
        """The server's process, with Ctrl-C while it is waited for."""

        def __init__(self, process):
            self.process = process

        def wait(self):
            raise KeyboardInterrupt

        def __getattr__(self, name):
            return getattr(self.process, name)

    start = demo.with_drafter

    class Starting:
        def __init__(self, *args, **options):
            self.server = start(*args, **options)

        def __enter__(self):
            self.server.__enter__()
            self.server.process = Interrupted(self.server.process)
            return self.server

        def __exit__(self, *error):
            self.server.__exit__(*error)

    monkeypatch.setattr(demo, "with_drafter", Starting)
    assert run(pair, monkeypatch, "--serve") == 0
    assert "curl http://127.0.0.1:" in capsys.readouterr().out
    (only,) = fake_vllm.started
    assert "--speculative-config" in only["arguments"]
    fake_vllm.assert_gone()


@pytest.mark.parametrize(
    ("left", "right", "position"),
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0)],
)
def test_first_difference(left, right, position):
    assert client_module.first_difference(left, right) == position


def test_the_embedded_prompts_are_many_and_distinct():
    questions = client_module.read_questions(demo.PROMPTS, 1000)
    assert len(questions) == len(set(questions)) == 50
