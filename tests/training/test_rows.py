"""The dialogue in a row, in every form in which people have one."""

import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from vllm_ctc_spec.training.rows import FIELD_NAMES, NO_FIELD, PROMPT_FIELDS, Dialogue, LeftOut, read_rows


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def read(tmp_path):
    """read(row): the row as it is read."""

    def run(row, **names):
        (found,) = read_rows(write(tmp_path / "rows.jsonl", row), **names)
        return found

    return run


def said(messages) -> list[str]:
    return [f"{message['role'][0]} {message['content']}" for message in messages]


def shown(dialogue: Dialogue) -> list[tuple[list[str], list[str]]]:
    return [(said(turn.asked), said(turn.answer)) for turn in dialogue.turns]


def chat(*texts: str) -> list[dict]:
    """Messages of a user and an assistant in turn."""
    return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * len(texts), texts)]


def share(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in pairs]


ONE_TURN = [
    ({"question": "a"}, "a"),
    ({"prompt": "b", "other": 1}, "b"),
    ({"prompt": chat("b")}, "b"),
    ({"instruction": "sum up", "input": "text", "output": "o"}, "sum up\n\ntext"),
    ({"instruction": "sum up", "input": "", "output": "o"}, "sum up"),
    ({"turns": ["c"]}, "c"),
    ({"messages": chat("f", "g")}, "f"),
    ({"messages": chat("h"), "prompt": "i", "question": "j", "turns": ["k"]}, "h"),
    ({"turns": ["l"], "prompt": "m", "question": "n"}, "l"),
    ({"messages": None, "prompt": "q"}, "q"),
    ({"messages": [{"role": "assistant", "content": "o"}], "prompt": "p"}, "p"),
    ({"conversations": share(("human", "r"), ("gpt", "s"))}, "r"),
    ({"conversation": chat("t", "u")}, "t"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in "vw"]}]}, "v\nw"),
    ({"messages": [{"role": "User", "content": ["v", {"text": "w"}]}]}, "v\nw"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "text"), ONE_TURN)
def test_a_row_of_one_turn(row, text, read):
    found = read(row)
    assert found.fields == row and found.place == "rows.jsonl:1" and not found.problem
    (turn,) = found.dialogue.turns
    assert said(turn.asked) == [f"u {text}"]


SYSTEM = {"role": "system", "content": "s"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}
RESULT = {"role": "tool", "content": "4", "tool_call_id": "1"}
TURNS = [
    (chat("a", "b", "c", "d"), [(["u a"], ["a b"]), (["u c"], ["a d"])], [1, 2]),
    (chat("a", "b", "c"), [(["u a"], ["a b"]), (["u c"], [])], [1, 2]),
    ([SYSTEM, *chat("a", "b")], [(["s s", "u a"], ["a b"])], [1]),
    ([*chat("a", "b"), SYSTEM, *chat("c")], [(["u a"], ["a b"]), (["s s", "u c"], [])], [1, 2]),
    ([*chat("a"), SYSTEM, chat("", "b")[1]], [(["u a", "s s"], ["a b"])], [1]),
    # The file begins in the middle of a conversation.
    ([*chat("", "g")[1:], *chat("a", "b")], [(["a g", "u a"], ["a b"])], [1]),
    # Two messages of one speaker, and a system message at the end, which nobody answers.
    ([*chat("a"), *chat("b", "c"), *chat("", "d")[1:], SYSTEM], [(["u a", "u b"], ["a c", "a d"])], [2]),
    ([*chat("a"), CALL, RESULT, *chat("", "b", "c", "d")[1:]],
     [(["u a"], ["a "]), (["t 4"], ["a b"]), (["u c"], ["a d"])], [1, 1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "turns", "numbers"), TURNS)
def test_the_assistant_has_the_word_where_it_answers_in_the_file(messages, turns, numbers, read):
    dialogue = read({"messages": messages}).dialogue
    assert shown(dialogue) == turns and dialogue.user_turns() == numbers


def test_calls_of_tools_come_as_templates_take_them(read):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [*chat("a"), {**CALL, "weight": 1}, RESULT]
    for form in (tools, json.dumps(tools)):
        dialogue = read({"messages": messages, "tools": form}).dialogue
        assert dialogue.tools == tools
        assert dialogue.turns[0].answer == [
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
             "weight": 1}
        ]  # fmt: skip
        assert dialogue.turns[1].asked == [RESULT]
    broken = {**CALL, "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}, "what"]}
    assert read({"messages": [*chat("a"), broken]}).dialogue.turns[0].answer[0]["tool_calls"] == broken["tool_calls"]
    for form in ([], "no JSON", 3, ["f"]):
        assert read({"messages": messages, "tools": form}).dialogue.tools is None


def test_turns_without_answers_stay_apart(read):
    assert shown(read({"turns": ["a", "b", "c"]}).dialogue) == [(["u a"], []), (["u b"], []), (["u c"], [])]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_message_may_lie_beside_the_dialogue(name, read):
    for row in ({"question": "a"}, {"messages": chat("a")}, {"turns": ["a"]}, {"instruction": "a"}):
        assert shown(read({**row, name: "be brief"}).dialogue) == [(["s be brief", "u a"], [])]
        assert shown(read({**row, name: " "}).dialogue) == [(["u a"], [])]
    assert shown(read({"messages": [SYSTEM, *chat("a")], name: "be brief"}).dialogue) == [(["s s", "u a"], [])]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": "x"}, NO_FIELD),
        ({}, NO_FIELD),
        ({"question": None}, NO_FIELD),
        ({"question": "  "}, "question has an empty user message"),
        ({"question": 3}, "question has a user message that is no text"),
        ({"turns": []}, "turns has no list of user messages"),
        ({"turns": "a"}, "turns has no list of user messages"),
        ({"turns": ["a", None]}, "turns has a user message that is no text"),
        ({"messages": ["g"]}, "messages has no list of messages"),
        ({"messages": []}, "messages has no user message"),
        ({"messages": chat("", "a")[1:]}, "messages has no user message"),
        ({"messages": [SYSTEM]}, "messages has no user message"),
        ({"messages": [{"content": "a"}]}, "messages has a message by None, which is no speaker of a chat"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "a message by 'critic', which is no speaker"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "a message by ['user'], which is no speaker"),
        ({"messages": [{"role": "user"}]}, "messages has an empty user message"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "a message whose content is no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages has a message part that is no text ('image_url')"),
        ({"messages": chat("a", "\ud83d")}, "messages has half a character (a lone surrogate)"),
        ({"question": "\ud800"}, "question has half a character"),
        ({"conversations": share(("human", "a"), ("function_call", "{}"))}, "a message by 'function_call'"),
        ([1], "not a JSON object"),
    ],
)  # fmt: skip
def test_a_row_without_a_dialogue_says_why(row, problem, read):
    found = read(row)
    assert found.dialogue is None and problem in found.problem


WORDS = st.sampled_from(
    [*PROMPT_FIELDS, "role", "from", "content", "value", "type", "text", "user", "tool_calls", "function", "arguments",
     "tools", "system", "input"]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
SPEAKERS = st.sampled_from(["user", "assistant", "human", "gpt", "tool", "system", "nobody", None, 1])
MESSAGE = st.fixed_dictionaries(
    {"role": SPEAKERS, "content": JSON | st.text(max_size=3)}, optional={"tool_calls": JSON, "value": JSON}
)


@given(st.dictionaries(WORDS, JSON | st.lists(MESSAGE, max_size=5), max_size=4))
def test_no_row_breaks_the_reader(tmp_path_factory, row):
    """A row is a dialogue that somebody can answer, or says why it is none."""
    (found,) = read_rows(write(tmp_path_factory.mktemp("rows") / "rows.jsonl", row))
    assert (found.dialogue is None) == bool(found.problem)
    if found.dialogue is not None:
        assert all(turn.asked for turn in found.dialogue.turns)
        assert all(answer["role"] == "assistant" for turn in found.dialogue.turns for answer in turn.answer)
        texts = [message["content"] for turn in found.dialogue.turns for message in turn.asked + turn.answer]
        assert all(isinstance(text, str) for text in texts)


def test_a_parquet_file_has_the_dialogues_of_its_rows(tmp_path):
    """Every message has every field there, null where it has none."""
    rows = [chat("a", "b", "c"), [*chat("a"), CALL, RESULT]]
    kind = pyarrow.list_(
        pyarrow.struct(
            [
                ("role", pyarrow.string()),
                ("content", pyarrow.string()),
                ("tool_call_id", pyarrow.string()),
                ("tool_calls", pyarrow.list_(pyarrow.struct([("function", pyarrow.struct([
                    ("name", pyarrow.string()), ("arguments", pyarrow.string()), ("strict", pyarrow.bool_())]))]))),
            ]
        )
    )  # fmt: skip
    parquet.write_table(pyarrow.table({"messages": pyarrow.array(rows, kind)}), tmp_path / "rows.parquet")
    write(tmp_path / "rows.jsonl", *({"messages": messages} for messages in rows))
    found, expected = (list(read_rows(tmp_path / name)) for name in ("rows.parquet", "rows.jsonl"))
    assert [row.dialogue for row in found] == [row.dialogue for row in expected]


def test_whoever_reads_says_which_fields_count(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"turns": ["a"], "prompt": "b"}, {"turns": ["c"]}, {"question": "d"})
    found = [row.dialogue and said(row.dialogue.turns[0].asked) for row in read_rows(path, ("prompt", "turns"))]
    assert found == [["u b"], ["u c"], None]


def test_the_fields_that_sentences_name_are_those_that_are_read():
    assert sorted(FIELD_NAMES.split(", ")) == sorted(PROMPT_FIELDS)


def test_what_is_left_out_is_counted_and_the_first_is_named():
    left_out = LeftOut()
    assert str(left_out) == ""
    for place in ("a:1", "a:4"):
        left_out.add("row", "not JSON", place)
    left_out.add("prompt", "too long", "b:2", 5)
    left_out.add("file", "odd", "c")
    reasons = ("2 rows left out: not JSON (the first: a:1)", "5 prompts left out: too long (the first: b:2)",
               "1 file left out: odd (the first: c)")  # fmt: skip
    assert str(left_out) == "".join(f"; {reason}" for reason in reasons)
    assert left_out.below("4 prompts.") == "\n  ".join(["4 prompts.", *reasons])
    assert LeftOut().below("4 prompts.") == "4 prompts."
    assert left_out.count("not JSON") == 2 and left_out.count("no such") == 0
