"""Beginnings of prompts are cached as without a drafter, and a hit costs no acceptance.

A cached block holds what a fresh prefill would write, the drafter's own keys and values among it, whoever wrote it: a
prefill, accepted drafts, or a step too large for drafts. (Asynchronous scheduling: test_modes.py.)

With synchronous scheduling, as here, vLLM does not cache a block that the last verification of a request fills,
whatever drafts. Answers therefore end more than a step behind the end of a block.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from vllm import SamplingParams

from .cached_blocks import engine_core, wrong_blocks
from .conftest import DRAFTS

BLOCK = 32
MAX_TOKENS = 24
NUM_DRAFTED = {"chain": 4, "tree": 16}
MOST_DRAFTED_FOR = 4  # requests; larger batches get no drafts
SCHEDULE = "num_speculative_tokens_per_batch_size"


@pytest.fixture(scope="module")
def plain_engine(engine, tiny_pair):
    return engine(tiny_pair.target, block_size=BLOCK)


@pytest.fixture(scope="module", params=DRAFTS)
def drafting_engine(request, engine, tiny_pair):
    number = NUM_DRAFTED[request.param]
    schedule = [(1, MOST_DRAFTED_FOR, number), (1 + MOST_DRAFTED_FOR, 8, 0)]
    drafter = {"method": "ctc", "model": str(tiny_pair.drafter), "ctc_draft": request.param}
    return engine(tiny_pair.target, {**drafter, "num_speculative_tokens": number, SCHEDULE: schedule}, block_size=BLOCK)


@pytest.fixture
def plain(plain_engine):
    plain_engine.reset_prefix_cache()
    return plain_engine


@pytest.fixture
def ctc(drafting_engine):
    drafting_engine.reset_prefix_cache()
    return drafting_engine


def prompts(*lengths: int, beginning: Sequence[int] = (), seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[*beginning, *torch.randint(2, 98, (n,), generator=generator).tolist()] for n in lengths]


def whole_blocks(tokens: list[int]) -> int:
    """Tokens in the blocks that a prompt which begins with these tokens may find. The last one has no keys yet."""
    return (len(tokens) - 1) // BLOCK * BLOCK


def ask(llm, asked: list[list[int]], **options) -> tuple[list[list[int]], Counter[str]]:
    """Prompts with their greedy answers, and what was counted meanwhile."""
    llm.counters.clear()
    params = SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **options})
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in asked], params, use_tqdm=False)
    return [tokens + list(output.outputs[0].token_ids) for tokens, output in zip(asked, outputs)], llm.counters.copy()


def drafted(counters: Counter[str]) -> tuple[int, int]:
    assert counters["accepted"] > 0
    return counters["drafts"], counters["accepted"]


@pytest.mark.feature("prefix caching")
def test_hits_are_those_without_a_drafter(plain, ctc):
    """The same prompts again, a second turn of each conversation, prompts that share a beginning. Drafts are accepted
    as without hits."""
    first = prompts(3, 100, 31, 80, seed=0)
    turns, before = ask(ctc, first)
    assert (turns, before["hits"]) == (ask(plain, first)[0], 0)
    second = [turn + more for turn, more in zip(turns, prompts(9, 1, 32, 20, seed=1))]
    shared = prompts(5, 6, 7, 60, beginning=first[1][:70], seed=2)
    after = []
    for asked, cached in ((first, first), (second, turns), (shared, [first[1][:65]] * 4), (shared, shared)):
        answers, counters = ask(ctc, asked)
        assert counters["hits"] == sum(map(whole_blocks, cached))
        expected, counted = ask(plain, asked)
        assert (answers, counters["hits"]) == (expected, counted["hits"])
        after.append(drafted(counters))
    assert after[0] == drafted(before) and after[2] == after[3]
    for asked, with_hits in ((second, after[1]), (shared, after[2])):
        ctc.reset_prefix_cache()
        assert drafted(ask(ctc, asked)[1]) == with_hits


def test_blocks_of_steps_without_drafts(plain, ctc):
    """A batch too large for drafts still stores the drafter's keys and values."""
    first = prompts(*range(30, 38), beginning=prompts(40, seed=3)[0], seed=4)
    turns, counters = ask(ctc, first, max_tokens=60)
    assert len(turns) > MOST_DRAFTED_FOR and counters["drafts"] == 0
    some = turns[:3]
    answers, with_hits = ask(ctc, some)
    assert with_hits["hits"] == sum(map(whole_blocks, some))
    ctc.reset_prefix_cache()
    expected, without = ask(ctc, some)
    assert answers == expected == ask(plain, some)[0]
    assert drafted(with_hits) == drafted(without)


def test_cached_blocks_are_those_of_a_fresh_prefill(ctc):
    turns, _ = ask(ctc, prompts(3, 100, 31, 90, seed=5), max_tokens=60)
    many, _ = ask(ctc, prompts(*range(30, 38), seed=6), max_tokens=60)
    further, counters = ask(ctc, [tokens + [7] for tokens in turns[:2] + many[:2]])
    assert counters["hits"] > 8 * BLOCK
    wrong, compared = wrong_blocks(ctc, further + turns + many)
    assert wrong == [] and compared >= sum(whole_blocks(tokens) // BLOCK for tokens in further + many)


@pytest.mark.parametrize("penalty", [0, 0.5])
def test_one_token_left_to_compute(plain, ctc, monkeypatch, penalty):
    """vLLM computes the last token of a prompt always. Without a schedule of drafts by batch size, it verifies it
    together with N drafts that nobody has made."""
    monkeypatch.setattr(engine_core(ctc).scheduler, "dynamic_sd_lookup", None)
    asked = prompts(65, 97, 33, seed=7)
    expected, _ = ask(plain, asked, frequency_penalty=penalty)
    given, before = ask(ctc, asked, frequency_penalty=penalty)
    again, counters = ask(ctc, asked, frequency_penalty=penalty)
    assert given == again == expected
    assert counters["hits"] == sum(len(tokens) - 1 for tokens in asked)
    drafts, accepted = drafted(before)
    assert drafted(counters) == (drafts + len(asked), accepted)


def test_resumed_after_preemption(plain, ctc):
    asked = prompts(90, 93, seed=8)
    expected, _ = ask(plain, asked)
    kept = preempted(ctc, asked, reset=False)
    assert kept.tokens == expected and kept.counters["hits after preemption"] == 2 * 3 * BLOCK
    gone = preempted(ctc, asked, reset=True)
    assert gone.tokens == expected and gone.counters["hits after preemption"] == 0
    assert drafted(kept.counters) == drafted(gone.counters)
    assert preempted(plain, asked, reset=False).counters["hits after preemption"] == 2 * 3 * BLOCK


class Answers(NamedTuple):
    tokens: list[list[int]]
    counters: Counter[str]


def preempted(llm, asked: list[list[int]], reset: bool) -> Answers:
    """Every request is preempted once, when its fourth block is begun. reset: what it has written is gone."""
    llm.reset_prefix_cache()
    llm.counters.clear()
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    for number, tokens in enumerate(asked):
        engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
    finished, has_run = {}, False
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
        lengths = [request.num_tokens for request in scheduler.running]
        if not has_run and min(lengths) > 3 * BLOCK + 5:
            has_run = True
            assert len(lengths) == len(asked) and max(lengths) < 4 * BLOCK
            while scheduler.running:
                scheduler._preempt_request(scheduler.running.pop(), time.monotonic())
            if reset:
                assert llm.reset_prefix_cache()
    assert llm.counters["preemptions"] == len(asked)
    return Answers([tokens + finished[number] for number, tokens in enumerate(asked)], llm.counters.copy())


def test_blocks_without_the_drafters_keys(plain, ctc):
    """Whatever the drafter reads in a block, no token of the target depends on it."""
    asked = prompts(130, 200, 101, seed=9)
    expected, before = ask(ctc, asked)
    assert expected == ask(plain, asked)[0]
    runner = engine_core(ctc).model_executor.driver_worker.worker.model_runner
    drafter_layers = runner.speculator.draft_attn_layer_names
    for name in drafter_layers:
        runner.compilation_config.static_forward_context[name].kv_cache.normal_(std=10)
    given, counters = ask(ctc, asked)
    assert given == expected and counters["hits"] == sum(map(whole_blocks, asked))
    assert drafted(counters) != drafted(before)
    assert set(wrong_blocks(ctc, asked)[0]) == drafter_layers
