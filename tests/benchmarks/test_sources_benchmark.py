"""Prompts that copy, and the n-grams that are followed without an engine."""

import json
import sys

import copying
import plots
import pytest
from sources import NO_DRAFTS, ngram_steps, num_changed, speculative_config, table_of


def test_prompts_are_the_same_every_time(tmp_path, monkeypatch):
    texts = []
    for folder in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["copying.py", "--output", str(tmp_path / folder), "--num-prompts", "3"])
        copying.main()
        texts.append({name: (tmp_path / folder / f"{name}.jsonl").read_text() for name in copying.SETS})
    assert texts[0] == texts[1] and set(texts[0]) == {"edit", "json"}
    rows = [json.loads(line)["prompt"] for line in texts[0]["edit"].splitlines()]
    assert len(set(rows)) == 3 and all(row.startswith("Repeat this text word for word") for row in rows)


@pytest.mark.parametrize(
    ("prompt", "answer", "steps"),
    [
        ([1, 2, 3], [4, 5, 6], 2),  # nothing to find: a step a token behind the first
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], 2),  # a token behind the first, then four and one more
        ([1, 2, 3, 4, 9, 1, 2, 5], [1, 2, 5, 8], 2),  # the last place first
    ],
)
def test_ngrams_by_hand(prompt, answer, steps):
    assert ngram_steps(prompt, answer, range(2, 5), 4) == steps


def test_changed_answers_are_counted():
    expected = {"a": [([1], [2, 3]), ([1], [4])], "b": [([5], [6])]}
    assert num_changed(expected, {name: list(rows) for name, rows in expected.items()}) == 0
    assert num_changed(expected, {"a": [([1], [2, 3]), ([1], [5])], "b": [([5], [])]}) == 2


def test_every_source_gets_as_many_nodes(tmp_path):
    assert speculative_config(tmp_path, NO_DRAFTS, 8) is None
    configs = {name: speculative_config(tmp_path, name, 8) for name in ("ctc", "cache", "ctc+cache")}
    assert {config["num_speculative_tokens"] for config in configs.values()} == {8}
    assert [name for name, config in configs.items() if "model" in config] == ["ctc", "ctc+cache"]


def test_the_table_and_the_plot(tmp_path):
    run = {
        "num_prompts": 2,
        "max_tokens": 3,
        "nodes": 8,
        "command": "c",
        "python": "3",
        "gpu": "G",
        "date": "2026-11-29",
    }
    lengths = {
        "ngram": {"a": 1.0, "b": 2.0}, "ctc": {"a": 3.0, "b": 4.5}, "cache": {"a": 1.5, "b": 5.0},
        "ctc+cache": {"a": 3.3, "b": 4.9},
    }  # fmt: skip
    table = table_of(run, lengths)
    assert "| sources | a | b |" in table and "| ctc | 3.00 | 4.50 |" in table
    assert "| ctc+cache / the better of both | 1.100 | 0.980 |" in table
    plots.sources(tmp_path / "sources.png", lengths, "title")
    assert (tmp_path / "sources.png").stat().st_size > 1000
