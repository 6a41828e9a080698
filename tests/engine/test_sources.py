"""Drafts of a cache, of a client's guess, and of several sources merged: the output is the one without speculation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM
from vllm import SamplingParams

from vllm_ctc_spec.draft.cache_table import CacheTable

from .conftest import SOURCES_VARIABLE, TREE, save_tokenizer
from .ties import differences

NUM_PROMPTS, MAX_TOKENS, VOCABULARY = 40, 40, 97
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    draws = np.random.default_rng(5)
    texts = [draws.integers(2, VOCABULARY, length).tolist() for length in draws.integers(1, 60, NUM_PROMPTS)]
    return [{"prompt_token_ids": text + text[: len(text) // 2]} for text in texts]  # with something to find


@pytest.fixture(scope="module")
def parameters() -> list[SamplingParams]:
    kinds = ({"temperature": 0}, {"temperature": 0.9, "seed": 7}, {"temperature": 1.2, "seed": 8, "top_k": 20})
    penalty = {"temperature": 0, "frequency_penalty": 0.5}  # chains within trees
    return [
        SamplingParams(max_tokens=MAX_TOKENS - i % 7, ignore_eos=True, **(kinds[i % 3] if i % 10 else penalty))
        for i in range(NUM_PROMPTS)
    ]


@pytest.fixture(scope="module")
def expected(plain, prompts, parameters):
    return plain.generate(prompts, parameters, use_tqdm=False)


def with_guesses(parameters: list[SamplingParams], expected) -> list[SamplingParams]:
    """A perfect guess, none, one with a difference, noise, ids at the vocabulary's edge, duplicates, a long one."""
    draws, result = np.random.default_rng(6), []
    for number, (params, output) in enumerate(zip(parameters, expected)):
        answer = list(output.outputs[0].token_ids)
        guess = (
            answer, [], [*answer[:9], 5, *answer[9:]], draws.integers(0, VOCABULARY, 50).tolist(),
            [0, VOCABULARY - 1] * 20, answer[3:4] * 30, answer * 5,
        )[number % 7]  # fmt: skip
        params = params.clone()
        params.extra_args = {"ctc_draft": guess}
        result.append(params)
    return result


@pytest.fixture(scope="module")
def merged(engine, tiny_pair):
    options = {"model": str(tiny_pair.drafter), **TREE, "ctc_sources": "ctc+cache+client"}
    return engine(tiny_pair.target, {"method": "ctc", **options}, block_size=32)


@pytest.mark.feature("drafts of several sources (`ctc_sources`)", chain="refused: trees only", tree="same tokens")
@pytest.mark.feature("predicted output (`ctc_draft`)", chain="request refused: trees only", tree="same tokens")
def test_merged_trees_are_lossless_whatever_clients_guess(merged, plain, prompts, parameters, expected):
    """Twice, so that slots are used again and blocks of the prefix cache are those that trees wrote."""
    for asked in (with_guesses(parameters, expected), parameters):
        merged.counters.clear()
        given = merged.generate(prompts, asked, use_tqdm=False)
        assert differences(plain, parameters, expected, given) == []
        assert merged.acceptance_length > 1.3
    source = proposer(merged).source
    drafted, accepted = source.counts.tolist()
    assert all(d > a > 0 for d, a in zip(drafted, accepted))  # of each source
    assert source.weights.isfinite().all() and source.weights.sum(1).sub(1).abs().max() < 1e-4


def test_a_perfect_guess_is_taken_in_whole_trees(merged, plain, prompts, parameters, expected):
    greedy = [i for i, params in enumerate(parameters) if params.temperature == 0 and not params.frequency_penalty][:6]
    asked = [parameters[i].clone() for i in greedy]
    for params, i in zip(asked, greedy):
        params.extra_args = {"ctc_draft": list(expected[i].outputs[0].token_ids)}
    merged.counters.clear()
    merged.generate([prompts[i] for i in greedy], asked, use_tqdm=False)
    assert merged.acceptance_length > 7


def test_a_request_after_a_guess_starts_without_it(merged, prompts, parameters):
    """The slots of the test above, whose requests have ended."""
    asked = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    merged.generate(prompts[:8], asked, use_tqdm=False)
    assert proposer(merged).guesses.lengths.gpu.tolist() == [0] * 8


def test_a_cache_alone_needs_no_drafter(engine, plain, tiny_pair, prompts, parameters, expected, tmp_path):
    """With a frozen table, and prompts in chunks beside trees."""
    table = CacheTable(tmp_path / "table.safetensors", torch.arange(90 * 2 * 3).view(90, 2, 3).remainder(97).int())
    table.save()
    speculative = {"method": "ctc", "ctc_sources": "cache", "num_speculative_tokens": 16, "ctc_tree_rows": 2**20}
    llm = engine(
        tiny_pair.target, {**speculative, "ctc_cache_table": str(table.path)}, max_num_batched_tokens=64,
        enable_chunked_prefill=True, max_num_seqs=3,
    )  # fmt: skip
    given = llm.generate(prompts, parameters, use_tqdm=False)
    assert differences(plain, parameters, expected, given) == []
    assert llm.acceptance_length > 1.1
    assert proposer(llm).model is None


def save_opt(folder: Path) -> Path:
    """A target of which vLLM's model reports no hidden states."""
    torch.manual_seed(3)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=save_tokenizer(folder), hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=2,
            word_embed_proj_dim=64, max_position_embeddings=256, init_std=0.08, tie_word_embeddings=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    ).float()  # fmt: skip
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.feature(
    "targets without auxiliary hidden states, `ctc_sources` cache", chain="refused: trees only", tree="same tokens"
)
def test_a_cache_serves_targets_that_report_no_hidden_states(engine, tmp_path, prompts, parameters):
    target = save_opt(tmp_path)
    without = engine(target, max_logprobs=-1)
    expected = without.generate(prompts, parameters, use_tqdm=False)
    llm = engine(target, {"method": "ctc", "ctc_sources": "cache", "ctc_tree_rows": 2**20})
    given = llm.generate(prompts, parameters, use_tqdm=False)
    assert differences(without, parameters, expected, given) == []
    assert llm.counters["accepted"] > 20


def proposer(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_of_the_table_holds_for_merged_trees():
    """The same tests, with the cache and guesses beside the drafter wherever they draft trees."""
    files = sorted(str(path) for path in [*HERE.glob("test_matrix_*.py"), HERE / "test_features.py"])
    environment = {**os.environ, SOURCES_VARIABLE: "ctc+cache+client"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *files]
    child = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-3000:]
