"""Other ways to run an engine, each with the answers of the usual one without drafter: asynchronous scheduling, LoRA
adapters on the target, tensor parallelism. Chains and trees; every test shows that its mode was really at work.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from .cached_blocks import wrong_blocks
from .conftest import DRAFTS, Engine, Pair, save_drafter, save_target, save_tokenizer
from .test_soak import BLOCK, mixed_requests, serve
from .ties import differences

NUM_REQUESTS = 150  # asynchronous; the other modes take the first of them
SMALL_CACHE = {"block_size": BLOCK, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 200}


@pytest.fixture(scope="module")
def requests() -> list[tuple[dict, SamplingParams]]:
    """Greedy, seeded, penalised and regex-constrained ones of 1 to 60 tokens; prompts share beginnings."""
    return mixed_requests()[:NUM_REQUESTS]


@pytest.fixture(scope="module")
def expected(plain, requests):
    return answer(plain, requests)


def speculative(pair: Pair, draft: str) -> dict:
    return {"method": "ctc", "model": str(pair.drafter), **DRAFTS[draft]}


def answer(llm: LLM, requests: list, **options) -> list:
    prompts, parameters = zip(*requests)
    return llm.generate(list(prompts), list(parameters), use_tqdm=False, **options)


def wrong_answers(plain, requests: list, expected: list, given: dict, draft: str) -> list[str]:
    """`given` by number of the request. A chain's rejection sampler keeps the law of a sample and not the dice."""
    numbers = [n for n in sorted(given) if draft == "tree" or requests[n][1].temperature == 0]
    assert len({requests[n][1].structured_outputs is not None for n in numbers}) == 2
    assert any(requests[n][1].frequency_penalty for n in numbers)
    assert draft == "chain" or any(requests[n][1].seed is not None for n in numbers)
    parameters = [requests[n][1] for n in numbers]
    return differences(plain, parameters, [expected[n] for n in numbers], [given[n] for n in numbers])


# --- asynchronous scheduling ---


def count_batches(llm: Engine) -> Counter[str]:
    """Count "batches", those scheduled "ahead" of a result of one of their own requests, and of these the ones that
    were "sampled" ahead of it too, which those with a constrained request are not: its grammar must advance first."""
    core = llm.llm_engine.engine_core.engine_core
    scheduler, executor = core.scheduler, core.model_executor
    assert type(scheduler) is AsyncScheduler and core.step_fn == core.step_with_batch_queue
    counters, in_flight, latest = Counter(), [], set()
    schedule, update, sample = scheduler.schedule, scheduler.update_from_output, executor.sample_tokens

    def counted_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        batch = set(output.num_scheduled_tokens)
        counters["batches"] += bool(batch)
        counters["ahead"] += any(batch & earlier for earlier in in_flight)
        in_flight.append(batch)
        latest.clear()
        latest.update(batch)
        return output

    def counted_sample(*args, **kwargs):
        counters["sampled"] += any(latest & earlier for earlier in in_flight[:-1])
        return sample(*args, **kwargs)

    def counted_update(output, *args, **kwargs):
        assert in_flight.pop(0) == set(output.num_scheduled_tokens)
        return update(output, *args, **kwargs)

    scheduler.schedule, scheduler.update_from_output = counted_schedule, counted_update
    executor.sample_tokens = counted_sample
    return counters


@pytest.mark.feature("asynchronous scheduling")
@pytest.mark.parametrize("draft", DRAFTS)
def test_batches_scheduled_before_the_last_results(engine, tiny_pair, plain, requests, expected, asynchronous, draft):
    """Requests come and go in a cache too small for them; then some go on from blocks that these steps wrote."""
    llm = engine(tiny_pair.target, speculative(tiny_pair, draft), **SMALL_CACHE, **asynchronous)
    batches = count_batches(llm)
    given, aborted = serve(llm, requests)
    assert len(given) + len(aborted) == NUM_REQUESTS and len(given) > 90
    assert wrong_answers(plain, requests, expected, given, draft) == []
    assert batches["ahead"] > 0.9 * batches["batches"] > 200
    assert 50 < batches["sampled"] < batches["ahead"]
    assert llm.counters["preemptions"] > 10 and llm.counters["accepted"] > 500 and llm.counters["hits"] > 0

    greedy = SamplingParams(temperature=0, max_tokens=2 * BLOCK + 1, ignore_eos=True)
    first = [({"prompt_token_ids": [5 + n, *range(10, 9 + 2 * BLOCK)]}, greedy) for n in range(3)]
    answered = [out.prompt_token_ids + list(out.outputs[0].token_ids) for out in answer(plain, first)]
    further = [({"prompt_token_ids": tokens}, SamplingParams(temperature=0, max_tokens=10)) for tokens in answered]
    # Two blocks hold the prompt, two the answer but its last token.
    for asked, num_blocks in ((first, 0), (further, 4)):
        llm.counters.clear()
        parameters = [params for _, params in asked]
        assert differences(plain, parameters, answer(plain, asked), answer(llm, asked)) == []
        assert llm.counters["hits"] == 3 * num_blocks * BLOCK
    core = llm.llm_engine.engine_core.engine_core
    while core.batch_queue:  # what was scheduled before the last request's end was known
        core.step_fn()
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # all but the null block
    wrong, compared = wrong_blocks(llm, answered)
    assert wrong == [] and compared >= 3 * 4


# --- LoRA ---

RANK = 4
ADAPTED = ["q_proj", "v_proj"]


def save_adapter(folder: Path, target: Path, seed: int) -> LoRARequest:
    """A random adapter in PEFT's format."""
    config = LlamaConfig.from_pretrained(target)
    torch.manual_seed(seed)
    outputs = {"q_proj": config.num_attention_heads, "v_proj": config.num_key_value_heads}
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module in ADAPTED:
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(RANK, config.hidden_size)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(outputs[module] * config.head_dim, RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": ADAPTED}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest(folder.name, seed, str(folder))


class Adapted:
    """An engine that answers every request with one adapter."""

    def __init__(self, llm: LLM, adapter: LoRARequest | None):
        self.llm, self.adapter = llm, adapter

    def generate(self, *args, **kwargs):
        return self.llm.generate(*args, lora_request=self.adapter, **kwargs)


@pytest.fixture(scope="module")
def with_lora(engine, tiny_pair):
    """with_lora(speculative config or None): an engine for adapters.

    `lora_target_modules`: where a target's head may be adapted, which is vLLM's default, Model Runner V2 assigns
    adapters to one row of logits a request, whatever drafts (`LoraState.make_lora_inputs`): an error on a CPU. One slot
    stays free, because vLLM's CPU kernels give the last slot's adapter to requests without one.
    """

    def start(drafter: dict | None) -> Engine:
        return engine(
            tiny_pair.target, drafter, enable_lora=True, max_loras=3, max_lora_rank=8, lora_target_modules=ADAPTED,
            max_logprobs=-1, block_size=BLOCK,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def adapters(tiny_pair, tmp_path_factory) -> list[LoRARequest | None]:
    folder = tmp_path_factory.mktemp("adapters")
    return [None, *(save_adapter(folder / f"adapter{seed}", tiny_pair.target, seed) for seed in (1, 2))]


@pytest.fixture(scope="module")
def adapted(with_lora) -> LLM:
    return with_lora(None)


@pytest.mark.feature("LoRA on the target")
@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM's Triton kernels for LoRA refuse float32")
@pytest.mark.parametrize("draft", DRAFTS)
def test_lora_adapters_of_the_target(plain, adapted, with_lora, tiny_pair, adapters, requests, expected, draft):
    """Requests with two adapters and with none share batches; on the second run their beginnings are cached."""
    few = requests[:36]
    chosen = [adapters[n % 3] for n in range(len(few))]
    wanted = answer(adapted, few, lora_request=chosen)
    llm = with_lora(speculative(tiny_pair, draft))
    for _ in range(2):
        llm.counters.clear()
        given = answer(llm, few, lora_request=chosen)
        for adapter in adapters:
            mine = {n: out for n, out in enumerate(given) if chosen[n] is adapter}
            assert len(mine) == 12
            assert wrong_answers(Adapted(adapted, adapter), few, wanted, mine, draft) == []
        assert llm.counters["accepted"] > 100
    assert llm.counters["hits"] > 10 * BLOCK
    without = range(0, len(few), 3)
    parameters = [few[n][1] for n in without]
    assert differences(plain, parameters, [expected[n] for n in without], [wanted[n] for n in without]) == []
    changed = [a.outputs[0].token_ids != b.outputs[0].token_ids for a, b in zip(wanted, expected)]
    assert min(sum(changed[1::3]), sum(changed[2::3])) > 8


# --- tensor parallelism ---


@pytest.fixture(scope="module")
def pair_of_two_heads(tmp_path_factory) -> Pair:
    """As `tiny_pair`, with two heads of keys and values, one for each of two ranks."""
    folder = tmp_path_factory.mktemp("pair_of_two_heads")
    pair = Pair(folder / "target", folder / "drafter")
    vocab_size = save_tokenizer(pair.target)

    def config(**options) -> LlamaConfig:
        return LlamaConfig(**options | {"num_key_value_heads": 2})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(save_target.__globals__, "LlamaConfig", config)
        target = save_target(pair.target, vocab_size, seed=3)
    save_drafter(pair.drafter, target, seed=4)
    return pair


@pytest.mark.skipif(
    not current_platform.is_cpu() and torch.cuda.device_count() < 2, reason="two ranks need two GPUs, or none"
)
@pytest.mark.parametrize(
    "draft",
    [
        pytest.param("tree", marks=pytest.mark.feature("tensor parallelism", tree="same tokens")),
        pytest.param("chain", marks=[pytest.mark.slow, pytest.mark.feature("tensor parallelism", chain="same tokens")]),
    ],
)
def test_two_tensor_parallel_ranks(engine, pair_of_two_heads, requests, asynchronous, draft):
    """Two processes, which load the plugin by its entry point; scheduling is asynchronous, as on GPUs by default: here
    it really overlaps with the ranks' work."""
    few = requests[:24]
    plain = engine(pair_of_two_heads.target, max_logprobs=-1)
    expected = answer(plain, few)
    llm = engine(
        pair_of_two_heads.target,
        speculative(pair_of_two_heads, draft),
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        **SMALL_CACHE,
        **asynchronous,
    )
    batches = count_batches(llm)
    given = answer(llm, few)
    assert wrong_answers(plain, few, expected, dict(enumerate(given)), draft) == []
    assert batches["ahead"] > 0.8 * batches["batches"] and batches["sampled"] > 0
    assert llm.counters["accepted"] > 100

    def look(worker) -> tuple:  # a nested function: it travels by value
        runner = worker.model_runner
        drafter = runner.speculator
        heads = {layer.self_attn.attn.num_kv_heads for layer in runner.model.model.layers}
        return os.getpid(), worker.rank, type(drafter).__name__, heads, drafter.draft_tokens.tolist()

    processes, ranks, drafters, heads, drafts = zip(*llm.collective_rpc(look))
    assert len({*processes, os.getpid()}) == 3
    assert ranks == (0, 1) and drafters == ("CTCProposer",) * 2 and heads == ({1}, {1})
    assert drafts[0] == drafts[1] and any(any(row) for row in drafts[0])
