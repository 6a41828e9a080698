"""Engines of several processes, and engines whose weights change while they run."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm import SamplingParams
from vllm.platforms import current_platform

from .conftest import DRAFTS, Pair, save_target
from .test_metrics import scrape_when_complete, start_server
from .ties import differences

PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 =", "Once there were seven dwarfs", "abcabcabcabcabc", "A farmer has"]
GREEDY = SamplingParams(temperature=0, max_tokens=48)


def drafting(pair: Pair, draft: str) -> dict:
    return {"method": "ctc", "model": str(pair.drafter), **DRAFTS[draft]}


@pytest.fixture(scope="module")
def expected(plain):
    return plain.generate(PROMPTS, GREEDY, use_tqdm=False)


@pytest.mark.slow
@pytest.mark.feature("data parallelism")
@pytest.mark.parametrize("draft", DRAFTS)
def test_two_data_parallel_engines(tiny_pair, plain, expected, tmp_path, draft):
    """A server of two engines answers a dozen requests at a time; both draft. About 40 s each."""
    log_path = tmp_path / "server.log"
    args = ("--data-parallel-size", "2", "--max-model-len", "256")
    with start_server(tiny_pair, drafting(tiny_pair, draft), log_path, *args) as server:

        def ask(prompt: str) -> str:
            completion = server.client().completions.create(
                model=server.model, prompt=prompt, temperature=0, max_tokens=GREEDY.max_tokens
            )
            return completion.choices[0].text

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, PROMPTS * 4))
        sums = scrape_when_complete(server)
    assert answers == [output.outputs[0].text for output in expected] * 4
    assert all(sums[f"vllm_ctc_spec:drafts_total of engine {number}"] > 0 for number in "01")
    assert sums["vllm:spec_decode_num_accepted_tokens_total"] > 100


@pytest.mark.feature("weights reloaded (`reload_weights`)")
@pytest.mark.parametrize("draft", DRAFTS)
def test_weights_are_replaced_while_the_engine_runs(engine, tiny_pair, plain, expected, tmp_path, draft):
    """As a policy is between steps of reinforcement learning; the drafter shares the new embedding and head."""
    llm = engine(tiny_pair.target, drafting(tiny_pair, draft))
    assert differences(plain, [GREEDY] * 6, expected, llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == []
    save_target(tmp_path, 98, seed=9)
    other = engine(tmp_path, max_logprobs=-1, tokenizer=str(tiny_pair.target))
    wanted = other.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert all(a.outputs[0].text != b.outputs[0].text for a, b in zip(wanted, expected))
    for folder, judge, answers in ((tmp_path, other, wanted), (tiny_pair.target, plain, expected)):
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        llm.reset_prefix_cache()
        llm.counters.clear()
        given = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert differences(judge, [GREEDY] * 6, answers, given) == []
        assert llm.counters["drafts"] > 0
    assert llm.counters["accepted"] > 20


ON_GPUS_ONLY = "not testable on a CPU: vLLM refuses it there"


@pytest.mark.feature("sleep and wake", chain=ON_GPUS_ONLY, tree=ON_GPUS_ONLY)
@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM has it on GPUs")
@pytest.mark.parametrize("draft", [None, *DRAFTS])
def test_sleep_mode_is_refused_on_a_cpu(engine, tiny_pair, draft):
    """With a drafter as without: vLLM frees a GPU's memory by a CUDA allocator. Should this fail, it can be tested."""
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine(tiny_pair.target, draft and drafting(tiny_pair, draft), enable_sleep_mode=True)


@pytest.mark.feature("Ray executor", chain=ON_GPUS_ONLY, tree=ON_GPUS_ONLY)
@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM has it on GPUs")
def test_ray_executor_is_refused_on_a_cpu():
    """vLLM asks Ray for devices by this name and ends where it has none (vllm/v1/executor/ray_utils.py)."""
    assert current_platform.ray_device_key == ""
