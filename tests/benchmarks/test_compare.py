"""The side-by-side run: interleaving, figures and files."""

import json

import compare
import pytest
from report import Measurement, describe_run, summarize, to_markdown


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compare, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(compare, "IDLE_SECONDS", 0.05)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # the rows choose their runner, not the shell


def arguments(pair, tmp_path, *more) -> list[str]:
    target, drafter = map(str, pair)
    fixed = ["--target", target, "--drafter", drafter, "--output", str(tmp_path / "out" / "small")]
    return [*fixed, "--num-prompts", "3", "--repeats", "2", "--concurrency", "1", "2", *more]


def measurement(method="ctc", concurrency=1, repeat=0, seconds=1.0, tokens=10, drafts=0, accepted=0, same=1):
    return Measurement(method, concurrency, repeat, seconds, tokens, drafts, drafts * 4, accepted, same)


def test_writes_all_figures(fake_vllm, pair, tmp_path):
    assert compare.main(arguments(pair, tmp_path)) == 0
    record = json.loads((tmp_path / "out" / "small.json").read_text())
    assert len(record["measurements"]) == len(compare.DEFAULT_METHODS) * 2 * 2
    rows = {(row["method"], row["concurrency"]): row for row in record["rows"]}
    assert rows["ctc chain", 1]["acceptance_length"] == 1.5
    assert rows["none (V2 runner)", 2]["acceptance_length"] is None
    assert all(row["same_output"] == 3 for row in rows.values())
    assert record["run"]["num_prompts"] == 3
    assert set(record["run"]["idle_cpu_seconds_per_second"]) == {row["method"] for row in record["rows"]}
    assert "| 2 | ctc tree 16 |" in (tmp_path / "out" / "small.md").read_text()
    assert (tmp_path / "out" / "small.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (tmp_path / "out" / "small.json").read_text()
    fake_vllm.assert_gone()


def test_the_methods_take_turns(fake_vllm, pair, tmp_path):
    compare.main(arguments(pair, tmp_path, "--methods", "none (default runner)", "ngram", "ctc chain"))
    measurements = json.loads((tmp_path / "out" / "small.json").read_text())["measurements"]
    order = [(m["repeat"], m["method"]) for m in measurements if m["concurrency"] == 1]
    none, ctc = "none (default runner)", "ctc chain"
    assert order == [(0, none), (0, "ngram"), (0, ctc), (1, "ngram"), (1, ctc), (1, none)]


def test_each_method_gets_its_own_server(fake_vllm, pair, tmp_path):
    compare.main(arguments(pair, tmp_path))
    default, v2, ngram, chain, tree = fake_vllm.started
    assert v2["environment"]["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert "VLLM_USE_V2_MODEL_RUNNER" not in default["environment"] | ngram["environment"]
    assert json.loads(ngram["arguments"][-1]) == compare.NGRAM
    ctc = {"method": "ctc", "model": str(pair[1])}
    assert json.loads(chain["arguments"][-1]) == {**ctc, "ctc_draft": "chain"}
    assert json.loads(tree["arguments"][-1]) == {**ctc, "ctc_draft": "tree", "num_speculative_tokens": 16}


def test_the_papers_transform_is_a_row_where_the_drafter_has_a_blank(fake_vllm, pair, tmp_path):
    compare.main(arguments(pair, tmp_path, "--methods", "ctc transform 16", "--concurrency", "1", "--repeats", "1"))
    given = json.loads(fake_vllm.started[0]["arguments"][-1])
    assert (given["ctc_search"], given["num_speculative_tokens"]) == ("transform", 16)
    (pair[1] / "config.json").write_text('{"lattice": "transitions"}')
    assert compare.TRANSFORM not in [method.name for method in compare.methods(pair[1])]
    with pytest.raises(SystemExit, match="needs a drafter with a blank"):
        compare.main(arguments(pair, tmp_path, "--methods", compare.TRANSFORM))


def test_all_methods_are_more_trees(fake_vllm, pair, tmp_path):
    compare.main(arguments(pair, tmp_path, "--methods", "all", "--concurrency", "1", "--repeats", "1"))
    rows = json.loads((tmp_path / "out" / "small.json").read_text())["rows"]
    names = [row["method"] for row in rows]
    assert set(compare.DEFAULT_METHODS) < set(names)
    assert [name for name in names if "tree" in name] == [f"ctc tree {nodes}" for nodes in (8, 16, 32, 64)]


def test_a_changed_output_is_counted(fake_vllm, pair, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "wrong")
    compare.main(arguments(pair, tmp_path, "--methods", "none (default runner)", "ctc tree 16"))
    rows = json.loads((tmp_path / "out" / "small.json").read_text())["rows"]
    assert {(row["method"], row["same_output"]) for row in rows} == {("none (default runner)", 3), ("ctc tree 16", 0)}


def test_the_prompts_given_are_asked(fake_vllm, pair, tmp_path, monkeypatch):
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"question": "one?"}\n\n{"question": "two?"}\n')
    asked = []
    ask = compare.ask

    def record(client, model, question, max_tokens):
        asked.append((question, max_tokens))
        return ask(client, model, question, max_tokens)

    monkeypatch.setattr(compare, "ask", record)
    more = ["--methods", "ngram", "--prompts", str(prompts), "--max-tokens", "9"]
    compare.main(arguments(pair, tmp_path, *more))
    assert set(asked) == {("one?", 9), ("two?", 9)}


def test_a_server_that_does_not_start_fails_the_run(fake_vllm, pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_BEHAVIOUR", "crash")
    assert compare.main(arguments(pair, tmp_path)) == 1
    assert "out of cheese" in capsys.readouterr().out


@pytest.mark.parametrize("busy", [5.0, 80.0])
def test_a_busy_machine_is_written_down(fake_vllm, pair, tmp_path, monkeypatch, capsys, busy):
    monkeypatch.setattr(compare.psutil, "cpu_percent", lambda seconds: busy)
    assert compare.main(arguments(pair, tmp_path, "--methods", "ngram")) == 0
    assert ("do not trust the speeds" in capsys.readouterr().out) is (busy > 20)
    assert f"other programs used {busy:.0f} %" in (tmp_path / "out" / "small.md").read_text()


def test_median_spread_and_ratio():
    plain = [measurement("none (a)", repeat=i, seconds=s) for i, s in enumerate((1.0, 2.0, 4.0))]
    slower = [measurement("none (b)", repeat=i, seconds=5.0) for i in range(3)]
    drafted = [measurement("ctc", repeat=i, seconds=1.0, tokens=20, drafts=4, accepted=i) for i in range(3)]
    first, _, row = summarize([*plain, *slower, *drafted])
    assert (first.tokens_per_second, first.lowest, first.highest) == (5.0, 2.5, 10.0)
    assert row.ratio == 4.0  # to the faster of the two plain rows
    assert row.acceptance_length == 1 + 3 / 12


def test_no_ratio_without_a_plain_row(tmp_path):
    (row,) = summarize([measurement("ctc", drafts=2, accepted=3)])
    assert row.ratio is None
    args = compare.parse(["--prompts", str(tmp_path / "p.jsonl")])
    described = describe_run("compare.py", args, ["--prompts", str(tmp_path / "p.jsonl")], 1, 3.0)
    assert described["command"] == "python benchmarks/compare.py --prompts p.jsonl"
    assert "| 1 | ctc | 10.0 (10.0 to 10.0) | - | 2.50 | 1 of 1 |" in to_markdown(described, [row])
