"""Sampled output follows the target's law with a drafter as without: chi-square over the first five tokens.

The vocabulary is so small that the exact law of five tokens can be enumerated from the Hugging Face target. The first
token is sampled without a draft, the next four are drafted, in two steps or more: what a step has drafted and rejected
must not tell in the next one.
"""

import itertools
from collections import Counter

import pytest
import torch
from transformers import LlamaForCausalLM
from vllm import SamplingParams

from vllm_ctc_spec.serving import limits
from vllm_ctc_spec.serving.proposer import CTCProposer

from ..oracle.chi_square import p_value
from ..releases import SINCE_33
from .conftest import TREE

VOCAB = 4
LENGTH = 5
PROMPT = [3, 1, 2, 1, 0]
DRAWS = 20_000
PLAUSIBLE, IMPOSSIBLE = 1e-3, 1e-9  # p-values: seeds are fixed, so that neither depends on luck

PLAIN = {"temperature": 1.0}
COLD_TOP_K = {"temperature": 0.7, "top_k": 3}
HOT_TOP_P = {"temperature": 1.3, "top_p": 0.8}


@pytest.fixture(scope="module")
def pair(make_pair, tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_tokens")
    return make_pair(folder, VOCAB, seed=4, head_std=0.15, num_frames=5, num_labels=3)


@pytest.fixture(scope="module")
def sampler(engine, pair):
    """sampler(options of the speculative config): an engine, started once for each."""
    started = {}

    def start(**options):
        key = tuple(options.items())
        if key not in started:
            started[key] = engine(
                pair.target, {"method": "ctc", "model": str(pair.drafter), **options}, skip_tokenizer_init=True,
                max_model_len=32, max_num_seqs=512, max_num_batched_tokens=8192, num_gpu_blocks_override=1024,
                enable_prefix_caching=False,
            )  # fmt: skip
        return started[key]

    return start


@pytest.fixture(scope="module")
def logits(pair) -> dict[tuple[int, ...], torch.Tensor]:
    return logits_of(pair)


def logits_of(pair) -> dict[tuple[int, ...], torch.Tensor]:
    """The target's logits after the prompt and every continuation of up to four tokens, fp64."""
    model = LlamaForCausalLM.from_pretrained(pair.target).double().eval()
    after = {}
    for length in range(LENGTH):
        continuations = list(itertools.product(range(VOCAB), repeat=length))
        with torch.no_grad():
            rows = model(torch.tensor([PROMPT + list(tail) for tail in continuations])).logits[:, -1]
        after.update(zip(continuations, rows))
    return after


def next_token_law(logits: torch.Tensor, temperature: float, top_k: int = VOCAB, top_p: float = 1.0) -> torch.Tensor:
    """top_k keeps the k best tokens, top_p the smallest set of best tokens whose mass reaches p."""
    order = logits.argsort(descending=True)
    law = torch.softmax(logits / temperature, -1)
    ranked = law[order]
    kept = order[(torch.arange(VOCAB) < top_k) & (ranked.cumsum(-1) - ranked < top_p)]
    only = torch.zeros_like(law)
    only[kept] = law[kept]
    return only / only.sum()


def law_of_five(logits: dict[tuple[int, ...], torch.Tensor], **parameters) -> dict[tuple[int, ...], float]:
    rows = {tail: next_token_law(row, **parameters) for tail, row in logits.items()}
    return {
        tokens: float(torch.stack([rows[tokens[:k]][tokens[k]] for k in range(LENGTH)]).prod())
        for tokens in itertools.product(range(VOCAB), repeat=LENGTH)
    }


def draw(llm, draws: int = DRAWS, **parameters) -> Counter:
    """Requests differ by their seeds only (vLLM gives sample i of a request the seed + i)."""
    per_request = 500
    llm.counters.clear()
    requests = [
        SamplingParams(n=per_request, seed=first, max_tokens=LENGTH, detokenize=False, ignore_eos=True, **parameters)
        for first in range(0, draws, per_request)
    ]
    outputs = llm.generate([{"prompt_token_ids": PROMPT}] * len(requests), requests, use_tqdm=False)
    return Counter(tuple(sample.token_ids) for output in outputs for sample in output.outputs)


GREEDY_DRAFTS = {}
SAMPLED_DRAFTS = {"draft_sample_method": "probabilistic"}
BLOCK = {**SAMPLED_DRAFTS, "rejection_sample_method": "block"}
# Every first token is a child of the anchor; two labels on the longest path; at most two children a node.
WIDE = {**TREE, "num_speculative_tokens": VOCAB, "ctc_tree_depth": 1}
BUSHY = {**TREE, "num_speculative_tokens": 10, "ctc_tree_depth": 2}
DEEP = {**TREE, "num_speculative_tokens": 5, "ctc_tree_width": 1}
RUNS = {
    "greedy drafts": (GREEDY_DRAFTS, PLAIN),
    "greedy drafts, cold, top_k": (GREEDY_DRAFTS, COLD_TOP_K),
    "sampled drafts": (SAMPLED_DRAFTS, PLAIN),
    "sampled drafts, hot, top_p": (SAMPLED_DRAFTS, HOT_TOP_P),
    "wide trees, hot, top_p": (WIDE, HOT_TOP_P),
    "trees of two levels, cold, top_k": (BUSHY, COLD_TOP_K),
    "deep trees": (DEEP, PLAIN),
}
if SINCE_33:  # with 0.32 it is refused
    RUNS["block verification"] = (BLOCK, PLAIN)
    RUNS["block verification, greedy drafts"] = ({"rejection_sample_method": "block"}, HOT_TOP_P)


# Rows of the table. Trees give the very samples without drafter (test_features.py).
ROWS = {
    "greedy drafts": ("temperature", "`n` > 1"),
    "greedy drafts, cold, top_k": ("top-k",),
    "sampled drafts": ("sampled drafts",),
    "sampled drafts, hot, top_p": ("sampled drafts", "top-p"),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(run, id=name, marks=pytest.mark.feature(*ROWS.get(name, ()), chain="same law"))
        for name, run in RUNS.items()
    ],
)
def run(request, sampler):
    """(draws, acceptance length, sampling parameters) of one of RUNS."""
    options, parameters = request.param
    llm = sampler(**options)
    return draw(llm, **parameters), llm.acceptance_length, parameters


def test_five_tokens_follow_the_targets_law(run, logits):
    seen, acceptance_length, parameters = run
    assert seen.total() == DRAWS
    assert p_value(seen, law_of_five(logits, **parameters)) > PLAUSIBLE
    assert 1.1 < acceptance_length < 3.9  # some drafts are accepted, some are not


def test_the_law_of_another_temperature_is_told_apart(run, logits):
    """A test of the test: what these draws are too few to tell apart, the test above cannot find."""
    seen, _, parameters = run
    other = {**parameters, "temperature": 1.3 * parameters["temperature"]}
    assert p_value(seen, law_of_five(logits, **other)) < IMPOSSIBLE


def test_sampled_drafts_of_a_draft_vocabulary_follow_the_targets_law(make_pair, engine, tmp_path):
    """One of the four tokens is no label: anchors are, and drafts never."""
    folder = tmp_path / "three_labels"
    pair = make_pair(folder, VOCAB, seed=4, head_std=0.15, num_frames=5, num_labels=3, draft_vocab_size=3)
    llm = engine(
        pair.target, {"method": "ctc", "model": str(pair.drafter), **SAMPLED_DRAFTS}, skip_tokenizer_init=True,
        max_model_len=32, max_num_seqs=512, max_num_batched_tokens=8192, num_gpu_blocks_override=1024,
        enable_prefix_caching=False,
    )  # fmt: skip
    assert p_value(draw(llm, **PLAIN), law_of_five(logits_of(pair), **PLAIN)) > PLAUSIBLE
    assert 1.1 < llm.acceptance_length < 3.9


@pytest.mark.skipif(SINCE_33, reason="mended there, and among RUNS")
def test_block_verification_of_vllm_0_32_leaves_the_targets_law(sampler, logits, monkeypatch):
    """Why it is refused."""
    monkeypatch.setattr(limits, "OPTIONS", ())
    llm = sampler(rejection_sample_method="block")
    assert p_value(draw(llm, **PLAIN), law_of_five(logits, **PLAIN)) < IMPOSSIBLE


@pytest.mark.slow
@pytest.mark.parametrize("options, parameters", RUNS.values(), ids=RUNS)
def test_ten_times_as_many_draws(sampler, logits, options, parameters):
    seen = draw(sampler(**options), draws=10 * DRAWS, **parameters)
    assert p_value(seen, law_of_five(logits, **parameters)) > PLAUSIBLE


@pytest.mark.parametrize("name", [name for name in ("sampled drafts", "block verification") if name in RUNS])
def test_a_proposer_that_reports_another_law_is_found(sampler, logits, monkeypatch, name):
    """A test of the test: the drafts come from q, and the rejection sampler is told a flatter law."""
    llm = sampler(**RUNS[name][0])
    generate_draft = CTCProposer._generate_draft

    def misreport(self, *args, **kwargs):
        generate_draft(self, *args, **kwargs)
        self.draft_logits *= 0.5

    monkeypatch.setattr(CTCProposer, "_generate_draft", misreport)
    assert p_value(draw(llm, draws=DRAWS // 4, **PLAIN), law_of_five(logits, **PLAIN)) < IMPOSSIBLE
