"""Trees are lossless: with any topology and any tokens in it, output is what it is without speculation, greedy and
seeded sampling alike, token for token. A drafter that knows the answers hides them in random trees, so that accepted
paths lie on late rows; each part of the machinery is then switched off once, and the same comparison must fail.
"""

import numpy as np
import pytest
import torch
from vllm import SamplingParams

import vllm_ctc_spec.serving.cpu.tree
from vllm_ctc_spec.serving.cpu.tree import CpuPathCompaction
from vllm_ctc_spec.serving.tree.model_state import TreeModelState

from .conftest import TREE
from .oracle import OracleSource
from .ties import differences

NUM_PROMPTS = 100
MAX_TOKENS = 72
BLOCK = 32  # tokens; the CPU's default of 128 would hold most requests whole
BUDGETS = [8, 16, 32, 64]


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    lengths = np.random.default_rng(1).integers(1, 45, NUM_PROMPTS)
    numbers = np.random.default_rng(2)
    return [{"prompt_token_ids": numbers.integers(2, 97, length).tolist()} for length in lengths]


@pytest.fixture(scope="module")
def parameters() -> list[SamplingParams]:
    """Greedy and sampled requests share every batch; vLLM rejects nothing of this with trees."""
    kinds = (
        {"temperature": 0},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.2, "seed": 8, "top_k": 20},
        {"temperature": 0.7, "seed": 9, "top_p": 0.9},
    )
    return [
        SamplingParams(max_tokens=MAX_TOKENS - i % 7, ignore_eos=True, **kinds[i % len(kinds)])
        for i in range(NUM_PROMPTS)
    ]


@pytest.fixture(scope="module")
def expected(plain, prompts, parameters):
    return plain.generate(prompts, parameters, use_tqdm=False)


@pytest.fixture(scope="module")
def oracle(engine, tiny_pair, prompts, expected):
    """oracle(number of nodes, **engine options): an engine whose source knows `expected`, started once for each."""
    started = {}
    sequences = [p["prompt_token_ids"] + list(e.outputs[0].token_ids) for p, e in zip(prompts, expected)]

    def start(budget: int, **options):
        key = (budget, *options.items())
        if key not in started:
            drafter = {"method": "ctc", "model": str(tiny_pair.drafter)}
            speculative = {**drafter, **TREE, "num_speculative_tokens": budget}
            started[key] = engine(tiny_pair.target, speculative, block_size=BLOCK, **options)
            runner = model_runner(started[key])
            runner.speculator.source = OracleSource(sequences, runner.req_states, runner.vocab_size, seed=budget)
        return started[key]

    return start


def model_runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.mark.feature("greedy decoding", "seeds", "temperature", "top-k", "top-p", tree="same tokens")
@pytest.mark.parametrize("budget", BUDGETS)
def test_output_is_token_identical(oracle, plain, prompts, parameters, expected, budget):
    llm = oracle(budget)
    calls = model_runner(llm).speculator.source.calls
    llm.counters.clear()
    calls.clear()
    given = llm.generate(prompts, parameters, use_tqdm=False)
    assert differences(plain, parameters, expected, given) == []
    assert llm.acceptance_length > 2
    assert calls["reset"] == NUM_PROMPTS and calls["prepare"] == calls["draft"] > 10


def no_compaction(patch):
    patch.setattr(CpuPathCompaction, "run", lambda self, layout, verdict: None)


def no_tree_positions(patch):
    def prepare_inputs(self, input_batch, req_states):
        return {"positions": input_batch.positions}

    patch.setattr(TreeModelState, "prepare_inputs", prepare_inputs)


def no_mask(patch):
    def causal(ancestors):
        return torch.ones(len(ancestors), len(ancestors), dtype=torch.bool).tril()

    patch.setattr(vllm_ctc_spec.serving.cpu.tree, "visible_rows", causal)


@pytest.mark.parametrize("without", [no_compaction, no_tree_positions, no_mask])
def test_every_part_is_needed(oracle, plain, prompts, parameters, expected, monkeypatch, without):
    """Tests of the test above. What the drafter would see is not needed by an oracle: test_tree_drafting.py."""
    some = slice(0, 32)
    llm = oracle(16)
    llm.reset_prefix_cache()
    without(monkeypatch)
    given = llm.generate(prompts[some], parameters[some], use_tqdm=False)
    monkeypatch.undo()
    llm.reset_prefix_cache()  # its blocks hold what the broken machinery wrote
    assert len(differences(plain, parameters[some], expected[some], given)) > 3


@pytest.mark.feature("chunked prefill", tree="same tokens")
def test_chunks_of_prompts_share_steps_with_trees(oracle, plain, prompts, parameters, expected):
    """Prompts in pieces of at most 64 rows beside tree rows: the stock implementation and ours take turns."""
    llm = oracle(16, max_num_batched_tokens=64, enable_chunked_prefill=True, max_num_seqs=3)
    some = slice(0, 30)
    given = llm.generate(prompts[some], parameters[some], use_tqdm=False)
    assert differences(plain, parameters[some], expected[some], given) == []
    assert llm.acceptance_length > 1.2


@pytest.mark.feature("prefix caching", tree="same tokens")
def test_blocks_that_trees_wrote_are_hit_by_later_requests(oracle, plain, prompts, expected):
    """A follow-up begins with a prompt and its answer: its blocks were written by prefill and by compacted trees."""
    llm = oracle(16)
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    first = prompts[::4]
    answered = [p["prompt_token_ids"] + list(e.outputs[0].token_ids) for p, e in zip(first, expected[::4])]
    followups = [{"prompt_token_ids": tokens} for tokens in answered if len(tokens) > 3 * BLOCK]
    parameters = [SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)] * len(followups)
    answers = plain.generate(followups, parameters, use_tqdm=False)
    llm.generate(first, greedy, use_tqdm=False)
    llm.counters.clear()
    given = llm.generate(followups, parameters, use_tqdm=False)
    assert llm.counters["hits"] >= 2 * BLOCK * len(followups)
    assert differences(plain, parameters, answers, given) == []
    for mine, theirs in zip(answers, given):
        for a, b in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs):
            assert {t: v.logprob for t, v in a.items()} == pytest.approx({t: v.logprob for t, v in b.items()}, abs=1e-4)
