"""What a request may ask for: with a drafter it gets the answer that it gets without.

Every greedy case is compared token for token, text and reasons of the end included, over concurrent requests of
different lengths; and the case must change something, or the comparison would show nothing.
"""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import StructuredOutputsParams

from .conftest import TREE

PROMPTS = [
    "Tom has 3 apples.",
    "?",
    "A train leaves the station at noon, and another one follows it an hour later; when do they meet?",
    "12 + 30 =",
    "Once there were seven dwarfs",
    "abcabcabcabcabc",
]
LENGTH = 48
PENALISED = {"temperature": 1.0, "presence_penalty": 1.0, "bad_words": ["e", "ab"]}


@pytest.fixture(scope="module")
def plain(tiny_pair, engine):
    return engine(tiny_pair.target)


@pytest.fixture(scope="module")
def ctc_chain(tiny_pair, engine):
    return engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter)})


@pytest.fixture(scope="module")
def ctc_tree(tiny_pair, engine):
    return engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), **TREE})


@pytest.fixture(scope="module", params=["ctc_chain", "ctc_tree"])
def ctc(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def sampling_ctc(tiny_pair, engine):
    drafter = {"method": "ctc", "model": str(tiny_pair.drafter), "draft_sample_method": "probabilistic"}
    return engine(tiny_pair.target, drafter)


def ask(llm, prompts=PROMPTS, **parameters) -> list[RequestOutput]:
    settings = {"temperature": 0, "max_tokens": LENGTH, **parameters}
    return llm.generate(prompts, SamplingParams(**settings), use_tqdm=False)


def answers(outputs: list[RequestOutput]) -> list[list[tuple]]:
    return [
        [(list(sample.token_ids), sample.text, sample.finish_reason, sample.stop_reason) for sample in out.outputs]
        for out in outputs
    ]


@pytest.fixture(scope="module")
def usual(plain):
    return answers(ask(plain))


@pytest.fixture(scope="module")
def usual_tokens(usual) -> list[int]:
    """The unrestricted answer to the first prompt; the cases below forbid and demand parts of it."""
    return usual[0][0][0]


@pytest.fixture(scope="module")
def usual_text(usual) -> str:
    return usual[0][0][1]


CASES = {
    "one token": lambda tokens, text: {"max_tokens": 1},
    "two tokens": lambda tokens, text: {"max_tokens": 2},
    "seven tokens": lambda tokens, text: {"max_tokens": 7},
    "stop string": lambda tokens, text: {"stop": [text[9:11]]},
    "stop string, kept": lambda tokens, text: {"stop": [text[9:12]], "include_stop_str_in_output": True},
    "stop token": lambda tokens, text: {"stop_token_ids": [tokens[12]]},
    "min_tokens": lambda tokens, text: {"stop_token_ids": [tokens[3]], "min_tokens": 20},
    "presence penalty": lambda tokens, text: {"presence_penalty": 1.5},
    "frequency penalty": lambda tokens, text: {"frequency_penalty": 1.2},
    "repetition penalty": lambda tokens, text: {"repetition_penalty": 1.4},
    "all penalties": lambda tokens, text: {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
    },
    "bad words": lambda tokens, text: {"bad_words": [text[4], text[6:8], text[20:23]]},
    "allowed tokens": lambda tokens, text: {"allowed_token_ids": list(range(10, 50))},
    "regex": lambda tokens, text: {"structured_outputs": StructuredOutputsParams(regex="[a-f]{3}-[0-9]{4}")},
    "choice": lambda tokens, text: {
        "structured_outputs": StructuredOutputsParams(choice=["left side", "leaves", "right"])
    },
}


# Rows of the table.
ROWS = {
    "one token": "`max_tokens`",
    "two tokens": "`max_tokens`",
    "seven tokens": "`max_tokens`",
    "stop string": "stop strings",
    "stop string, kept": "stop strings",
    "stop token": "stop tokens",
    "min_tokens": "`min_tokens`",
    "presence penalty": "penalties",
    "frequency penalty": "penalties",
    "repetition penalty": "penalties",
    "all penalties": "penalties",
    "bad words": "bad words",
    "allowed tokens": "allowed tokens",
    "regex": "structured output: regex",
    "choice": "structured output: choice",
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=pytest.mark.feature(ROWS[name])) for name, case in CASES.items()]
)
def test_greedy_answers_are_those_without_drafter(plain, ctc, usual, usual_tokens, usual_text, case):
    parameters = case(usual_tokens, usual_text)
    expected = answers(ask(plain, **parameters))
    assert expected != usual
    assert answers(ask(ctc, **parameters)) == expected


def test_answers_vary_and_drafts_are_accepted_and_rejected_in_these_tests(ctc, usual):
    ctc.counters.clear()
    assert answers(ask(ctc)) == usual
    assert all(len(set(several[0][0])) > 10 for several in usual)
    assert 1.3 < ctc.acceptance_length < 4


@pytest.mark.feature("requests of all kinds in one batch")
def test_requests_of_all_kinds_share_a_batch(plain, ctc, usual_tokens, usual_text):
    parameters = [
        SamplingParams(**{"temperature": 0, "max_tokens": LENGTH, **case(usual_tokens, usual_text)})
        for case in CASES.values()
    ]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(parameters))]
    expected = answers(plain.generate(prompts, parameters, use_tqdm=False))
    assert answers(ctc.generate(prompts, parameters, use_tqdm=False)) == expected


@pytest.mark.feature("bad words")
def test_bad_words_that_begin_in_a_draft(plain, ctc, usual_text):
    """Another pair of characters is forbidden to each request; some begin with a draft and end with the next."""
    parameters = [
        SamplingParams(temperature=0, max_tokens=LENGTH, bad_words=[usual_text[k : k + 2]]) for k in range(1, 31)
    ]
    prompts = PROMPTS[:1] * len(parameters)
    expected = answers(plain.generate(prompts, parameters, use_tqdm=False))
    assert answers(ctc.generate(prompts, parameters, use_tqdm=False)) == expected


def close_logprobs(mine, theirs) -> bool:
    """Two lists of {token: Logprob}; the order of ties is free, so values are compared rank by rank."""
    if mine is None or theirs is None:
        return mine is theirs
    return len(mine) == len(theirs) and all(
        (a is None and b is None)
        or [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=1e-3)
        and [x.rank for x in a.values()] == [x.rank for x in b.values()]
        and list(a) == list(b)
        for a, b in zip(mine, theirs)
    )


@pytest.mark.feature("logprobs", "prompt logprobs")
def test_logprobs_are_those_without_drafter(plain, ctc):
    asked = {"logprobs": 3, "prompt_logprobs": 2, "presence_penalty": 0.7}
    expected, given = ask(plain, **asked), ask(ctc, **asked)
    assert answers(given) == answers(expected)
    for mine, theirs in zip(given, expected, strict=True):
        assert len(mine.outputs[0].logprobs) == LENGTH and len(mine.outputs[0].logprobs[0]) >= 3
        assert close_logprobs(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)
        assert len(mine.prompt_logprobs) == len(mine.prompt_token_ids)
        assert close_logprobs(mine.prompt_logprobs, theirs.prompt_logprobs)


def test_logprobs_of_one_token_that_is_all_of_the_answer(plain, ctc):
    asked = {"logprobs": 0, "max_tokens": 1}
    for mine, theirs in zip(ask(ctc, **asked), ask(plain, **asked), strict=True):
        assert close_logprobs(mine.outputs[0].logprobs, theirs.outputs[0].logprobs)


@pytest.mark.parametrize("drafts", ["ctc_chain", "sampling_ctc", "ctc_tree"])
@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top_k", "top_p"])
def test_sampling_restricted_to_the_best_token_is_greedy(request, usual, drafts, restriction):
    llm = request.getfixturevalue(drafts)
    assert answers(ask(llm, temperature=1.0, seed=5, **restriction)) == usual


@pytest.mark.parametrize("drafts", ["ctc_chain", "sampling_ctc", "ctc_tree"])
def test_top_k_admits_no_other_token(request, drafts):
    llm = request.getfixturevalue(drafts)
    outputs = ask(llm, temperature=2.0, top_k=3, seed=5, logprobs=3)
    ranks = [
        step[token].rank for out in outputs for token, step in zip(out.outputs[0].token_ids, out.outputs[0].logprobs)
    ]
    assert set(ranks) == {1, 2, 3}


@pytest.mark.parametrize("drafts", ["ctc_chain", "sampling_ctc", "ctc_tree"])
def test_top_p_admits_the_smallest_sufficient_set(request, drafts):
    """At temperature 1 the raw logprobs are the sampled law: what ranks before a token may not reach top_p."""
    llm = request.getfixturevalue(drafts)
    outputs = ask(llm, temperature=1.0, top_p=0.7, seed=5, logprobs=20)
    seen_below_the_best = False
    for out in outputs:
        for token, step in zip(out.outputs[0].token_ids, out.outputs[0].logprobs):
            better = sum(2.718281828**x.logprob for x in step.values() if x.rank < step[token].rank)
            assert better < 0.7 + 1e-3
            seen_below_the_best |= step[token].rank > 1
    assert seen_below_the_best


@pytest.mark.feature("seeds", chain="reproducible")
@pytest.mark.parametrize("drafts", ["ctc_chain", "sampling_ctc", "ctc_tree"])
def test_a_seed_decides_the_answer_alone_and_among_others(request, drafts):
    llm = request.getfixturevalue(drafts)
    together = answers(ask(llm, temperature=1.0, seed=11))
    assert answers(ask(llm, temperature=1.0, seed=11)) == together
    assert answers(ask(llm, prompts=PROMPTS[2:3], temperature=1.0, seed=11)) == together[2:3]
    assert answers(ask(llm, temperature=1.0, seed=12)) != together


@pytest.mark.parametrize("drafts", ["ctc_chain", "sampling_ctc", "ctc_tree"])
def test_several_samples_of_a_request(request, drafts):
    llm = request.getfixturevalue(drafts)
    samples = answers(ask(llm, prompts=PROMPTS[:2], temperature=1.0, seed=3, n=3))
    assert [len(s) for s in samples] == [3, 3]
    for several in samples:
        assert len({tuple(tokens) for tokens, *_ in several}) == 3
    assert answers(ask(llm, prompts=PROMPTS[:2], temperature=1.0, seed=3, n=3)) == samples


@pytest.mark.feature("seeds", "temperature", "top-k", "top-p", "`n` > 1", tree="same tokens")
@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "n": 3},
        PENALISED,
    ],
    ids=str,
)
def test_with_a_tree_a_seed_gives_the_sample_that_it_gives_without_drafter(plain, ctc_tree, parameters):
    """Every node's token is drawn with the noise of its position; with chains only the law is the same."""
    ctc_tree.counters.clear()
    assert answers(ask(ctc_tree, seed=21, **parameters)) == answers(ask(plain, seed=21, **parameters))
    assert ctc_tree.counters["accepted"] > 0


def test_sampled_drafts_leave_greedy_requests_alone(sampling_ctc, usual):
    assert answers(ask(sampling_ctc)) == usual


REFUSED = "request refused: by vLLM with any drafter"


@pytest.mark.feature("`min_p`, `logit_bias`", chain=REFUSED, tree=REFUSED)
@pytest.mark.parametrize("parameters", [{"min_p": 0.1}, {"logit_bias": {5: 3.0}}], ids=["min_p", "logit_bias"])
def test_vllms_own_refusal_arrives(ctc, parameters):
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias.*not yet supported with speculative decoding"):
        ask(ctc, temperature=1.0, **parameters)
