"""Every field of a request, with chains and with trees: the answer without a drafter, or a sentence (see
`request_cases.py`). All cases of a class are asked at once, so that one that changes another one is found too.
"""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from .conftest import DRAFTS
from .frontend import SCHEDULING, Frontend, alike, of_engine, of_server, start
from .request_cases import DRAWN, INSIDE, REFUSED, SILENT, TABLES, Usual
from .thinking import save_thinking_pair, text_of

PROMPTS = ["Tom has 3 apples.", "abcabcabcabcabc"]
BASE = {"temperature": 0, "max_tokens": 20}
OPTIONS = [
    "--max-model-len", "256", "--max-num-seqs", "16", "--num-gpu-blocks-override", "512", "--seed", "0",
    "--reasoning-parser", "qwen3", "--structured-outputs-config.backend", "xgrammar",
]  # fmt: skip
# Where the fields of a class are sent: a path, or the engine itself.
PLACES = {
    **dict.fromkeys(TABLES, "completions"), "ChatCompletionRequest": "chat/completions", "SamplingParams": "engine",
}  # fmt: skip
KNOWN = {
    "CompletionRequest": CompletionRequest.model_fields,
    "ChatCompletionRequest": ChatCompletionRequest.model_fields,
}
CASES = [
    (cls, name)
    for cls, table in TABLES.items()
    for name, case in table.items()
    if case.outcome != INSIDE and name in KNOWN.get(cls, [name])  # some are of a later vLLM
]
ROWS = {
    "logprob_token_ids": "logprobs of chosen tokens (`logprob_token_ids`)",
    "prompt_logprob_token_ids": "prompt logprobs of chosen tokens (`prompt_logprob_token_ids`)",
    "thinking_token_budget": "thinking budgets (`thinking_token_budget`)",
    "repetition_detection": "repetition detection",
}


@pytest.fixture(scope="module", params=SCHEDULING)
def frontends(request, engine, tiny_pair, tmp_path_factory):
    pair = save_thinking_pair(tiny_pair, tmp_path_factory.mktemp("thinking"))
    for started in start(pair, [*OPTIONS, *request.param]):
        for frontend in started.values():
            frontend.serve("qwen3", "hermes")
        yield started


def body(place: str, prompt: str, fields: dict) -> dict:
    """`prompt` has been thought about, so that structured output begins at once."""
    if place == "chat/completions":
        return {"messages": [{"role": "user", "content": prompt}], **BASE, **fields}
    return {"prompt": f"{prompt}</think>", **BASE, **fields}


def ask(frontend: Frontend, place: str, requests: list[dict]) -> list[Any]:
    """What the request decides of each answer."""
    if place != "engine":
        return [of_server(response) for response in frontend.ask(place, requests)]
    prompts = [request.pop("prompt") for request in requests]
    outputs = frontend.generate(list(zip(prompts, (SamplingParams(**fields) for fields in requests), strict=True)))
    return [output if isinstance(output, Exception) else of_engine(output) for output in outputs]


@pytest.fixture(scope="module")
def usual(frontends) -> dict[str, list[Usual]]:
    """By place: the answers without a drafter to the prompts of which nothing special is asked."""
    found = {}
    for place in ("completions", "chat/completions"):
        responses = frontends[None].ask(place, [body(place, p, {"return_token_ids": True}) for p in PROMPTS])
        given = [response.json() for response in responses]
        tokens = [answer["choices"][0]["token_ids"] for answer in given]
        found[place] = [
            Usual(text_of(several), several, answer["usage"]["prompt_tokens"])
            for several, answer in zip(tokens, given, strict=True)
        ]
    return {**found, "engine": found["completions"]}


@pytest.fixture(scope="module")
def answers(frontends, usual) -> dict[tuple, list[Any]]:
    """By class, field, draft and "with" or "without" the field, for each prompt."""
    given = {}
    for draft, frontend in frontends.items():
        for place in dict.fromkeys(PLACES.values()):
            asked = [
                (cls, name, draft, how)
                for cls, name in CASES
                for how in ("with", "without", "again")
                if PLACES[cls] == place and (how == "with" or (draft is None) == (how == "without"))
            ]
            requests = [
                body(place, prompt, TABLES[cls][name].sent(normal, without=name if how == "without" else ""))
                for cls, name, _, how in asked
                for prompt, normal in zip(PROMPTS, usual[place], strict=True)
            ]
            results = ask(frontend, place, requests)
            given.update({key: results[len(PROMPTS) * at :][: len(PROMPTS)] for at, key in enumerate(asked)})
    return given


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    ("cls", "name"),
    [pytest.param(*case, marks=[pytest.mark.feature(ROWS[case[1]])] if case[1] in ROWS else []) for case in CASES],
)
def test_a_field(answers, cls, name, draft):
    case = TABLES[cls][name]
    plain, without = answers[cls, name, None, "with"], answers[cls, name, None, "without"]
    given, again = answers[cls, name, draft, "with"], answers[cls, name, draft, "again"]
    if case.outcome == REFUSED:
        assert all(sentence(answer).count(case.why) == 1 for answer in given)
        return
    assert alike(plain, without) is (case.outcome == SILENT)
    assert alike(given, again)
    if case.outcome != DRAWN or draft == "tree":
        assert alike(given, plain)


def sentence(answer: Any) -> str:
    """What a request that is refused is told."""
    if isinstance(answer, Exception):  # vLLM wraps some in one without words
        return str(answer) or str(answer.__cause__)
    status, body = answer
    assert status == 400
    return body["error"]["message"]


def test_drafts_were_accepted(frontends, answers):
    several = {draft: sum(len(step) > 1 for step in frontend.core.steps) for draft, frontend in frontends.items()}
    assert several[None] == 0 and min(several["chain"], several["tree"]) > 1000
