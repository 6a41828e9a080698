"""From measurements to rows, table and plots."""

import json
from dataclasses import asdict

import pytest
import report
from record import describe_run
from report import Measurement, save, summarize, to_markdown


def measurement(method="none", **changed) -> Measurement:
    values = dict(
        data="demo", temperature=0.0, concurrency=1, repeat=0, speculative=method != "none", requests=2, seconds=1.0,
        tokens=10, ttft_ms=20.0, tpot_ms=3.0, drafts=0, draft_tokens=0, accepted_tokens=0, accepted_per_position=[],
        same_output=2, raw="raw.json",
    )  # fmt: skip
    return Measurement(method, **{**values, **changed})


def described(**changed) -> dict:
    settings = dict(prompts={"demo": 2}, max_tokens=8, repeats=3, methods={})
    settings["machine_busy_percent_before"] = 3.0
    return describe_run("benchmarks/serve.py", ["--output", "/a/b/x"], **{**settings, **changed})


def test_median_spread_and_ratio():
    plain = [measurement("none", repeat=i, seconds=s, ttft_ms=s) for i, s in enumerate((1.0, 2.0, 4.0))]
    slower = [measurement("other", speculative=False, seconds=5.0)]
    drafted = [
        measurement("ctc", tokens=20, drafts=4, accepted_tokens=i, accepted_per_position=[i, 0], same_output=i)
        for i in range(3)
    ]
    first, _, row = summarize([*plain, *slower, *drafted])
    assert asdict(first.tokens_per_second) == {"median": 5.0, "lowest": 2.5, "highest": 10.0}
    assert first.ttft_ms.median == 2.0
    assert row.ratio == 4.0  # to the faster of the two rows without speculation
    assert asdict(row.acceptance_length) == {"median": 1.25, "lowest": 1.0, "highest": 1.5}
    assert row.accepted_by_depth == [3 / 12, 0.0]
    assert row.same_output == 0  # the worst repeat
    assert first.acceptance_length is None


def test_rows_are_compared_within_their_cell():
    cells = [dict(concurrency=c, temperature=t) for t in (1.0, 0.0) for c in (4, 1)]
    plain = [measurement(tokens=10 * (i + 1), **cell) for i, cell in enumerate(cells)]
    drafted = [measurement("ctc", tokens=20, **cell) for cell in cells]
    rows = summarize([*plain, *drafted])
    assert [(r.temperature, r.concurrency, r.method) for r in rows] == [
        (t, c, m) for t in (0, 1) for c in (1, 4) for m in ("none", "ctc")
    ]
    assert [row.ratio for row in rows if row.method == "ctc"] == [20 / 40, 20 / 30, 20 / 20, 20 / 10]


def test_the_table_says_what_it_shows():
    drafted = dict(drafts=2, accepted_tokens=3, accepted_per_position=[2, 1])
    text = to_markdown([described(methods={"ctc": {"a": 1}})], summarize([measurement("ctc", **drafted)]))
    assert "| demo | 0 | 1 | ctc | 10.0 | - | 2.50 | 20.0 | 3.00 | 2 of 2 |" in text  # no ratio: no plain row
    assert "| demo | 0 | ctc | 100 | 50 | - |" in text
    assert "1 + accepted / drafts" in text and "padding" in text and "about 1 % high" in text
    assert "2 prompts of demo; at most 8 tokens; median (lowest to highest) of 3 interleaved repeats" in text
    assert '- ctc: `{"a": 1}`' in text
    without = to_markdown([described()], summarize([measurement(same_output=None)]))
    assert "| - | - | 20.0 | 3.00 | - |" in without.replace("| 1.00 |", "| - |")
    assert "first k tokens" not in without


def test_the_command_names_no_folder():
    config = 'mine={"method": "x", "model": "/home/me/model"}'
    words = ["--data", "gsm8k=/home/me/x.jsonl", "--speculative-config", config, "--base-url", "http://127.0.0.1:8000"]
    command = describe_run("benchmarks/serve.py", words)["command"]
    assert "gsm8k=x.jsonl" in command and '"model": "model"' in command and "http://127.0.0.1:8000" in command
    assert "/home" not in command


@pytest.fixture
def results(tmp_path):
    """Files as serve.py saves them, with figures of two methods."""
    paths = []
    for name in ("none", "ctc"):
        run = described(methods={name: {}})
        rows = [
            measurement(name, concurrency=c, temperature=t, drafts=2 * (name == "ctc"), accepted_tokens=3)
            for c in (1, 4)
            for t in (0.0, 1.0)
        ]
        save(tmp_path / name, run, rows)
        paths.append(tmp_path / f"{name}.json")
    return paths


def test_results_are_pooled(results, tmp_path, capsys):
    output = tmp_path / "more" / "both"
    assert report.main([*map(str, results), "--output", str(output)]) == 0
    text = output.with_suffix(".md").read_text()
    assert "| demo | 1 | 4 | ctc | 10.0 | 1.00 | 2.50 |" in text and text in capsys.readouterr().out
    written = {path.name for path in output.parent.iterdir()}
    assert written == {"both.md", "both-speed.png", "both-acceptance.png"}


def test_one_result_is_reported_beside_itself(results, tmp_path):
    steps = tmp_path / "steps.json"
    parts = {"whole step": 9.0, "target forward": 4.0, "drafter": 3.0, "verification": 1.0}
    steps.write_text(json.dumps({"steps_ms": {"1": {"chain": parts, "tree:16": parts}}}))
    assert report.main([str(results[1]), "--step-time", str(steps)]) == 0
    for ending in (".md", "-speed.png", "-acceptance.png", "-step.png"):
        assert (tmp_path / f"ctc{ending}").stat().st_size > 0


def test_other_machines_and_other_files_are_refused(results, tmp_path):
    record = json.loads(results[1].read_text())
    record["run"]["torch"] = "0.1"
    results[1].write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=r"was not measured as .*none\.json: another torch"):
        report.main([*map(str, results)])
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit, match=r"is no result of benchmarks/serve\.py"):
        report.main([str(other)])
    with pytest.raises(SystemExit, match=r"is no result of benchmarks/step_time\.py"):
        report.main([str(results[0]), "--step-time", str(other)])
    with pytest.raises(SystemExit, match="cannot be read"):
        report.main([str(tmp_path / "missing.json")])
