"""The product as a user starts it: `vllm serve` with the drafter, asked by the openai client."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError
from server import Server
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
from vllm.sampling_params import StructuredOutputsParams
from vllm.tool_parsers.utils import get_json_schema_from_tools

from vllm_ctc_spec.edge.devices import NgramDevice
from vllm_ctc_spec.edge.loop import Client, Patience
from vllm_ctc_spec.edge.protocol import Policy, Text
from vllm_ctc_spec.edge.server import DraftRounds, PromptRounds
from vllm_ctc_spec.edge.server import Server as EdgeServer
from vllm_ctc_spec.serving import plugin

BUDGET = 6
QUESTIONS = (
    "Mira picks 12 plums and eats 4 of them. How many plums are left?",
    "A box holds 6 eggs. How many eggs are in 7 boxes?",
    "Omar walks 3 miles a day for 2 weeks. How many miles does he walk?",
    "Lena has $50. She buys 3 books for $9 each. How much money does she have left?",
)
MAX_TOKENS = 48
# White space between JSON's parts would be all that this target writes there.
STRUCTURED = {"backend": "xgrammar", "disable_any_whitespace": True}
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic")


@pytest.fixture(scope="module", params=["chain", "tree"])
def server(request, demo_pair, tmp_path_factory):
    """A server that drafts chains, and one that drafts trees from all sources, each for all tests here. Its processes
    are those of a user: no setting of the tests reaches them."""
    log_path = tmp_path_factory.mktemp("server") / "server.log"
    drafter = {"method": "ctc", "model": str(demo_pair.drafter), "num_speculative_tokens": BUDGET}
    drafter["ctc_draft"] = request.param
    if request.param == "tree":
        drafter["ctc_sources"] = "ctc+cache+client"
    with pytest.MonkeyPatch.context() as environment:
        for name in (plugin.V2_VARIABLE, "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
            environment.delenv(name, raising=False)
        args = ("--max-model-len", "512", *TOOLS, "--structured-outputs-config", json.dumps(STRUCTURED))
        starting = Server(demo_pair.target, drafter, log_path=log_path, extra_args=args)
    with starting as running:
        yield running


@pytest.fixture(scope="module")
def plain(engine, demo_pair):
    """answers(**sampling parameters) to the same questions, greedy, without drafter and without server."""
    llm = engine(demo_pair.target, max_model_len=512, structured_outputs_config=STRUCTURED)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]

    def answers(**parameters) -> list[str]:
        sampling = SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, **parameters})
        return [output.outputs[0].text for output in llm.chat(chats, sampling, use_tqdm=False)]

    return answers


@pytest.fixture(scope="module")
def expected(plain) -> list[str]:
    return plain()


def chat(server: Server, question: str, **options):
    return server.client().chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": question}],
        **{"temperature": 0, "max_tokens": MAX_TOKENS, **options},
    )


def test_the_log_says_what_drafts(server, demo_pair):
    log = server.log_path.read_text(encoding="utf-8", errors="replace")
    assert f"CTC drafter {demo_pair.drafter} (adm, served as dflash)" in log and f"{BUDGET} speculative tokens" in log


@pytest.mark.feature("chat completions")
def test_a_chat(server, expected):
    answer = chat(server, QUESTIONS[0])
    assert answer.choices[0].message.content == expected[0]
    assert answer.usage.completion_tokens <= MAX_TOKENS


@pytest.mark.feature("streaming")
def test_a_streamed_chat_brings_several_tokens_at_once(server, expected):
    chunks = list(chat(server, QUESTIONS[1], stream=True, extra_body={"return_token_ids": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(delta.delta.content or "" for delta in deltas) == expected[1]
    assert deltas[-1].finish_reason in ("stop", "length")
    assert max(len((delta.model_extra or {}).get("token_ids") or []) for delta in deltas) > 1


def test_a_guess_of_the_answer(server, expected):
    """Right, wrong, as text or as ids: the answer is the same. What is no guess is an error of that request alone."""

    def ask(guess: dict) -> tuple[str, float]:
        before = server.metrics()["vllm:spec_decode_num_drafts_total"]
        answer = chat(server, QUESTIONS[0], extra_body={"vllm_xargs": guess})
        return answer.choices[0].message.content, server.metrics()["vllm:spec_decode_num_drafts_total"] - before

    if "--speculative-config" in server.command and '"chain"' in server.command[-1]:
        with pytest.raises(BadRequestError, match="This server takes no guess of an answer"):
            ask({"ctc_draft": [1]})
        return
    ids = chat(server, QUESTIONS[0], extra_body={"return_token_ids": True}).choices[0].model_extra["token_ids"]
    text, steps = ask({"ctc_draft": []})
    for guess in ({"ctc_draft": ids}, {"ctc_draft_text": expected[0]}):
        with_guess, fewer = ask(guess)
        assert with_guess == text == expected[0] and fewer < steps
    assert ask({"ctc_draft": [1, 2, 3] * 100})[0] == ask({"ctc_draft_text": expected[1]})[0] == expected[0]
    for guess, says in (
        ({"ctc_draft": [10**6]}, "holds ids that the vocabulary"),
        ({"ctc_draft": [1] * 1000}, "token ids, and the context at most 512"),
        ({"ctc_draft": "words"}, "must be a list of token ids"),
    ):
        with pytest.raises(BadRequestError, match=says):
            ask(guess)


def test_concurrent_requests(server, expected):
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda question: chat(server, question), QUESTIONS))
    assert [answer.choices[0].message.content for answer in answers] == expected


TOOL = {
    "name": "order",
    "parameters": {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}, "what": {"enum": ["plums", "eggs"]}},
        "required": ["count", "what"],
        "additionalProperties": False,
    },
}
NAMED = {"type": "function", "function": {"name": TOOL["name"]}}


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param("required", marks=pytest.mark.feature("tool calls (`tool_choice` required)")),
        pytest.param(NAMED, marks=pytest.mark.feature("tool calls (`tool_choice` named)"), id="named"),
    ],
)
def test_a_tool_is_called(server, plain, choice):
    """vLLM makes structured output of it: of the tool's arguments, or of a list of calls."""
    tools = [{"type": "function", "function": TOOL}]
    schema = TOOL["parameters"]
    if choice == "required":
        schema = get_json_schema_from_tools(choice, [ChatCompletionToolsParam(**tool) for tool in tools], False)
    wanted = plain(structured_outputs=StructuredOutputsParams(json=schema), max_tokens=120)
    for question, text in zip(QUESTIONS, wanted):
        answer = chat(server, question, tools=tools, tool_choice=choice, parallel_tool_calls=False, max_tokens=120)
        (call,) = answer.choices[0].message.tool_calls
        arguments = json.loads(text)[0]["parameters"] if choice == "required" else json.loads(text)
        assert (call.function.name, json.loads(call.function.arguments)) == (TOOL["name"], arguments)


@pytest.mark.feature("clients that disconnect in mid-stream")
def test_a_client_that_goes_away_in_mid_stream(server, expected):
    """Its requests end at once, and the server goes on."""
    requests, most, generated = 8, 480, 0
    for _ in range(5):  # on a busy machine all may be answered before the client has read three pieces of it
        before = server.metrics()["vllm:generation_tokens_total"]
        stream = server.client().completions.create(
            model=server.model, prompt=["A farmer has"] * requests, max_tokens=most, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        assert [chunk.choices[0].text for chunk, _ in zip(stream, range(3))]
        stream.close()
        deadline = time.monotonic() + 20
        while server.metrics()["vllm:num_requests_running"] and time.monotonic() < deadline:
            time.sleep(0.02)
        after = server.metrics()
        assert after["vllm:num_requests_running"] == 0
        generated = after["vllm:generation_tokens_total"] - before
        if generated < requests * most:
            break
    assert 0 < generated < requests * most
    assert chat(server, QUESTIONS[0]).choices[0].message.content == expected[0]


@pytest.mark.feature("seeds", chain="reproducible")
def test_a_sampled_completion_obeys_its_seed(server):
    ask = {
        "model": server.model,
        "prompt": "A farmer has",
        "max_tokens": 20,
        "temperature": 0.8,
        "seed": 4,
        "logprobs": 2,
    }
    first, second = (server.client().completions.create(**ask).choices[0] for _ in range(2))
    assert first.text and first.text == second.text
    assert len(first.logprobs.token_logprobs) == len(first.logprobs.tokens) <= 20


@pytest.mark.parametrize("rounds", [DraftRounds, PromptRounds])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_of_an_edge_client_give_the_servers_own_text(server, request, rounds, temperature):
    """The server of chains takes no drafts of clients: `DraftRounds` go on without, `PromptRounds` need none."""
    if temperature > 0 and request.node.callspec.params["server"] == "chain":
        pytest.skip("a sampled chain's draws depend on where drafts begin")
    edge, sampling = EdgeServer(server.base_url, timeout=60), {"temperature": temperature, "seed": 5}
    prompt = edge.tokenize(messages=[{"role": "user", "content": QUESTIONS[3]}])
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "return_token_ids": True, **sampling}
    verifier, text = rounds(edge, sampling), Text(prompt, MAX_TOKENS)
    Client(NgramDevice(shortest=1), verifier, Policy(3, 0.0, 4), Patience(60)).complete(text)
    assert text.verified == edge.complete(body)["choices"][0]["token_ids"]
    assert text.counts.lost_rounds == 0
    refused = rounds is DraftRounds and request.node.callspec.params["server"] == "chain"
    assert text.counts.rounds <= 3 if refused else text.counts.rounds > 4
    assert not refused or "This server takes no guess of an answer" in verifier.refusal
    edge.close()


def test_the_metrics_count_drafts_and_acceptance(server):
    before = server.metrics()
    chat(server, QUESTIONS[2])
    after = server.metrics()
    drafts, drafted, accepted = (
        after[name] - before[name]
        for name in (
            "vllm:spec_decode_num_drafts_total",
            "vllm:spec_decode_num_draft_tokens_total",
            "vllm:spec_decode_num_accepted_tokens_total",
        )
    )
    assert drafts > 0 and drafted == pytest.approx(BUDGET * drafts, rel=0.2)
    assert accepted > 0.5 * drafts
