"""The arithmetic of the latency model on made-up step times, and one real run of tiny dummy engines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import latency_model
import pytest
from latency_model import NONE

SCRIPT = Path(latency_model.__file__)
# Trees of 7 nodes cost half a step more for one request, of 16 a whole step; for four requests two and five.
STEPS = {
    1: {NONE: 10.0, "chain:8": 14.0, "tree:7": 15.0, "tree:16": 20.0},
    2: {NONE: 10.0, "chain:8": 15.0, "tree:7": 20.0, "tree:16": 32.0},
    4: {NONE: 10.0, "chain:8": 25.0, "tree:7": 30.0, "tree:16": 60.0},
}
LENGTHS = {"chain:8": 2.4, "tree:7": 2.7, "tree:16": 3.6}


def evaluation(path: Path) -> Path:
    rows = [("chain of 8", 0.0, 2.4), ("tree of 7 nodes", 0.0, 2.7), ("tree of 16 nodes", 0.0, 3.6)]
    rows += [("chain of 8", 1.0, 1.5), ("sampled chain of 8", 1.0, 1.9)]
    results = [{"drafts": drafts, "temperature": t, "acceptance_length": length} for drafts, t, length in rows]
    path.write_text(json.dumps({"results": results}))
    return path


def test_speedup_is_one_at_the_break_even_acceptance_length() -> None:
    for times in STEPS.values():
        for draft in LENGTHS:
            assert latency_model.speedup(times, draft, latency_model.break_even(times, draft)) == 1.0
    assert latency_model.break_even(STEPS[4], "tree:16") == 6.0
    assert latency_model.speedup(STEPS[1], "tree:16", 3.6) == 1.8


def test_largest_paying_batch_is_before_the_first_that_does_not() -> None:
    assert latency_model.largest_paying_batch(STEPS, "tree:16", 3.6) == 2
    assert latency_model.largest_paying_batch(STEPS, "tree:16", 6.1) == 4
    assert latency_model.largest_paying_batch(STEPS, "tree:16", 1.9) is None
    bumpy = {1: {NONE: 1.0, "x": 1.5}, 2: {NONE: 1.0, "x": 3.0}, 4: {NONE: 1.0, "x": 1.0}}
    assert latency_model.largest_paying_batch(bumpy, "x", 2.0) == 1


def test_suggested_rows_give_every_batch_its_fastest_tree() -> None:
    """One request: a tree of 16 (1.8 x against 1.8 x of 7: the request alone gets what was asked for). Two: a tree of 7
    (1.35 x) and not one of 16 (1.13 x), so 16 rows but fewer than 34. Four: none (0.9 x), so fewer than 32."""
    suggested = latency_model.suggest_tree_rows(STEPS, LENGTHS)
    assert {nodes: rows for nodes, (rows, _) in suggested.items()} == {7: 16, 16: 16}
    mean = (1.8 * 1.35 * 1.0) ** (1 / 3)
    assert [speedup for _, speedup in suggested.values()] == pytest.approx([mean, mean])


def test_rows_are_not_suggested_where_a_smaller_tree_was_not_measured() -> None:
    lengths = {name: length for name, length in LENGTHS.items() if name != "tree:7"}
    assert latency_model.suggest_tree_rows(STEPS, lengths) == {}


def test_a_draft_keeps_its_ratio_to_the_engine_that_it_took_turns_with() -> None:
    pairs = {
        "chain:8": {1: {NONE: 10.0, "chain:8": 15.0}},
        "tree:7": {1: {NONE: 20.0, "tree:7": 40.0}},  # measured while the machine was slow
        "tree:16": {1: {NONE: 12.0, "tree:16": 36.0}},
    }
    assert latency_model.combine(pairs) == {1: {NONE: 12.0, "chain:8": 18.0, "tree:7": 24.0, "tree:16": 36.0}}


def test_acceptance_lengths_of_an_evaluation(tmp_path: Path) -> None:
    path = evaluation(tmp_path / "eval.json")
    assert latency_model.read_acceptance(path, 0.0) == LENGTHS
    assert latency_model.read_acceptance(path, 1.0) == {"chain:8": 1.5}
    with pytest.raises(SystemExit, match="no acceptance length at temperature 0.7"):
        latency_model.read_acceptance(path, 0.7)
    path.write_text("[]")
    with pytest.raises(SystemExit, match="is no result of `vllm-ctc eval --json`"):
        latency_model.read_acceptance(path, 0.0)


def test_report_with_and_without_acceptance_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair) -> None:
    measured = {draft: {batch: {NONE: t[NONE], draft: t[draft]} for batch, t in STEPS.items()} for draft in LENGTHS}
    monkeypatch.setattr(latency_model, "measure_draft", lambda settings, draft: measured[draft])
    monkeypatch.setattr(latency_model, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(latency_model, "BUSY_SECONDS", 0.0)
    target, drafter = pair
    output = tmp_path / "first"
    options = ["--target", str(target), "--drafter", str(drafter), "--drafts", *LENGTHS]
    assert latency_model.main([*options, "--output", str(output)]) == 0
    text = output.with_suffix(".md").read_text()
    assert "| 4 | 10.00 | 25.00 | 30.00 | 60.00 |" in text
    assert "| 4 | 2.50 | 3.00 | 6.00 |" in text
    assert "speedup" not in text and str(tmp_path) not in text

    again = tmp_path / "again"
    steps = ["--steps", str(output.with_suffix(".json")), "--acceptance", str(evaluation(tmp_path / "eval.json"))]
    assert latency_model.main([*steps, "--output", str(again)]) == 0
    text = again.with_suffix(".md").read_text()
    assert "| 1 | 1.71 | 1.80 | 1.80 |" in text
    assert "| pays up to a batch of | 2 | 2 | 2 |" in text
    assert "| 16 | 16 | 1.34 |" in text
    assert json.loads(again.with_suffix(".json").read_text())["suggested_tree_rows"]["16"][0] == 16
    assert all(path.with_suffix(".png").stat().st_size > 0 for path in (output, again))


@pytest.mark.slow
def test_tiny_dummy_engines(tmp_path: Path) -> None:
    output = tmp_path / "tiny"
    options = ["--shape", "tiny", "--drafts", "chain:8", "tree:7", "--batch-sizes", "1", "2", "--repeats", "1"]
    options += ["--max-tokens", "16", "--context", "16", "--output", str(output)]
    child = subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    record = json.loads(output.with_suffix(".json").read_text())
    for times in record["step_ms"].values():
        assert list(times) == [NONE, "chain:8", "tree:7"] and min(times.values()) > 0
        assert times["tree:7"] > times[NONE]  # a drafter's forward more
