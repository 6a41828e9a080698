"""Engines at their limits answer as without a drafter: budgets and frames, caches, chunks, the end of the context."""

import pytest
import torch
from vllm import SamplingParams

from .conftest import DRAFTS, TREE

BLOCK = 32
FRAMES, CONTEXT = 12, 256
OPTIONS = {"max_model_len": CONTEXT, "block_size": BLOCK}
GREEDY = SamplingParams(temperature=0, max_tokens=40)
PROMPT_LENGTHS = (3, 100, 31, 64, 17, 90)


def token_prompts(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [{"prompt_token_ids": torch.randint(2, 98, (n,), generator=generator).tolist()} for n in lengths]


def answers(llm, prompts, parameters=GREEDY) -> list[tuple]:
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return [(list(out.outputs[0].token_ids), out.outputs[0].finish_reason) for out in outputs]


@pytest.fixture(scope="module")
def plain(tiny_pair, engine):
    return engine(tiny_pair.target, enable_prefix_caching=False, **OPTIONS)


@pytest.fixture(scope="module", params=DRAFTS)
def ctc(request, tiny_pair, engine):
    """ctc(speculative options, **engine options): drafting chains, and drafting trees."""

    def start(speculative: dict | None = None, **options):
        drafter = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[request.param], **(speculative or {})}
        return engine(tiny_pair.target, drafter, **{"enable_prefix_caching": False, **OPTIONS, **options})

    return start


@pytest.fixture(scope="module")
def expected(plain):
    return answers(plain, token_prompts(*PROMPT_LENGTHS))


@pytest.mark.parametrize("budget", [1, 4, FRAMES])
def test_budgets_below_and_at_the_number_of_frames(ctc, expected, budget):
    llm = ctc({"num_speculative_tokens": budget})
    assert answers(llm, token_prompts(*PROMPT_LENGTHS)) == expected
    assert llm.counters["drafted"] == pytest.approx(budget * llm.counters["drafts"], rel=0.1)
    assert llm.counters["accepted"] > 0


WAYS = (
    {"ctc_search": "argmax"},
    {"draft_sample_method": "probabilistic"},
    {**TREE, "ctc_search": "transform"},
    {**TREE, "ctc_tree_width": 2, "ctc_tree_depth": 3},
    {**TREE, "num_speculative_tokens": 64, "ctc_tree_depth": FRAMES},
)


@pytest.mark.parametrize("speculative", WAYS, ids=str)
def test_other_ways_to_draft(tiny_pair, engine, expected, speculative):
    drafter = {"method": "ctc", "model": str(tiny_pair.drafter), **speculative}
    llm = engine(tiny_pair.target, drafter, enable_prefix_caching=False, **OPTIONS)
    assert answers(llm, token_prompts(*PROMPT_LENGTHS)) == expected
    assert llm.counters["drafts"] > 0


@pytest.mark.feature("chunked prefill")
def test_prefill_in_chunks_beside_decodes(ctc, expected):
    llm = ctc(max_num_batched_tokens=48)
    assert answers(llm, token_prompts(*PROMPT_LENGTHS)) == expected
    assert llm.counters["accepted"] > 0


@pytest.mark.feature("preemption in a small KV cache")
def test_requests_are_preempted_and_resumed(ctc, expected):
    """Nine blocks hold the longest request, and not all of them."""
    llm = ctc(num_gpu_blocks_override=10)
    assert answers(llm, token_prompts(*PROMPT_LENGTHS)) == expected
    assert llm.counters["preemptions"] > 0 and llm.counters["accepted"] > 0


@pytest.mark.feature("end of the context (`max_model_len`)")
@pytest.mark.parametrize("prompt_length", [CONTEXT - 1, CONTEXT - 2, CONTEXT - 3, CONTEXT - 6, CONTEXT - 20])
def test_the_end_of_the_context(ctc_at_the_end, plain, prompt_length):
    """Frames and drafts would reach beyond it; the answer ends exactly there."""
    prompts = token_prompts(prompt_length)
    given = answers(ctc_at_the_end, prompts)
    assert given == answers(plain, prompts)
    assert len(given[0][0]) == CONTEXT - prompt_length and given[0][1] == "length"


@pytest.fixture(scope="module")
def ctc_at_the_end(ctc):
    return ctc()


def test_requests_at_the_end_of_the_context_do_not_disturb_others(ctc_at_the_end, plain):
    prompts = token_prompts(CONTEXT - 5, 20, CONTEXT - 1, 50)
    assert answers(ctc_at_the_end, prompts) == answers(plain, prompts)


@pytest.mark.feature("more requests than `max_num_seqs`")
def test_more_requests_than_slots(ctc, plain):
    llm = ctc(max_num_seqs=3)
    prompts = token_prompts(*range(5, 25))
    assert answers(llm, prompts) == answers(plain, prompts)
