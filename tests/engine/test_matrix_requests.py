"""Requests that ask more of the engine than sampling parameters: beams, grammars, embeddings, long prompts; and some
that vLLM refuses, beside others that it serves."""

import json
import re

import pytest
import torch
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from ..releases import SINCE_33
from .conftest import DRAFTS
from .ties import differences

PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 =", "Once there were seven dwarfs", "abcabcabcabcabc"]
LONG = 8192


@pytest.fixture(scope="module")
def engines(engine, tiny_pair):
    """engines(draft or None, **options): an engine, started once for each."""
    started = {}

    def start(draft: str | None, **options):
        key = (draft, *options.items())
        if key not in started:
            drafter = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]} if draft else None
            options = {name: dict(value) if isinstance(value, tuple) else value for name, value in options.items()}
            started[key] = engine(tiny_pair.target, drafter, **{"max_logprobs": -1, **options})
        started[key].counters.clear()
        return started[key]

    return start


def assert_same(plain, ctc, prompts: list, parameters: SamplingParams) -> list:
    """The outputs, which are those without drafter, and of which a part was drafted."""
    expected = plain.generate(prompts, parameters, use_tqdm=False)
    given = ctc.generate(prompts, parameters, use_tqdm=False)
    assert differences(plain, [parameters] * len(prompts), expected, given) == []
    assert ctc.counters["accepted"] > 0
    return given


CODE = "[a-f]{3}-[0-9]{8}"


@pytest.mark.feature("beam search")
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "asked",
    [{}, {"length_penalty": 3.0}, {"structured_outputs": StructuredOutputsParams(regex=CODE)}],
    ids=["usual", "length penalty", "regex"],
)
def test_beam_search(engines, draft, asked):
    """vLLM asks for a beam's tokens one by one: drafts cost a little and are never verified."""
    parameters = BeamSearchParams(beam_width=4, max_tokens=12, **asked)
    prompts = [{"prompt": prompt} for prompt in PROMPTS[:3]]
    named = {"structured_outputs_config": (("backend", "xgrammar"),)}  # beams do not take the default, "auto"
    expected, given = (engines(kind, **named).beam_search(prompts, parameters) for kind in (None, draft))
    for mine, theirs in zip(given, expected, strict=True):
        assert [beam.tokens for beam in mine.sequences] == [beam.tokens for beam in theirs.sequences]
        distinct = {tuple(beam.tokens) for beam in mine.sequences}
        if "structured_outputs" in asked:  # vLLM keeps those of a beam's best tokens that fit, which may be fewer
            assert len(distinct) == len(mine.sequences) >= 1
            assert all(re.search(f"{CODE}$", beam.text) for beam in mine.sequences)
        else:
            assert len(distinct) == 4
        likelihoods = [beam.cum_logprob for beam in mine.sequences]
        assert likelihoods == pytest.approx([beam.cum_logprob for beam in theirs.sequences], abs=1e-3)


ORDER = {
    "type": "object",
    "properties": {
        "note": {"type": "string", "pattern": "^[#-Z^-~]{20,30}$"},  # room for what the drafter expects
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "sizes": {"type": "array", "items": {"enum": ["small", "large"]}, "minItems": 1, "maxItems": 3},
        "new": {"type": "boolean"},
    },
    "required": ["note", "count", "sizes", "new"],
    "additionalProperties": False,
}
# The target would fill the places between values with white space, which the grammar allows there.
NO_SPACES = {"structured_outputs_config": (("backend", "xgrammar"), ("disable_any_whitespace", True))}
SHOPPING = """
root ::= verb " " item (", " item){0,3} "."
verb ::= "buy" | "sell" | "lend"
item ::= [1-9] [0-9]? " " ("plums" | "boxes" | "trains")
"""


def is_order(text: str) -> bool:
    order = json.loads(text)
    return list(order) == ORDER["required"] and re.fullmatch("[#-Z^-~]{20,30}", order["note"]) is not None


def is_shopping(text: str) -> bool:
    item = r"[1-9][0-9]? (plums|boxes|trains)"
    return re.fullmatch(rf"(buy|sell|lend) {item}(, {item}){{0,3}}\.", text) is not None


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        pytest.param({"json": ORDER}, is_order, marks=pytest.mark.feature("structured output: JSON schema")),
        pytest.param({"grammar": SHOPPING}, is_shopping, marks=pytest.mark.feature("structured output: grammar")),
    ],
    ids=["schema", "grammar"],
)
def test_structured_output(engines, draft, constraint, fits):
    parameters = SamplingParams(temperature=0, max_tokens=160, structured_outputs=StructuredOutputsParams(**constraint))
    given = assert_same(engines(None, **NO_SPACES), engines(draft, **NO_SPACES), PROMPTS, parameters)
    assert all(output.outputs[0].finish_reason == "stop" and fits(output.outputs[0].text) for output in given)
    assert len({output.outputs[0].text for output in given}) > 1


@pytest.mark.feature("prompts as embeddings (`prompt_embeds`)")
@pytest.mark.parametrize("draft", DRAFTS)
def test_prompts_as_embeddings(engines, tiny_pair, draft):
    """Embeddings of tokens and embeddings of none, in chunks, beside prompts of tokens; the answers to the first are
    those to the tokens themselves."""
    table = LlamaForCausalLM.from_pretrained(tiny_pair.target).get_input_embeddings().weight.detach()
    dice = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, 98, (length,), generator=dice) for length in (5, 90, 33)]
    of_tokens = [{"prompt_embeds": table[row]} for row in tokens]
    of_none = [{"prompt_embeds": torch.randn(length, table.shape[1], generator=dice)} for length in (7, 70)]
    as_tokens = [{"prompt_token_ids": row.tolist()} for row in tokens]
    options = {"enable_prompt_embeds": True, "max_num_batched_tokens": 120}
    parameters = SamplingParams(temperature=0, max_tokens=40)
    prompts = [*of_tokens, *of_none, *as_tokens]
    expected = engines(None, **options).generate(prompts, parameters, use_tqdm=False)
    ctc = engines(draft, **options)
    given = ctc.generate(prompts, parameters, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in given]
    assert answers == [list(output.outputs[0].token_ids) for output in expected]
    assert answers[:3] == answers[5:] and len({tuple(answer) for answer in answers}) == 5
    assert ctc.counters["accepted"] > 50


@pytest.mark.feature("very long prompts")
@pytest.mark.parametrize("draft", DRAFTS)
def test_prompts_of_thousands_of_tokens(engines, draft):
    """Many chunks each, beside short requests that draft meanwhile."""
    options = {
        "max_model_len": LONG, "max_num_batched_tokens": 1024, "enable_prefix_caching": False,
        "hf_overrides": (("max_position_embeddings", LONG),),
    }  # fmt: skip
    dice = torch.Generator().manual_seed(0)
    prompts = [
        {"prompt_token_ids": torch.randint(2, 98, (length,), generator=dice).tolist()}
        for length in (9, LONG - 20, 3000, 17, 5000)
    ]
    given = assert_same(
        engines(None, **options), engines(draft, **options), prompts, SamplingParams(temperature=0, max_tokens=60)
    )
    assert [len(output.outputs[0].token_ids) for output in given] == [60, 20, 60, 60, 60]


class Follows(LogitsProcessor):
    """A request's `step` forbids the token before and favours the one that lies so many places after it, and one more
    with each position: of a draft, the token before is a draft too."""

    def __init__(self, vllm_config, req_states):
        self.steps = torch.zeros(req_states.max_num_reqs, dtype=torch.long, device=req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self.steps[req_idx] = (sampling_params.extra_args or {}).get("step", 0)
        return bool(self.steps[req_idx])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        steps = self.steps[ctx.expanded_idx_mapping]
        rows = steps.nonzero().flatten()
        before = ctx.input_ids[rows].long()
        logits[rows, before] = float("-inf")
        logits[rows, (before + steps[rows] + ctx.pos[rows]) % logits.shape[1]] += 4
        return logits


@pytest.mark.feature("custom logits processors", chain="same tokens")
def test_custom_logits_processors(engine, engines, tiny_pair):
    """On some requests of a batch, with values of their own."""
    parameters = [
        SamplingParams(temperature=0, max_tokens=60, extra_args={"step": step} if step else None)
        for step in (3, 0, 11, 50, 0)
    ]
    usual = engines(None).generate(PROMPTS, parameters, use_tqdm=False)
    plain = engine(tiny_pair.target, logits_processors=[Follows], max_logprobs=-1)
    expected = plain.generate(PROMPTS, parameters, use_tqdm=False)
    changed = [a.outputs[0].text != b.outputs[0].text for a, b in zip(expected, usual, strict=True)]
    assert changed == [True, False, True, True, False]
    ctc = engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter)}, logits_processors=[Follows])
    given = ctc.generate(PROMPTS, parameters, use_tqdm=False)
    assert differences(plain, parameters, expected, given) == []
    assert ctc.counters["accepted"] > 20


REFUSED = "request refused: by vLLM with any drafter"


@pytest.mark.skipif(not SINCE_33, reason="vLLM 0.33 has them")
@pytest.mark.parametrize("draft", DRAFTS)
def test_beams_of_allowed_tokens_are_refused(engines, draft):
    parameters = BeamSearchParams(beam_width=4, max_tokens=12, allowed_token_ids=[70, 71, 72])
    with pytest.raises(ValueError, match="Beam allowlists with speculative decoding are not supported"):
        engines(draft).beam_search([{"prompt": PROMPTS[0]}], parameters)


@pytest.mark.feature("`min_p`, `logit_bias`", chain=REFUSED, tree=REFUSED)
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_request_that_vllm_refuses_fails_alone(engines, draft):
    plain, ctc = engines(None), engines(draft)
    parameters = SamplingParams(temperature=0, max_tokens=40)
    expected = plain.generate(PROMPTS, parameters, use_tqdm=False)
    engine, given = ctc.llm_engine, {}
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, parameters)
        given.update({output.request_id: output for output in engine.step()})
        for refused in ({"min_p": 0.1}, {"logit_bias": {5: 3.0}}):
            with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
                engine.add_request("refused", prompt, SamplingParams(temperature=1.0, **refused))
    while engine.has_unfinished_requests():
        given.update({output.request_id: output for output in engine.step()})
    answers = [given[str(number)] for number in range(len(PROMPTS))]
    assert differences(plain, [parameters] * len(PROMPTS), expected, answers) == []


@pytest.mark.feature("trace replay", chain=REFUSED)
def test_a_trace_to_replay_is_refused(engines):
    """Before it is asked whether the engine was started with --enable-trace-replay."""
    trace = SamplingParams(temperature=0, trace_decode_token_ids=[5, 6, 7])
    with pytest.raises(ValueError, match="trace_decode_token_ids is not supported with speculative decoding"):
        engines("chain").llm_engine.add_request("refused", PROMPTS[0], trace)
