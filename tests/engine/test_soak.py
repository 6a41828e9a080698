"""Hundreds of mixed requests that come and go, in a cache too small for them: every answer is the plain one."""

import random

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from .cached_blocks import wrong_blocks
from .conftest import DRAFTS
from .ties import differences

NUM_REQUESTS = 500
BLOCK = 32


def mixed_requests() -> list[tuple[dict, SamplingParams]]:
    """Prompts share beginnings; greedy, seeded, penalised and constrained requests of 1 to 60 tokens."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(2, 97) for _ in range(rng.choice([33, 64, 90]))] for _ in range(6)]
    kinds = (
        lambda i: {"temperature": 0},
        lambda i: {"temperature": 0},
        lambda i: {"temperature": 0, "frequency_penalty": 0.8},
        lambda i: {"temperature": 0, "structured_outputs": StructuredOutputsParams(regex="[a-h ]{4,40}[.]")},
        lambda i: {"temperature": 1.0, "seed": i},
        lambda i: {"temperature": 0.8, "seed": i, "top_k": 10, "presence_penalty": 0.4},
    )
    requests = []
    for i in range(NUM_REQUESTS):
        own = [rng.randrange(2, 97) for _ in range(rng.randrange(12))]
        tokens = rng.choice(beginnings)[: rng.choice([20, 64, 90])] + own
        params = SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=i % 3 > 0, **rng.choice(kinds)(i))
        requests.append(({"prompt_token_ids": tokens}, params))
    return requests


@pytest.fixture(scope="module")
def requests():
    return mixed_requests()


@pytest.fixture(scope="module")
def expected(plain, requests):
    prompts, parameters = zip(*requests)
    return plain.generate(list(prompts), list(parameters), use_tqdm=False)


def serve(llm, requests: list) -> tuple[dict[int, object], set[int]]:
    """Requests arrive in bursts, and some are aborted at random moments. Answers by number, and who was aborted."""
    rng, engine = random.Random(1), llm.llm_engine
    waiting, running, answers, aborted = list(range(len(requests))), {}, {}, set()
    while waiting or engine.has_unfinished_requests():
        if waiting and rng.random() < 0.3:
            for _ in range(min(rng.randint(1, 9), len(waiting))):
                number = waiting.pop(0)
                prompt, params = requests[number]
                running[number] = engine.add_request(str(number), prompt, params)
        if running and rng.random() < 0.08:
            number = rng.choice(list(running))
            engine.abort_request([running.pop(number)], internal=True)
            aborted.add(number)
        for output in engine.step():
            if output.finished:
                number = int(output.request_id)
                running.pop(number, None)
                if number not in aborted:
                    answers[number] = output
    return answers, aborted


@pytest.mark.feature("aborts in mid-stream", "preemption in a small KV cache", "prefix caching")
@pytest.mark.parametrize("draft", DRAFTS)
def test_every_answer_is_the_plain_one(engine, tiny_pair, plain, requests, expected, draft):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    llm = engine(
        tiny_pair.target, speculative, block_size=BLOCK, num_gpu_blocks_override=20, max_num_batched_tokens=200
    )
    answers, aborted = serve(llm, requests)
    assert len(answers) + len(aborted) == NUM_REQUESTS and len(aborted) > 20
    # A chain's rejection sampler keeps the law and not the dice.
    comparable = [n for n in sorted(answers) if draft == "tree" or requests[n][1].temperature == 0]
    assert len(comparable) > 200
    parameters = [requests[n][1] for n in comparable]
    given = [answers[n] for n in comparable]
    assert differences(plain, parameters, [expected[n] for n in comparable], given) == []
    counters = llm.counters
    assert counters["preemptions"] > 0 and counters["hits"] > 50 * BLOCK and counters["accepted"] > 1000
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # all but the null block
    latest = [answers[n].prompt_token_ids + list(answers[n].outputs[0].token_ids) for n in sorted(answers)[:-60:-1]]
    wrong, compared = wrong_blocks(llm, latest)
    assert wrong == [] and compared > 5
