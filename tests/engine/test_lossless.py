"""Greedy output with the drafter is the output without it, token for token (ties aside), on the demo pair."""

import random
from itertools import product

import pytest
from pair import ASSETS
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from .conftest import TREE
from .ties import differences

NUM_PROMPTS = 100
NUM_SINGLE = 25  # one request at a time is slow, and finds what concurrent ones do not
MAX_TOKENS = 64
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
    return engine(demo_pair.target, max_model_len=512, max_logprobs=-1)


@pytest.fixture(scope="module")
def expected(plain, prompts) -> list[RequestOutput]:
    answers = plain.chat(prompts, GREEDY, use_tqdm=False)
    assert sum(len(answer.outputs[0].token_ids) for answer in answers) > NUM_PROMPTS * MAX_TOKENS / 2
    return answers


BLANKS = {"model": str(ASSETS / "drafter-ctc")}  # the paper's ways need a blank
TREES = {f"tree of {n}": {**TREE, "num_speculative_tokens": n} for n in (8, 16, 32, 64)}
DRAFTS = {
    "as the checkpoint says": {},
    "chain": {"ctc_draft": "chain"},
    **TREES,
    "transform": {**TREES["tree of 16"], "ctc_search": "transform", **BLANKS},
    "trees by batch size": {"ctc_draft": "tree", "num_speculative_tokens": 32, "ctc_tree_rows": 40},
    "drafts for one request at a time": {"ctc_draft": "tree", "num_speculative_tokens": 16, "ctc_tree_rows": 17},
}


@pytest.fixture(scope="module")
def with_drafter(engine, demo_pair):
    """with_drafter(options of the speculative config): an engine, started once for each."""
    started = {}

    def start(options: dict) -> LLM:
        key = tuple(options.items())
        if key not in started:
            speculative = {"method": "ctc", "model": str(demo_pair.drafter), **options}
            started[key] = engine(demo_pair.target, speculative, max_model_len=512)
        started[key].counters.clear()
        return started[key]

    return start


@pytest.mark.feature("greedy decoding", "synchronous scheduling")
@pytest.mark.parametrize("options", DRAFTS.values(), ids=DRAFTS)
def test_concurrent_requests_are_answered_as_without_drafter(with_drafter, plain, prompts, expected, options):
    llm = with_drafter(options)
    given = llm.chat(prompts, GREEDY, use_tqdm=False)
    assert differences(plain, [GREEDY] * NUM_PROMPTS, expected, given) == []
    assert llm.acceptance_length > 1.5


SOME = slice(0, NUM_PROMPTS, NUM_PROMPTS // NUM_SINGLE)


@pytest.mark.parametrize("draft", ["chain", "tree of 16"])
def test_single_requests_are_answered_as_without_drafter(with_drafter, plain, prompts, expected, draft):
    llm = with_drafter(DRAFTS[draft])
    given = [llm.chat([prompt], GREEDY, use_tqdm=False)[0] for prompt in prompts[SOME]]
    assert differences(plain, [GREEDY] * NUM_SINGLE, expected[SOME], given) == []
    assert llm.acceptance_length > 1.5


def test_the_papers_chain_is_lossless_too(with_drafter, plain, prompts, expected):
    llm = with_drafter({"ctc_draft": "chain", "ctc_search": "argmax", **BLANKS})
    given = llm.chat(prompts[SOME], GREEDY, use_tqdm=False)
    assert differences(plain, [GREEDY] * NUM_SINGLE, expected[SOME], given) == []


def test_more_is_accepted_of_exact_prefixes_and_of_larger_trees(with_drafter, prompts):
    def acceptance_length(options: dict) -> float:
        llm = with_drafter(options)
        llm.chat(prompts[SOME], GREEDY, use_tqdm=False)
        return llm.acceptance_length

    chain, tree = {**DRAFTS["chain"], **BLANKS}, {**DRAFTS["tree of 16"], **BLANKS}
    assert 1 < acceptance_length({**chain, "ctc_search": "argmax"}) < acceptance_length(chain)
    assert 1 < acceptance_length(DRAFTS["transform"]) < acceptance_length(tree)
    by_size = [acceptance_length(options) for options in TREES.values()]
    assert by_size == sorted(by_size)
    assert by_size[-1] > 1.15 * acceptance_length(DRAFTS["chain"])


def test_a_difference_that_is_no_tie_is_found(plain, expected):
    """A test of the test: one wrong token in one answer."""
    wrong = list(expected)
    first = expected[0].outputs[0]
    tokens = list(first.token_ids)
    tokens[5] = (tokens[5] + 1) % 1000
    changed = type(first)(**{**vars(first), "token_ids": tokens})
    wrong[0] = RequestOutput(**{**vars(expected[0]), "outputs": [changed]})
    assert len(differences(plain, [GREEDY] * NUM_PROMPTS, expected, wrong)) == 1
