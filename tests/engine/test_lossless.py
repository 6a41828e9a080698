"""Greedy output with the drafter is the output without it, token for token, on the demo pair.

fp32 leaves one freedom: a step of another width rounds differently, so two tokens whose log-probabilities are equal
to 1e-4 may change places. Such a place must be shown; any other difference fails.
"""

import random
from itertools import product

import pytest
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

NUM_PROMPTS = 100
NUM_SINGLE = 25  # one request at a time is slow, and finds what concurrent ones do not
MAX_TOKENS = 64
TIE = 1e-4
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)

NAMES = ("Amara", "Bruno", "Chiara", "Diego", "Emre", "Farah", "Goran", "Hana", "Ivo", "Jelena")
TEMPLATES = (
    "{name} buys {a} boxes with {b} pencils each and gives {c} pencils away. How many pencils are left?",
    "A train has {a} wagons with {b} seats each. {name} counts {c} empty seats. How many seats are taken?",
    "{name} earns ${b} an hour and works {a} hours. After paying ${c} for a bus ticket, how much money is left?",
    "There are {a} rows of {b} tomato plants in the garden of {name}. {c} plants dry up. How many plants remain?",
    "{name} reads {b} pages a day for {a} days, and {c} pages on Sunday. How many pages does {name} read in total?",
    "A baker makes {a} trays of {b} rolls. {name} buys {c} of the rolls. How many rolls does the baker still have?",
    "{name} saves ${a} every week for {b} weeks and then spends ${c} on a gift. How much does {name} have now?",
    "A tank holds {a} times {b} liters of water. {name} uses {c} liters. How many liters of water are in the tank?",
    "{name} has {a} bags of {b} marbles and finds {c} marbles more. How many marbles does {name} have?",
    "A class of {name} plants {a} trees in each of {b} streets, and {c} trees in the park. How many trees is that?",
)


@pytest.fixture(scope="module")
def prompts() -> list[list[dict[str, str]]]:
    """Every template with every name, other numbers each time."""
    numbers = random.Random(7)
    texts = [
        template.format(name=name, a=numbers.randint(5, 12), b=numbers.randint(6, 25), c=numbers.randint(2, 29))
        for template, name in product(TEMPLATES, NAMES)
    ]
    assert len(set(texts)) == NUM_PROMPTS
    return [[{"role": "user", "content": text}] for text in texts]


@pytest.fixture(scope="module")
def plain(engine, demo_pair) -> LLM:
    return engine(demo_pair.target, max_model_len=512)


@pytest.fixture(scope="module")
def expected(plain, prompts) -> list[RequestOutput]:
    answers = plain.chat(prompts, GREEDY, use_tqdm=False)
    assert sum(len(answer.outputs[0].token_ids) for answer in answers) > NUM_PROMPTS * MAX_TOKENS / 2
    return answers


@pytest.fixture(scope="module")
def with_drafter(engine, demo_pair) -> LLM:
    """As a user asks for it: the number of speculative tokens is the checkpoint's."""
    return engine(demo_pair.target, {"method": "ctc", "model": str(demo_pair.drafter)}, max_model_len=512)


def differences(plain: LLM, expected: list[RequestOutput], given: list[RequestOutput]) -> list[str]:
    """Where the outputs differ although no tie explains it."""
    found = []
    for mine, theirs in zip(expected, given, strict=True):
        assert mine.prompt_token_ids == theirs.prompt_token_ids
        a, b = list(mine.outputs[0].token_ids), list(theirs.outputs[0].token_ids)
        if a == b:
            continue
        at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is None:
            found.append(f"{mine.prompt!r}: {len(a)} tokens became {len(b)}")
            continue
        context = {"prompt_token_ids": mine.prompt_token_ids + a[:at]}
        single = SamplingParams(temperature=0, max_tokens=1, logprobs=2)
        top = plain.generate([context], single, use_tqdm=False)[0].outputs[0].logprobs[0]
        gap = abs(top[a[at]].logprob - top[b[at]].logprob) if b[at] in top and a[at] in top else float("inf")
        if gap > TIE:
            found.append(f"{mine.prompt!r}: token {at} is {b[at]}, expected {a[at]} (apart by {gap:g})")
    return found


def test_concurrent_requests_are_answered_as_without_drafter(with_drafter, plain, prompts, expected):
    with_drafter.counters.clear()
    given = with_drafter.chat(prompts, GREEDY, use_tqdm=False)
    assert differences(plain, expected, given) == []
    assert with_drafter.acceptance_length > 1.5


def test_single_requests_are_answered_as_without_drafter(with_drafter, plain, prompts, expected):
    with_drafter.counters.clear()
    some = slice(0, NUM_PROMPTS, NUM_PROMPTS // NUM_SINGLE)
    given = [with_drafter.chat([prompt], GREEDY, use_tqdm=False)[0] for prompt in prompts[some]]
    assert differences(plain, expected[some], given) == []
    assert with_drafter.acceptance_length > 1.5


def test_the_papers_search_is_lossless_too_and_accepts_less(engine, demo_pair, with_drafter, plain, prompts, expected):
    some = slice(0, NUM_PROMPTS, NUM_PROMPTS // NUM_SINGLE)
    speculative = {"method": "ctc", "model": str(demo_pair.drafter), "ctc_search": "argmax"}
    argmax = engine(demo_pair.target, speculative, max_model_len=512)
    given = argmax.chat(prompts[some], GREEDY, use_tqdm=False)
    assert differences(plain, expected[some], given) == []
    with_drafter.counters.clear()
    with_drafter.chat(prompts[some], GREEDY, use_tqdm=False)
    assert 1 < argmax.acceptance_length < with_drafter.acceptance_length


def test_a_difference_that_is_no_tie_is_found(plain, expected):
    """A test of the test: one wrong token in one answer."""
    wrong = list(expected)
    first = expected[0].outputs[0]
    tokens = list(first.token_ids)
    tokens[5] = (tokens[5] + 1) % 1000
    changed = type(first)(**{**vars(first), "token_ids": tokens})
    wrong[0] = RequestOutput(**{**vars(expected[0]), "outputs": [changed]})
    assert len(differences(plain, expected, wrong)) == 1
