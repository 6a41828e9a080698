"""Which rows a comparison gets from its options, and which prompts."""

import json

import methods
import prompts
import pytest
import serve
from methods import TRANSFORM


@pytest.fixture
def rows(pair):
    """Names and speculative configurations of the rows, and the sentences about skipped ones."""

    def rows(*more: str) -> tuple[dict, list[str]]:
        chosen, skipped = methods.chosen(serve.parse(["--drafter", str(pair[1]), *more]))
        return {row.name: row.speculative_config for row in chosen}, skipped

    return rows


def checkpoint(folder, **config) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_default_is_short(rows):
    assert tuple(rows()[0]) == methods.DEFAULT_METHODS


def test_all_are_all_that_can_be_had(rows, pair, monkeypatch):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: name)
    found, skipped = rows("--methods", "all")
    assert list(found) == methods.NAMES and not skipped
    assert [name for name in found if "tree" in name] == [f"ctc tree {nodes}" for nodes in (8, 16, 32, 64)]
    assert found["ctc chain, sampled"]["draft_sample_method"] == "probabilistic"
    assert found[TRANSFORM] | {"model": ""} == {
        "method": "ctc", "model": "", "ctc_draft": "tree", "num_speculative_tokens": 16, "ctc_search": "transform",
    }  # fmt: skip


def test_suffix_is_skipped_where_it_is_not_installed(rows, monkeypatch):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    found, skipped = rows("--methods", "suffix", "ngram")
    assert list(found) == ["ngram"]
    assert skipped == ["suffix is skipped: it needs `pip install arctic-inference`."]


def test_the_papers_transform_needs_a_blank(rows, pair):
    (pair[1] / "config.json").write_text('{"lattice": "transitions"}')
    found, skipped = rows("--methods", "all")
    assert TRANSFORM not in found and f"{TRANSFORM} is skipped: the drafter has no blank." in skipped
    with pytest.raises(SystemExit, match="needs a drafter with a blank"):
        rows("--methods", TRANSFORM)


def test_a_drafter_is_needed_only_by_its_rows(rows, pair):
    (pair[1] / "config.json").unlink()
    rows("--methods", "ngram")
    with pytest.raises(SystemExit, match=r"config\.json is missing"):
        rows("--methods", "ctc chain")


def test_other_drafters_are_rows_with_their_own_number_of_tokens(rows, tmp_path):
    speculators = {"proposal_methods": [{"speculative_tokens": 7}]}
    folders = {
        "eagle3": checkpoint(tmp_path / "e"),
        "dflash": checkpoint(tmp_path / "f", block_size=16),
        "dspark": checkpoint(tmp_path / "s", speculators_config=speculators),
    }
    found, _ = rows("--methods", "ngram", *(word for name, folder in folders.items() for word in (f"--{name}", folder)))
    tokens = {"eagle3": 3, "dflash": 15, "dspark": 7}
    assert list(found) == ["ngram", *folders]
    for name, folder in folders.items():
        assert found[name] == {"method": name, "model": folder, "num_speculative_tokens": tokens[name]}
    found, _ = rows("--dspark", checkpoint(tmp_path / "own", block_size=5))
    assert found["dspark"] == {"method": "dspark", "model": str(tmp_path / "own")}  # vLLM reads its block size
    with pytest.raises(SystemExit, match="names no block_size"):
        rows("--dflash", folders["eagle3"])


def test_the_runner_of_other_drafters(pair, tmp_path):
    words = [word for name in methods.FOREIGN for word in (f"--{name}", checkpoint(tmp_path / name, block_size=8))]
    chosen, _ = methods.chosen(serve.parse(["--drafter", str(pair[1]), "--methods", "ngram", *words]))
    assert {row.name: dict(row.env) for row in chosen if row.env} == {
        "dflash": methods.V2_RUNNER,
        "dspark": methods.V2_RUNNER,
    }


def test_any_configuration_can_be_a_row(rows):
    found, _ = rows("--methods", "ngram", "--speculative-config", 'long={"method": "ngram", "prompt_lookup_max": 9}')
    assert found["long"] == {"method": "ngram", "prompt_lookup_max": 9}


@pytest.mark.parametrize("text", ["long", "long=", "long=[1]", '={"method": "ngram"}'])
def test_a_configuration_that_is_none_is_refused(rows, text):
    with pytest.raises(SystemExit, match="takes NAME=JSON"):
        rows("--speculative-config", text)


def test_running_servers_need_names_and_stand_alone(rows):
    assert list(rows("--base-url", "http://a", "--label", "x")[0]) == ["x"]
    assert list(rows("--base-url", "http://a", "--label", "x", "--methods", "ngram")[0]) == ["ngram", "x"]
    with pytest.raises(SystemExit, match="needs a --label"):
        rows("--base-url", "http://a")


def test_two_rows_of_one_name_and_no_rows_are_refused(rows):
    with pytest.raises(SystemExit, match="two rows called ngram"):
        rows("--methods", "ngram", "--speculative-config", 'ngram={"method": "ngram"}')
    with pytest.raises(SystemExit, match="nothing to measure"):
        rows("--methods")


def test_options_name_no_folder(pair):
    chain = next(row for row in methods.own_methods(pair[1]) if row.name == "ctc chain")
    assert chain.options()["speculative_config"] == {"method": "ctc", "model": "drafter", "ctc_draft": "chain"}


def read(*words: str) -> dict[str, list[str]]:
    return {data.name: data.prompts for data in prompts.read(serve.parse(list(words)))}


def test_rows_may_be_questions_prompts_or_turns(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"question": "a"}\n{"prompt": "b"}\n\n{"turns": ["c", "d"]}\n')
    assert read("--data", f"mixed={path}") == {"mixed": ["a", "b", "c"]}
    assert len(read()["demo"]) == 50


def test_the_parts_of_mt_bench_are_one_dataset_that_begins_with_one_of_each(tmp_path):
    parts = prompts.MT_BENCH_PARTS
    rows = [{"category": part, "turns": [f"{part}{i}"]} for part in (*parts, "qa") for i in range(2)]
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read("--spec-bench", str(path), "--categories", "mt_bench", "qa")
    assert found == {"mt_bench": [f"{part}{i}" for i in range(2) for part in parts], "qa": ["qa0", "qa1"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    with pytest.raises(SystemExit, match="has no category mt_bench"):
        read("--spec-bench", str(path), "--categories", "mt_bench")


def test_categories_of_spec_bench_are_datasets(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps({"category": c, "turns": [c + t]}) + "\n" for t in "12" for c in "xy"))
    assert read("--spec-bench", str(path)) == {"x": ["x1", "x2"], "y": ["y1", "y2"]}
    assert read("--spec-bench", str(path), "--categories", "y") == {"y": ["y1", "y2"]}
    with pytest.raises(SystemExit, match="no category z, but x, y"):
        read("--spec-bench", str(path), "--categories", "z")
    with pytest.raises(SystemExit, match="belongs to --spec-bench"):
        read("--categories", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a JSON object in every line"),
        ("[1]", "a JSON object in every line"),
        ("", "a JSON object in every line"),
        ('{"x": 1}', "none of the keys"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        read("--data", f"bad={path}")


def test_data_that_cannot_be_told_apart_or_found_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(SystemExit, match="cannot be read"):
        read("--data", "bad=missing.jsonl")
    with pytest.raises(SystemExit, match="takes NAME=FILE"):
        read("--data", str(path))
    with pytest.raises(SystemExit, match="the same name"):
        read("--data", f"mine={path}", "--data", f"mine={path}")


class Words:
    """A tokenizer of words; its chat template adds one."""

    def apply_chat_template(self, messages, **_):
        return ["user", *messages[0]["content"].split()]


def test_prompts_that_leave_no_room_are_left_out():
    data = prompts.PromptSet("mine", ["a b c", "a b", "a", "b"])
    assert prompts.fitting(data, Words(), room=3, limit=2).prompts == ["a b", "a"]
    with pytest.raises(SystemExit, match="no prompt of mine is short enough: the model has room for 1 tokens"):
        prompts.fitting(data, Words(), room=1, limit=2)


@pytest.mark.parametrize("method", methods.LOSSY)
def test_a_lossy_row_has_no_speed_without_its_cost(rows, method):
    config = json.dumps({"method": "ctc", "model": "d", "rejection_sample_method": method})
    with pytest.raises(SystemExit, match="mine is lossy, .* use benchmarks/quality.py"):
        rows("--speculative-config", f"mine={config}")
