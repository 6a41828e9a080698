"""Other kinds of drafters are lossless too: learned transitions between frames, frame k as label k, and frames that
hold a part of the target's tokens only."""

import pytest
from vllm import SamplingParams

from .conftest import DRAFTERS, DRAFTS
from .ties import differences

PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 =", "Once there were seven dwarfs", "abcabcabcabcabc", "The end of"]
GREEDY = [SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)] * len(PROMPTS)
SEEDED = [SamplingParams(temperature=0.8, seed=n, max_tokens=60, ignore_eos=True) for n in range(len(PROMPTS))]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("kind", [kind for kind in DRAFTERS if kind != "ctc"])  # all other tests have that one
def test_answers_are_those_without_drafter(kind, draft, engine, kind_of_pair, plain):
    pair = kind_of_pair(kind)
    llm = engine(pair.target, {"method": "ctc", "model": str(pair.drafter), **DRAFTS[draft]})
    # A chain's rejection sampler keeps the law of a sample and not the dice.
    for parameters in (GREEDY, SEEDED) if draft == "tree" else (GREEDY,):
        llm.counters.clear()
        expected, given = (one.generate(PROMPTS, parameters, use_tqdm=False) for one in (plain, llm))
        assert differences(plain, parameters, expected, given) == []
        assert 1.1 < llm.acceptance_length < 4
