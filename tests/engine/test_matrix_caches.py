"""Keys and values in another form than the model's, or kept outside the engine: the drafter's are with the target's."""

import pytest
import torch
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from vllm_ctc_spec.serving import cpu

from .test_matrix_targets import answered_as_without_drafter, drafting
from .ties import differences

BLOCK = 32
PROMPT_LENGTHS = (3, 70, 31, 130)
STORED = [0, 2 * BLOCK, 0, 4 * BLOCK]  # whole blocks of them
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


@pytest.mark.feature("quantised KV cache", chain="same tokens")
@pytest.mark.skipif(
    cpu.is_needed() and not torch.cpu._is_avx512_supported(), reason="vLLM needs AVX-512 for 8-bit keys on a CPU"
)
def test_keys_and_values_of_8_bits(engine, tiny_pair):
    llm = answered_as_without_drafter(engine, tiny_pair, "chain", kv_cache_dtype="fp8")
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    caches = [
        layer.self_attn.attn.kv_cache for layer in (*runner.model.model.layers, *runner.speculator.model.model.layers)
    ]
    assert [cache.element_size() for cache in caches] == [1] * 6


def prompts() -> list[dict]:
    dice = torch.Generator().manual_seed(0)
    return [{"prompt_token_ids": torch.randint(2, 97, (n,), generator=dice).tolist()} for n in PROMPT_LENGTHS]


@pytest.fixture
def with_store(engine, tiny_pair, tmp_path):
    """with_store(): a drafting engine that keeps the keys and values of prompts in one folder. One at a time: vLLM has
    one connector a process, and hands it to the engines that come."""

    def start():
        ensure_kv_transfer_shutdown()
        store = KVTransferConfig(
            kv_connector="ExampleConnector", kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": str(tmp_path)},
        )  # fmt: skip
        options = {"block_size": BLOCK, "enable_prefix_caching": False, "kv_transfer_config": store}
        return engine(tiny_pair.target, drafting(tiny_pair, "chain"), **options)

    yield start
    ensure_kv_transfer_shutdown()


@pytest.mark.feature("KV connectors", chain="same tokens")
def test_what_one_engine_has_stored_another_one_reads(engine, tiny_pair, with_store):
    plain = engine(tiny_pair.target, block_size=BLOCK, enable_prefix_caching=False, max_logprobs=-1)
    expected = plain.generate(prompts(), GREEDY, use_tqdm=False)
    accepted = []
    for read in ([0] * 4, STORED):
        llm = with_store()
        given = llm.generate(prompts(), GREEDY, use_tqdm=False)
        assert differences(plain, [GREEDY] * 4, expected, given) == []
        assert [output.num_cached_tokens for output in given] == read
        accepted.append(llm.counters["accepted"])
    # The context's keys and values of the drafter are stored too: it drafts as well as the one that has computed them.
    assert accepted[0] == accepted[1] > 20
