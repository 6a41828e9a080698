"""The demo: what passes, what fails, and what it leaves behind."""

from collections.abc import Callable
from pathlib import Path

import client as client_module
import demo
import pair as pair_module
import pytest
from fetch import FetchError
from pair import CHAT, TINY


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


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """The repository has the pairs tiny and chat, and the chat pair's target is to be fetched; `pairs(name)` is one's
    target. The chat pair has no drafter."""
    assets = tmp_path / "assets"
    monkeypatch.setattr(pair_module, "ASSETS", assets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = '[wheel]\nrequirement = "a==1"\nsha256 = "5e"\nmember = "a/b.gguf"\nlicence = "MIT"\n'
    for name, source in ((TINY, ""), (CHAT, wheel)):
        folder = assets / name
        folder.mkdir(parents=True)
        texts = {"note": f"Of {name}.", "target": f"{name}-model", "drafter": "drafter", "prompts": "prompts.jsonl"}
        (folder / "pair.toml").write_text("".join(f'{k} = "{v}"\n' for k, v in texts.items()) + source)
        (folder / "prompts.jsonl").write_text(f'{{"question": "Asked of {name}?"}}\n')
    for folder in (assets / "tiny/tiny-model", assets / "tiny/drafter"):
        make_model(folder)
    monkeypatch.setattr(pair_module, "fetch", lambda wheel, target: make_model(target))
    return lambda name: pair_module.read_pair(name).target


def make_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")


def served(fake_vllm) -> set[str]:
    return {server["arguments"][1] for server in fake_vllm.started}


def run_default(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["demo.py", *arguments])
    return demo.main()


def test_without_a_chat_drafter_the_tiny_pair_is_served_and_nothing_said(fake_vllm, pairs, monkeypatch, capsys):
    assert run_default(monkeypatch) == 0
    assert served(fake_vllm) == {str(pairs(TINY))}
    printed = capsys.readouterr().out
    assert printed.startswith("Of tiny.\n") and "Asked of tiny?" in printed and "chat" not in printed


def test_the_chat_pair_is_the_default_and_the_tiny_one_a_choice(fake_vllm, pairs, tmp_path, monkeypatch, capsys):
    make_model(tmp_path / "assets/chat/drafter")
    assert run_default(monkeypatch) == 0
    assert served(fake_vllm) == {str(pairs(CHAT))}
    printed = capsys.readouterr().out
    assert printed.startswith("Of chat.\n") and "Asked of chat?" in printed
    assert run_default(monkeypatch, "--pair", TINY) == 0
    assert served(fake_vllm) == {str(pairs(CHAT)), str(pairs(TINY))}


def test_a_drafter_alone_is_of_the_tiny_target(fake_vllm, pairs, tmp_path, monkeypatch):
    make_model(tmp_path / "assets/chat/drafter")
    make_model(tmp_path / "mine")
    assert run_default(monkeypatch, "--drafter", str(tmp_path / "mine")) == 0
    assert served(fake_vllm) == {str(pairs(TINY))}
    assert str(tmp_path / "mine") in fake_vllm.started[0]["arguments"][-1]


def test_where_the_chat_target_cannot_be_had_the_tiny_pair_takes_its_place(
    fake_vllm, pairs, tmp_path, monkeypatch, capsys
):
    def fail(wheel, target):
        raise FetchError("the index is closed.")

    make_model(tmp_path / "assets/chat/drafter")
    monkeypatch.setattr(pair_module, "fetch", fail)
    assert run_default(monkeypatch) == 0
    assert served(fake_vllm) == {str(pairs(TINY))}
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "The tiny pair takes the place of the chat pair: the index is closed."
    with pytest.raises(SystemExit, match=r"^error: the index is closed\.$"):
        run_default(monkeypatch, "--pair", CHAT)


def test_prompts_take_the_place_of_the_pairs(pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Mine?"}\n')
    assert run_default(monkeypatch, "--prompts", str(tmp_path / "mine.jsonl")) == 0
    printed = capsys.readouterr().out
    assert "Mine?" in printed and "Asked of" not in printed
