"""Which rows become prompts, what is left out and why, and which rows are held out."""

import copy
import dataclasses
import datetime
import json

import pytest
from transformers.utils import chat_template_utils

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.conversations import answer_all
from vllm_ctc_spec.training.prompts import DUPLICATE, REFUSED, TOO_LONG, UNANSWERED, PromptBuilder, read_prompts
from vllm_ctc_spec.training.target import TargetText

from .tiny import write_rows


@pytest.fixture
def text(target_folder):
    return TargetText.load(str(target_folder))


def builder(text, chat_template_kwargs=None) -> PromptBuilder:
    return PromptBuilder(text, text.max_length, 8, chat_template_kwargs)


def with_template(text, template):
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(text, tokenizer=tokenizer)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*texts: str) -> dict:
    """A user and an assistant in turn."""
    return {"messages": [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * len(texts), texts)]}


def shown(text, prompts) -> list[list[str]]:
    """What the target reads, conversation by conversation."""
    return [[text.tokenizer.decode(ids).replace(" ", "") for ids in each.prompts] for each in prompts]


def test_prompts_end_where_the_target_answers(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 2)
    prompts = read_prompts(str(path), builder(text), 1)
    assert shown(text, prompts.train) == [["<u>aabc<e><a>"]]


@pytest.mark.parametrize(("rows", "held_out", "expected"), [(40, 3, 3), (40, 100, 4), (5, 100, 1)])
def test_the_last_rows_are_held_out_at_most_a_tenth(text, tmp_path, rows, held_out, expected):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    prompts = read_prompts(str(path), builder(text), held_out)
    everything = read_prompts(str(path), builder(text), 1)
    assert len(prompts.held_out) == expected and len(prompts.train) == rows - expected
    assert prompts.train + prompts.held_out == everything.train + everything.held_out


def test_every_part_of_a_folder_is_held_out(text, tmp_path):
    """Files are often of different kinds."""
    for name, first in (("a.jsonl", "a"), ("b.jsonl", "b"), ("c.json", "c")):
        write(tmp_path / name, *({"question": first + other} for other in "abcdefghij"))
    (tmp_path / "LICENSE").touch()
    prompts = read_prompts(str(tmp_path), builder(text), 3)
    assert [text[0][3] for text in shown(text, prompts.held_out)] == ["a", "b", "c"]
    assert len(prompts.train) == 27 and not [each for each in prompts.train if each in prompts.held_out]
    reason = "1 file left out: its name ends with none of .jsonl, .ndjson, .json, .parquet (the first: LICENSE)"
    assert prompts.report() == f"27 prompts for training, 3 held out.\n  {reason}"


def test_every_turn_of_a_conversation_is_a_prompt_behind_the_turns_of_the_file(text, tmp_path):
    path = write(tmp_path / "rows.jsonl", chat("a", "b", "c", "d", "e"), chat("f", "g", "h", "i"))
    prompts = read_prompts(path, builder(text), 1)
    one, two, three = "<u>a<e><a>", "b<e><u>c<e><a>", "d<e><u>e<e><a>"
    assert shown(text, prompts.train) == [[one, one + two, one + two + three]]
    assert shown(text, prompts.held_out) == [["<u>f<e><a>", "<u>f<e><a>g<e><u>h<e><a>"]]
    assert [each.turns for each in prompts.train + prompts.held_out] == [[1, 2, 3], [1, 2]]
    assert prompts.report() == "3 prompts in 1 conversation for training, 2 in 1 conversation held out."


def test_later_turns_without_answers_wait_for_the_targets(text, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"turns": ["a", "b", "c"]}, {"turns": ["d", "e"]}, chat("f"))
    given = read_prompts(path, builder(text), 1)
    assert shown(text, given.train) == [["<u>a<e><a>"], ["<u>d<e><a>"]]
    assert f"\n  3 later turns left out: {UNANSWERED} (the first: rows.jsonl:1)" in given.report()
    own = read_prompts(path, builder(text), 1, regenerate=True)
    assert shown(text, own.train) == shown(text, given.train) and own.regenerate and not given.regenerate
    assert own.report() == "5 prompts in 2 conversations for training, 1 held out."
    (first, second), respond = own.train, lambda asked: [text.tokenizer("xy<e>").input_ids for _ in asked]
    answers = answer_all([first, second], respond, builder(text).follow)
    replies = [[text.tokenizer.decode(answer.prompt).replace(" ", "") for answer in each] for each in answers]
    assert replies == [
        ["<u>a<e><a>", "<u>a<e><a>xy<e><u>b<e><a>", "<u>a<e><a>xy<e><u>b<e><a>xy<e><u>c<e><a>"],
        ["<u>d<e><a>", "<u>d<e><a>xy<e><u>e<e><a>"],
    ]
    assert [[answer.turn for answer in each] for each in answers] == [[1, 2, 3], [1, 2]]


def test_a_conversation_goes_on_with_the_targets_own_answers(text, tmp_path):
    """In the place of the file's, except calls of tools, whose results come next."""
    call = {"role": "assistant", "content": "call", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "r"}
    messages = [*chat("a", "b", "c")["messages"], call, result, *chat("", "d", "e")["messages"][1:]]
    path = write(tmp_path / "rows.jsonl", {"messages": messages}, chat("f"))
    build = builder(with_template(text, text.tokenizer.chat_template.replace("== 'user'", "!= 'assistant'")))
    own = read_prompts(path, build, 1, regenerate=True)
    (answers,) = answer_all(own.train, lambda asked: [text.tokenizer("xy<e>").input_ids for _ in asked], build.follow)
    last = text.tokenizer.decode(answers[-1].prompt).replace(" ", "")
    assert last == "<u>a<e><a>xy<e><u>c<e><a>call<e><u>r<e><a>xy<e><u>e<e><a>"
    assert [answer.turn for answer in answers] == [1, 2, 2, 3]


def test_a_conversation_ends_where_there_is_no_more_room_or_the_template_refuses(text, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"turns": ["a" * 20, "b" * 20, "c" * 20, "d"]}, chat("f"))
    own = read_prompts(path, builder(text), 1, regenerate=True)
    respond = lambda asked: [[5] for _ in asked]  # noqa: E731
    (answers,) = answer_all(own.train, respond, builder(text).follow)
    assert len(answers) == 2 and max(len(answer.prompt) for answer in answers) <= 64 - 8
    strict = "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + text.tokenizer.chat_template
    (answers,) = answer_all(own.train, respond, builder(with_template(text, strict)).follow)
    assert len(answers) == 1


def test_the_engine_has_room_for_what_a_conversation_may_become(text, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"turns": ["a", "bc"]}, {"turns": ["d", "e"]}, chat("f", "g" * 30, "h"))
    large = dataclasses.replace(builder(text), max_length=10_000)
    given = read_prompts(path, large, 1)
    assert large.longest(given.train + given.held_out) == 4 + 30 + 5  # with the marks of the template
    own = read_prompts(path, large, 1, regenerate=True)
    assert large.longest(own.train) == 4 + 2 + 8 + 64  # first prompt, later question, an answer, and a template's marks
    assert builder(text).longest(own.train) == 64


def test_what_is_left_out_is_counted_by_reason_and_the_first_is_named(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 5)
    good = path.read_text()
    rows = [json.dumps(row) for row in ({"answer": "x"}, {"question": "a" * 80}, {"question": "aabc"})]
    path.write_text(good + "\n".join([rows[0], "not json", *rows[1:3], rows[0], rows[2]]) + "\n")
    prompts = read_prompts(str(path), builder(text), 1)
    assert len(prompts.train + prompts.held_out) == 5
    counts = [prompts.left_out.count(why) for why in ("none of the fields", "not JSON", TOO_LONG, DUPLICATE)]
    assert counts == [2, 1, 1, 2]
    for sentence in (
        "2 rows left out: none of the fields question, prompt, instruction, turns,",
        "1 row left out: not JSON (the first: rows.jsonl:7)",
        f"1 prompt left out: {TOO_LONG} (the first: rows.jsonl:8)",
        f"2 prompts left out: {DUPLICATE} (the first: rows.jsonl:9)",
    ):
        assert f"\n  {sentence}" in prompts.report()


def test_prompts_that_conversations_share_are_asked_once(text, tmp_path):
    """And none is both trained on and held out."""
    path = write(tmp_path / "rows.jsonl", chat("a", "b", "c"), chat("a", "b", "d"), chat("e"), chat("a", "x", "f"))
    given = read_prompts(path, builder(text), 1)
    assert [len(each.prompts) for each in given.train + given.held_out] == [2, 1, 1, 1]
    assert [each.turns for each in given.train + given.held_out] == [[1, 2], [2], [1], [2]]
    assert given.left_out.count(DUPLICATE) == 2
    own = read_prompts(path, builder(text), 1, regenerate=True)
    assert len(own.train + own.held_out) == 2 and own.left_out.count(DUPLICATE) == 2


def test_a_conversation_is_as_long_as_fits(text, tmp_path):
    path = write(tmp_path / "rows.jsonl", chat("a" * 20, "b" * 10, "c" * 10, "d" * 50, "e", "f", "g"), chat("h"))
    prompts = read_prompts(path, builder(text), 1)
    assert [len(each.prompts) for each in prompts.train] == [2] and prompts.left_out.count(TOO_LONG) == 2


def test_a_row_of_a_hundred_thousand_tokens_is_left_out(text, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "a" * 100_000}, {"question": "a"}, {"question": "b"})
    prompts = read_prompts(path, builder(text), 1)
    assert len(prompts.train + prompts.held_out) == 2 and prompts.left_out.count(TOO_LONG) == 1


STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{{ '<u>' + m['content'] }}{% endfor %}"
)


def test_prompts_that_the_chat_template_refuses_are_left_out(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 5)
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    with path.open("a") as file:
        for messages in ([assistant, user], [{"role": "system", "content": "s"}, user], [user, user, assistant, user]):
            file.write(json.dumps({"messages": messages}) + "\n")
    prompts = read_prompts(str(path), builder(with_template(text, STRICT)), 1)
    assert (len(prompts.train), len(prompts.held_out)) == (4, 1) and prompts.left_out.count(REFUSED) == 4
    reason = f"{REFUSED} (the first: rows.jsonl:6, TemplateError: Roles must alternate)"
    assert f"\n  4 prompts left out: {reason}" in prompts.report()


@pytest.mark.parametrize("fault", ["{{ 1 // 0 }}", "{{ {}['a'] + 1 }}", "{{ messages[0]['content'].index('z') }}"])
def test_a_template_may_fail_in_any_way(fault, text, tmp_path):
    faulty = "{% if messages[0]['content'] == 'bad' %}" + fault + "{% endif %}" + text.tokenizer.chat_template
    path = write(tmp_path / "rows.jsonl", {"question": "a"}, {"question": "bad"}, {"question": "b"})
    prompts = read_prompts(path, builder(with_template(text, faulty)), 1)
    assert len(prompts.train + prompts.held_out) == 2 and prompts.left_out.count(REFUSED) == 1


def test_prompts_with_tokens_that_the_model_lacks_are_left_out(text, tmp_path):
    """Its tokenizer has got more tokens than its embedding has rows."""
    path = write(tmp_path / "rows.jsonl", {"question": "a"}, {"question": "ab<new>c"}, {"question": "b"})
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.add_tokens(["<new>"])
    prompts = read_prompts(path, builder(dataclasses.replace(text, tokenizer=tokenizer)), 1)
    assert len(prompts.train + prompts.held_out) == 2
    reason = "with a token that the model lacks (the first: rows.jsonl:2, '<new>', number 31 of 31)"
    assert f"\n  1 prompt left out: {reason}" in prompts.report()


def test_a_template_that_refuses_every_row_says_why(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 3)
    broken = with_template(text, "{{ messages[0].no_such.field }}")
    with pytest.raises(TrainingError, match="has 0 usable rows.*3 prompts left out: .*UndefinedError: .*no_such"):
        read_prompts(str(path), builder(broken), 1)


def test_arguments_reach_the_chat_template(text, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", 3)
    thinking = with_template(text, text.tokenizer.chat_template + "{% if enable_thinking %}hm{% endif %}")
    plain = read_prompts(str(path), builder(thinking, {"enable_thinking": False}), 1)
    assert plain.train == read_prompts(str(path), builder(text), 1).train
    found = read_prompts(str(path), builder(thinking, {"enable_thinking": True}), 1)
    hm = thinking.tokenizer("hm").input_ids
    assert [each.prompts for each in found.train] == [[each.prompts[0] + hm] for each in plain.train]
    assert found.chat_template_kwargs == {"enable_thinking": True}
    with pytest.raises(TrainingError, match="0 usable rows.*TypeError: .*'tokenize'"):
        read_prompts(str(path), builder(thinking, {"tokenize": True}), 1)


def test_the_chat_template_sees_the_tools(text, tmp_path):
    row = {**chat("a"), "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]}
    path = write(tmp_path / "rows.jsonl", row, chat("b"))
    named = "{% if tools %}{{ tools[0].function.name }}{% else %}none{% endif %}" + text.tokenizer.chat_template
    prompts = read_prompts(path, builder(with_template(text, named)), 1)
    assert shown(text, prompts.train + prompts.held_out) == [["look<u>a<e><a>"], ["none<u>b<e><a>"]]


def test_prompts_do_not_depend_on_the_day(text, tmp_path, monkeypatch):
    """Else the next day's run would not continue this day's."""

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + datetime.timedelta(days=1)

    path = write_rows(tmp_path / "rows.jsonl", 3)
    dated = with_template(text, "{{ strftime_now('%A, %d %B %Y') | lower }}" + text.tokenizer.chat_template)
    today = read_prompts(str(path), builder(dated), 1)
    assert "thursday" in shown(text, today.train)[0][0]
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert read_prompts(str(path), builder(dated), 1) == today


def test_a_file_without_usable_rows_is_refused(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": "x"}\n')
    with pytest.raises(TrainingError, match=r"has 0 usable rows.*1 row left out: none .* \(the first: rows.jsonl:1\)"):
        read_prompts(str(path), builder(text), 1)
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prompts(str(tmp_path / "nowhere"), builder(text), 1)
