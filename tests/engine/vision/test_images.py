"""Images in prompts: the tokens are those without drafter."""

import pytest
from server import Server
from vllm import SamplingParams

from ..conftest import DRAFTS, Engine, Pair
from ..ties import differences
from .targets import TARGETS, image_url, save_pair

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.8, seed=7, max_tokens=48, ignore_eos=True)
IMAGES = {"limit_mm_per_prompt": {"image": 2}}


def image(*shape: int) -> dict:
    return {"type": "image_url", "image_url": {"url": image_url(*shape)}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


CONVERSATIONS = [
    [{"role": "user", "content": content}]
    for content in (
        [image(1, 40, 24), text("What?")],
        [text("These two:"), image(2, 24, 48), image(3, 32, 32), text("Which one is red?")],
        "No picture at all.",
        [text("Look at this. " * 6), image(4, 16, 16)],
    )
]


@pytest.fixture(scope="module", params=TARGETS)
def pair(request, tmp_path_factory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="module")
def plain(engine, pair) -> Engine:
    return engine(pair.target, max_logprobs=-1, **IMAGES)


def answers(llm: Engine, parameters: list[SamplingParams]) -> list:
    return [output for params in parameters for output in llm.chat(CONVERSATIONS, params, use_tqdm=False)]


@pytest.mark.feature("multimodal targets", "targets with multimodal rotary positions")
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_tokens_are_those_without_drafter(engine, pair, plain, draft):
    parameters = [GREEDY, SEEDED] if draft == "tree" else [GREEDY]
    llm = engine(pair.target, {"method": "ctc", "model": str(pair.drafter), **DRAFTS[draft]}, **IMAGES)
    expected, given = answers(plain, parameters), answers(llm, parameters)
    each = [params for params in parameters for _ in CONVERSATIONS]
    assert len({tuple(output.outputs[0].token_ids) for output in expected}) == len(expected), "images do not matter"
    assert differences(plain, each, expected, given) == []
    assert llm.counters["accepted"] > 30


def test_a_server_takes_them_as_image_urls(pair, plain, tmp_path):
    """With trees, over HTTP, all at a time."""
    drafting = {"method": "ctc", "model": str(pair.drafter), **DRAFTS["tree"]}
    arguments = ["--max-model-len", "256", "--limit-mm-per-prompt", '{"image": 2}']
    expected = [output.outputs[0].text for output in plain.chat(CONVERSATIONS, GREEDY, use_tqdm=False)]
    with Server(pair.target, drafting, extra_args=arguments, log_path=tmp_path / "log") as server:
        client = server.client()
        given = [
            client.chat.completions.create(
                model=server.model, messages=messages, temperature=0, max_tokens=48, extra_body={"ignore_eos": True}
            ).choices[0].message.content
            for messages in CONVERSATIONS
        ]  # fmt: skip
        accepted = server.metrics()["vllm:spec_decode_num_accepted_tokens_total"]
    assert given == expected and accepted > 15
