"""Reasoning that ends inside a draft, then an answer in a format, or calls of tools.

The target is random: what it thinks, and when it stops to, is for the dice of each seed. What it answers is for the
grammar, from the first token after the reasoning.
"""

import json
import re
from typing import Any

import pytest

from . import conftest
from .frontend import SCHEDULING, Frontend, of_server, start
from .thinking import MARKERS, TOKENS, save_calling_pair, save_thinking_pair, text_of

THINK, END, CALL, END_OF_CALL = MARKERS.values()
LENGTH = 1024
OPTIONS = [
    "--max-model-len", str(LENGTH), "--hf-overrides", json.dumps({"max_position_embeddings": LENGTH}),
    "--max-num-seqs", "16", "--num-gpu-blocks-override", "1024", "--seed", "0", "--reasoning-parser", "qwen3",
    "--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
]  # fmt: skip
# A parser that goes through the text by rules, as most of vLLM's do today, and one of the older kind.
PARSERS = ["qwen3", pytest.param("deepseek_r1", marks=pytest.mark.slow)]
NOTE = "[#-;=-Z^-~]{5,30}"  # room for what the drafter expects
ORDER = {
    "type": "object",
    "properties": {
        "note": {"type": "string", "pattern": f"^{NOTE}$"},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sizes": {"type": "array", "items": {"enum": ["small", "large"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["note", "count", "sizes"],
    "additionalProperties": False,
}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}}}
SALE = {
    "type": "object",
    "properties": {"price": {"type": "integer", "minimum": 0, "maximum": 9}, "to": ORDER["properties"]["note"]},
    "required": ["price", "to"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in (("order", ORDER), ("sell", SALE))
]


# A sampled chain has other ways to be rejected.
DRAFTS = {**conftest.DRAFTS, "sampled chain": {"draft_sample_method": "probabilistic"}}
KINDS = [*conftest.DRAFTS, pytest.param("sampled chain", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SCHEDULING)
def frontends(request, engine, tiny_pair, tmp_path_factory):
    pair = save_thinking_pair(tiny_pair, tmp_path_factory.mktemp("thinking"))
    yield from start(pair, [*OPTIONS, *request.param], DRAFTS)


@pytest.fixture(params=[pytest.param(8, id="few"), pytest.param(200, id="many", marks=pytest.mark.slow)])
def seeds(request) -> range:
    return range(request.param)


@pytest.fixture(params=PARSERS)
def parser(request) -> str:
    return request.param


def ask(frontend: Frontend, seeds: range, **fields: Any) -> list[tuple[int, Any]]:
    """What of the sampled answers to one question the seeds decide."""
    question = {"messages": [{"role": "user", "content": "What do they make of it?"}], "return_token_ids": True}
    bodies = [{**question, "temperature": 1.0, "max_tokens": 400, "seed": seed, **fields} for seed in seeds]
    return [of_server(response) for response in frontend.ask("chat/completions", bodies)]


def tokens_of(answers: list[tuple[int, Any]]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for _, answer in answers]


def message(choice: dict) -> dict:
    """Of an answer, or of a stream; fields without a value are left out of one of them."""
    return {name: value for name, value in (choice.get("message") or choice["delta"]).items() if value}


def is_order(order: Any) -> bool:
    return (
        list(order) == ORDER["required"]
        and re.fullmatch(NOTE, order["note"]) is not None
        and type(order["count"]) is int
        and {*order["sizes"]} <= {"small", "large"}
    )


def is_sale(sale: Any) -> bool:
    return list(sale) == SALE["required"] and type(sale["price"]) is int and re.fullmatch(NOTE, sale["to"]) is not None


def ends_inside(steps: list[list[int]], token: int) -> int:
    """How many steps brought the token with others after it."""
    return sum(token in step[:-1] for step in steps)


# Sampled: trees give the samples without a drafter, chains others.
SAMPLED = {"chain": "reproducible", "tree": "same tokens"}


@pytest.mark.feature("reasoning, then structured output", **SAMPLED)
@pytest.mark.parametrize("draft", KINDS)
def test_an_answer_in_a_format(frontends, draft, parser, seeds):
    frontend = frontends[draft]
    frontend.serve(parser)
    frontend.core.steps.clear()
    # Thinking that goes over to a tool call ends there, for qwen3; vLLM 0.32 lets it, whatever the format is.
    # What begins thinking again, or is left out of texts, each parser takes in its own way.
    words = {"bad_words": [CALL, THINK, TOKENS[0]]}
    whole = ask(frontend, seeds, **FORMAT, **words)
    contents = set()
    for status, answer in whole:
        assert status == 200, answer
        (choice,) = answer["choices"]
        thought, end, rest = text_of(choice["token_ids"]).partition(END)
        if not end or choice["finish_reason"] == "length":
            continue  # it thought to the end, or was cut off
        given = message(choice)
        assert is_order(json.loads(given["content"])), given
        assert rest.removesuffix("<eos>") == given["content"]
        assert given.get("reasoning", "") == thought
        contents.add(given["content"])
    assert len(contents) > 0.9 * len(seeds)
    assert ends_inside(frontend.core.steps, TOKENS.index(END)) > len(seeds) / 20
    streamed = ask(frontend, seeds, **FORMAT, **words, stream=True)
    assert tokens_of(streamed) == tokens_of(whole)
    assert [message(answer["choices"][0]) for _, answer in streamed] == [
        message(answer["choices"][0]) for _, answer in whole
    ]
    if draft == "tree":
        frontends[None].serve(parser)
        assert tokens_of(whole) == tokens_of(ask(frontends[None], seeds, **FORMAT, **words))


def calls_in(text: str) -> list[tuple[str, Any]]:
    calls = [json.loads(call) for call in re.findall(f"{CALL}(.*?){END_OF_CALL}", text, re.DOTALL)]
    return [(call["name"], call["arguments"]) for call in calls]


def calls_of(choice: dict) -> list[tuple[str, Any]]:
    """Name and arguments of each, put together if they were streamed."""
    parts = message(choice).get("tool_calls", [])
    calls: dict[int, list[str]] = {}
    for number, part in enumerate(parts):
        call = calls.setdefault(part.get("index", number), ["", ""])
        call[0] += part["function"].get("name") or ""
        call[1] += part["function"].get("arguments") or ""
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


def content_of(text: str, parser: str) -> str:
    """What is said after the reasoning, which for some parsers a call ends too."""
    ends = [text.find(marker) for marker in ([END, CALL] if parser == "qwen3" else [END]) if marker in text]
    first = min(ends, default=len(text))
    return text[first:].removeprefix(END)


IS_FIT = {"order": is_order, "sell": is_sale}


@pytest.mark.feature("tool calls (`tool_choice` auto), streamed or not", **SAMPLED)
@pytest.mark.parametrize("draft", KINDS)
def test_tools_that_may_be_called(frontends, draft, parser, seeds):
    """A `strict` tool has a grammar that begins with the call. What is said before and between calls is free."""
    frontend = frontends[draft]
    frontend.serve(parser, "hermes")
    frontend.core.steps.clear()
    # The grammar of a tool lets spaces run on for ever; the penalty ends them.
    asked = {"tools": TOOLS, "tool_choice": "auto", "frequency_penalty": 1.0}
    whole, streamed = ask(frontend, seeds, **asked), ask(frontend, seeds, **asked, stream=True)
    num_calls = []
    for (status, answer), (_, stream) in zip(whole, streamed, strict=True):
        assert status == 200, answer
        (choice,), (same,) = answer["choices"], stream["choices"]
        assert choice["token_ids"] == same["token_ids"]
        content = content_of(text_of(choice["token_ids"]), parser)
        if content.rfind(CALL) > content.rfind(END_OF_CALL):
            continue  # cut off in the middle of a call
        calls = calls_in(content)
        assert all(IS_FIT[name](arguments) for name, arguments in calls)
        assert calls_of(choice) == calls_of(same) == calls
        num_calls.append(len(calls))
    assert len(num_calls) > len(seeds) / 4 and max(num_calls) > 1
    assert min(ends_inside(frontend.core.steps, TOKENS.index(marker)) for marker in (END, CALL)) > 0
    if draft == "tree":
        frontends[None].serve(parser, "hermes")
        assert tokens_of(whole) == tokens_of(ask(frontends[None], seeds, **asked))


QUESTIONS = ["What do they make?", "Is it enough?", "How many plums?", "Who buys?"]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [["--async-scheduling"], []], ids=["asynchronous", "synchronous"])
def test_tools_that_are_called_without_a_grammar(engine, tiny_pair, tmp_path, schedule):
    """No tool is `strict`, so that drafts are whole trees, in which reasoning, calls and answers end. The target has
    been taught to call."""
    thinking = save_thinking_pair(tiny_pair, tmp_path)
    tools = [{"type": "function", "function": {"name": name}} for name in ("order", "sell")]
    prompts = [f"can order\ncan sell\nuser: {question}\nassistant:" for question in QUESTIONS]
    pair = save_calling_pair(thinking, tmp_path / "calling", prompts, ["order", "sell"])
    bodies = [
        {
            "messages": [{"role": "user", "content": question}], "tools": tools, "max_tokens": 400,
            "return_token_ids": True, "temperature": temperature, "seed": seed,
        }
        for question in QUESTIONS for seed, temperature in enumerate([0, 0.7, 0.7, 1.0])
    ]  # fmt: skip
    for started in start(pair, [*OPTIONS, *schedule]):
        answers = {draft: called(frontend, bodies) for draft, frontend in started.items()}
        assert answers["tree"] == answers[None]
        greedy = slice(0, None, len(bodies) // len(QUESTIONS))
        assert answers["chain"][greedy] == answers[None][greedy]
        for draft in conftest.DRAFTS:
            steps = started[draft].core.steps
            assert min(ends_inside(steps, TOKENS.index(marker)) for marker in (END, CALL, END_OF_CALL)) > 0


def called(frontend: Frontend, bodies: list[dict]) -> list[tuple]:
    """The answers, and the same answers streamed."""
    frontend.serve("qwen3", "hermes")
    whole = [of_server(response) for response in frontend.ask("chat/completions", bodies)]
    streamed = frontend.ask("chat/completions", [{**body, "stream": True} for body in bodies])
    found = []
    for (status, answer), (_, stream) in zip(whole, map(of_server, streamed), strict=True):
        assert status == 200, answer
        (choice,), (same,) = answer["choices"], stream["choices"]
        calls = calls_in(content_of(text_of(choice["token_ids"]), "qwen3"))
        assert calls_of(choice) == calls_of(same) == calls
        assert [message(part).get("content") for part in (choice, same)] == ["Now.\n"] * 2
        found.append((choice["token_ids"], message(choice).get("reasoning"), calls))
    assert sum(len(calls) > 1 for *_, calls in found) > len(found) / 4
    return found
