"""Which rows become prompts, and which are held out."""

import json

import pytest

from vllm_ctc_spec.training.data import parse_row, read_prompts
from vllm_ctc_spec.training.settings import TrainingError

from .tiny import write_rows


@pytest.mark.parametrize(
    ("row", "contents"),
    [
        ({"question": "a"}, ["a"]),
        ({"prompt": "b", "other": 1}, ["b"]),
        ({"turns": ["c", "d"]}, ["c"]),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "e"}]}, ["s", "e"]),
        ({"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}]}, ["f"]),
        ({"messages": [{"role": "assistant", "content": "g"}]}, None),
        ({"messages": ["g"]}, None),
        ({"question": "  "}, None),
        ({"turns": []}, None),
        ({"answer": "x"}, None),
        ([1], None),
    ],
)
def test_rows(row, contents):
    messages = parse_row(json.dumps(row))
    assert (messages and [m["content"] for m in messages]) == contents


def test_a_line_that_is_not_json_is_no_row():
    assert parse_row('{"question": "a"') is None


def test_prompts_end_where_the_target_answers(target, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    prompts = read_prompts(str(path), target, 8, 1)
    assert target.tokenizer.decode(prompts.train[0]).replace(" ", "") == "<u>aabc<e><a>"


@pytest.mark.parametrize(("rows", "held_out", "expected"), [(40, 3, 3), (40, 100, 4), (5, 100, 1)])
def test_the_last_rows_are_held_out_at_most_a_tenth(target, tmp_path, rows, held_out, expected):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    prompts = read_prompts(str(path), target, 8, held_out)
    everything = read_prompts(str(path), target, 8, 1)
    assert len(prompts.held_out) == expected and len(prompts.train) == rows - expected
    assert prompts.train + prompts.held_out == everything.train + everything.held_out


def test_skipped_rows_are_counted_by_reason(target, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 5)
    with path.open("a") as file:
        file.write('{"answer": "x"}\nnot json\n' + json.dumps({"question": "a" * 80}) + "\n")
    prompts = read_prompts(str(path), target, 8, 1)
    assert (prompts.unusable, prompts.too_long) == (2, 1)
    assert "2 rows skipped: none of the fields question" in prompts.report()
    assert "1 rows skipped: longer" in prompts.report()


def test_a_file_without_usable_rows_is_refused(target, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": "x"}\n')
    with pytest.raises(TrainingError, match="0 usable rows of 1"):
        read_prompts(str(path), target, 8, 1)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere"), target, 8, 1)
