"""Other ways to run the same engine: answers stay those of the plain one."""

import pytest
from vllm import LLM
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from .conftest import DRAFTS
from .ties import differences
from .test_soak import BLOCK, mixed_requests, serve

NUM_REQUESTS = 150


@pytest.fixture(scope="module")
def requests():
    return mixed_requests()[:NUM_REQUESTS]


@pytest.fixture(scope="module")
def plain(engine, tiny_pair) -> LLM:
    return engine(tiny_pair.target, max_logprobs=-1)


@pytest.fixture(scope="module")
def expected(plain, requests):
    prompts, parameters = zip(*requests)
    return plain.generate(list(prompts), list(parameters), use_tqdm=False)


def force_async_scheduling(patch: pytest.MonkeyPatch) -> None:
    platform = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config) -> None:
        asked_for = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked_for

    patch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))


def count_overlaps(scheduler, counters) -> None:
    in_flight = []
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def scheduled(*args, **kwargs):
        output = schedule(*args, **kwargs)
        requests = set(output.num_scheduled_tokens)
        if output.total_num_scheduled_tokens:
            counters["batches"] += 1
            counters["ahead"] += bool(in_flight)
            counters["own"] += any(requests & earlier for earlier in in_flight)
            counters["deferred"] += output.pending_structured_output_tokens
            assert len(in_flight) < 2
        in_flight.append(requests)
        return output

    def updated(output, *args, **kwargs):
        assert in_flight.pop(0) == set(output.num_scheduled_tokens)
        return update(output, *args, **kwargs)

    scheduler.schedule, scheduler.update_from_output = scheduled, updated


@pytest.mark.parametrize("draft", DRAFTS)
def test_async(engine, tiny_pair, plain, requests, expected, monkeypatch, draft):
    force_async_scheduling(monkeypatch)
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    llm = engine(
        tiny_pair.target, speculative, block_size=BLOCK, num_gpu_blocks_override=20, max_num_batched_tokens=200,
        async_scheduling=True,
    )
    core = llm.llm_engine.engine_core.engine_core
    print(type(core.scheduler), core.step_fn, core.batch_queue_size)
    assert type(core.scheduler) is AsyncScheduler
    count_overlaps(core.scheduler, llm.counters)
    answers, aborted = serve(llm, requests)
    print(llm.counters, len(aborted), len(answers))
    comparable = [n for n in sorted(answers) if draft == "tree" or requests[n][1].temperature == 0]
    parameters = [requests[n][1] for n in comparable]
    given = [answers[n] for n in comparable]
    assert differences(plain, parameters, [expected[n] for n in comparable], given) == []
