"""Targets of several experts: answered as without drafter, and their routes are reported as without.

The first engine of a process decides whether vLLM has a group of expert-parallel ranks, so these have a file of their
own.
"""

import pytest
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm import SamplingParams

from .conftest import DRAFTS, Pair
from .test_matrix_targets import answered_as_without_drafter, drafting, save_pair

LAYERS, CHOSEN = 4, 2
PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 ="]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    def make(shape: dict) -> Qwen3MoeForCausalLM:
        experts = {"num_experts": 4, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 32}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, decoder_sparse_step=1, norm_topk_prob=True))

    return save_pair(tmp_path_factory.mktemp("experts"), make)


@pytest.mark.feature("mixture-of-experts targets")
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_target_of_four_experts(engine, pair, draft):
    answered_as_without_drafter(engine, pair, draft)


@pytest.mark.feature("auxiliary outputs", chain="same tokens")
def test_the_experts_of_each_token_are_reported(engine, pair):
    """Of the tokens alone: rejected drafts have taken routes too."""
    options = {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    parameters = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    llm = engine(pair.target, drafting(pair, "chain"), **options)
    given = llm.generate(PROMPTS, parameters, use_tqdm=False)
    for mine, theirs in zip(given, engine(pair.target, **options).generate(PROMPTS, parameters, use_tqdm=False)):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        routes = mine.outputs[0].routed_experts
        assert routes.shape == (len(mine.prompt_token_ids) + 60 - 1, LAYERS, CHOSEN)
        assert (routes == theirs.outputs[0].routed_experts).all()
    assert llm.counters["accepted"] > 20
