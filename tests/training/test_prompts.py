"""Which rows become prompts, and which are held out."""

import copy
import dataclasses
import datetime
import json

import pytest
from transformers.utils import chat_template_utils

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.prompts import read_prompts
from vllm_ctc_spec.training.rows import FIELD_NAMES, PROMPT_FIELDS, Row, read_rows
from vllm_ctc_spec.training.target import TargetText

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
        ({"messages": [{"role": "user", "content": "h"}], "prompt": "i", "question": "j", "turns": ["k"]}, ["h"]),
        ({"turns": ["l"], "prompt": "m", "question": "n"}, ["l"]),
        ({"messages": [{"role": "assistant", "content": "o"}], "prompt": "p"}, ["p"]),
        ({"question": "  "}, None),
        ({"turns": []}, None),
        ({"answer": "x"}, None),
        ([1], None),
    ],
)
def test_rows(row, contents, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = read_rows(tmp_path / "rows.jsonl")
    assert (found.messages and [m["content"] for m in found.messages]) == contents
    assert found.fields == (row if isinstance(row, dict) else {})


def test_whoever_reads_says_which_fields_count(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"turns": ["a"], "prompt": "b"}\n{"turns": ["c"]}\n{"question": "d"}\n')
    rows = read_rows(tmp_path / "rows.jsonl", ("prompt", "turns"))
    assert [row.messages and row.messages[0]["content"] for row in rows] == ["b", "c", None]


def test_the_fields_that_sentences_name_are_those_that_are_read():
    assert sorted(FIELD_NAMES.split(", ")) == sorted(PROMPT_FIELDS)


def test_a_line_that_is_not_json_has_no_fields(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a"')
    assert read_rows(tmp_path / "rows.jsonl") == [Row({}, None)]


def test_rows_end_at_newlines_alone(tmp_path):
    """The other separators of lines may stand unescaped in JSON's strings."""
    row = json.dumps({"question": "a\u2028b\u2029c\u0085d\u001ee"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{row}\r\n\n{row}\n".encode())
    contents = [row.messages[0]["content"] for row in read_rows(path)]
    assert contents == ["a\u2028b\u2029c\u0085d\x1ee"] * 2


@pytest.fixture
def text(target_folder):
    return TargetText.load(str(target_folder))


def test_prompts_end_where_the_target_answers(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    prompts = read_prompts(str(path), text, 8, 1)
    assert text.tokenizer.decode(prompts.train[0]).replace(" ", "") == "<u>aabc<e><a>"


@pytest.mark.parametrize(("rows", "held_out", "expected"), [(40, 3, 3), (40, 100, 4), (5, 100, 1)])
def test_the_last_rows_are_held_out_at_most_a_tenth(text, tmp_path, rows, held_out, expected):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    prompts = read_prompts(str(path), text, 8, held_out)
    everything = read_prompts(str(path), text, 8, 1)
    assert len(prompts.held_out) == expected and len(prompts.train) == rows - expected
    assert prompts.train + prompts.held_out == everything.train + everything.held_out


def test_skipped_rows_are_counted_by_reason(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 5)
    with path.open("a") as file:
        file.write('{"answer": "x"}\nnot json\n' + json.dumps({"question": "a" * 80}) + "\n")
    prompts = read_prompts(str(path), text, 8, 1)
    assert (prompts.skipped.unusable, prompts.skipped.too_long) == (2, 1)
    assert "2 rows skipped: none of the fields question" in prompts.report()
    assert "1 rows skipped: longer" in prompts.report()


def with_template(text, template):
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(text, tokenizer=tokenizer)


STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{{ '<u>' + m['content'] }}{% endfor %}"
)


def test_rows_that_the_chat_template_refuses_are_skipped(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 5)
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    bad = [[assistant, user], [{**user, "content": None}], [{**user, "content": [{"type": "text", "text": "a"}]}],
           [{**user, "content": "\ud800"}]]  # fmt: skip
    with path.open("a") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in bad)
    prompts = read_prompts(str(path), with_template(text, STRICT), 8, 1)
    assert (len(prompts.train), len(prompts.held_out)) == (4, 1)
    assert (prompts.skipped.unusable, len(prompts.skipped.refusals)) == (0, 4)
    reason = "refused by the target's chat template or vocabulary (the first: TemplateError: Roles must alternate)."
    assert f"; 4 rows skipped: {reason}" in prompts.report()


def test_rows_with_tokens_that_the_model_lacks_are_skipped(text, tmp_path):
    """Its tokenizer has got more tokens than its embedding has rows."""
    path = write_rows(tmp_path / "rows.jsonl", 5)
    with path.open("a") as file:
        file.write(json.dumps({"question": "ab<new>c"}) + "\n")
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.add_tokens(["<new>"])
    prompts = read_prompts(str(path), dataclasses.replace(text, tokenizer=tokenizer), 8, 1)
    assert (len(prompts.train), len(prompts.held_out)) == (4, 1)
    assert "(the first: it has the token '<new>', number 31, and the model has 31)" in prompts.report()


def test_a_template_that_refuses_every_row_says_why(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 3)
    broken = with_template(text, "{{ messages[0].no_such.field }}")
    with pytest.raises(TrainingError, match="0 usable rows of 3.*3 rows skipped: .*UndefinedError: .*no_such"):
        read_prompts(str(path), broken, 8, 1)


def test_arguments_reach_the_chat_template(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 3)
    thinking = with_template(text, text.tokenizer.chat_template + "{% if enable_thinking %}hm{% endif %}")
    plain = read_prompts(str(path), thinking, 8, 1, {"enable_thinking": False})
    assert plain.train == read_prompts(str(path), text, 8, 1).train
    found = read_prompts(str(path), thinking, 8, 1, {"enable_thinking": True})
    assert found.train == [ids + thinking.tokenizer("hm").input_ids for ids in plain.train]
    assert found.chat_template_kwargs == {"enable_thinking": True}
    with pytest.raises(TrainingError, match="0 usable rows of 3.*TypeError: .*'tokenize'"):
        read_prompts(str(path), thinking, 8, 1, {"tokenize": True})


def test_prompts_do_not_depend_on_the_day(text, tmp_path, monkeypatch):
    """Else the next day's run would not continue this day's."""

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(days=1)

    path = write_rows(tmp_path / "rows.jsonl", 3)
    dated = with_template(text, "{{ strftime_now('%A, %d %B %Y') | lower }}" + text.tokenizer.chat_template)
    today = read_prompts(str(path), dated, 8, 1)
    assert "thursday" in text.tokenizer.decode(today.train[0]).replace(" ", "")
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert read_prompts(str(path), dated, 8, 1) == today


def test_a_file_without_usable_rows_is_refused(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": "x"}\n')
    with pytest.raises(TrainingError, match="0 usable rows of 1"):
        read_prompts(str(path), text, 8, 1)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere"), text, 8, 1)
