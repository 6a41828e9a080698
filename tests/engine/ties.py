"""Outputs compared token for token, ties aside.

fp32 leaves one freedom: a step of another width rounds differently, so that two tokens whose scores are equal to 1e-4
may change places. Such a place must be shown; any other difference counts.
"""

from collections.abc import Sequence

from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

from vllm_ctc_spec.serving.cpu.noise import gumbel

TIE = 1e-4


def differences(
    plain: LLM, parameters: Sequence[SamplingParams], expected: list[RequestOutput], given: list[RequestOutput]
) -> list[str]:
    """Where outputs differ although no tie explains it. `plain` has no drafter and max_logprobs=-1."""
    found = []
    for params, mine, theirs in zip(parameters, expected, given, strict=True):
        assert mine.prompt_token_ids == theirs.prompt_token_ids
        a, b = list(mine.outputs[0].token_ids), list(theirs.outputs[0].token_ids)
        if a == b:
            continue
        at = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if at is None:
            found.append(f"{mine.prompt!r}: {len(a)} tokens became {len(b)}")
            continue
        apart = gap(plain, params, mine.prompt_token_ids + a[:at], a[at], b[at])
        if apart > TIE:
            found.append(f"{mine.prompt!r}: token {at} is {b[at]}, expected {a[at]} (apart by {apart:g})")
    return found


def gap(plain: LLM, params: SamplingParams, context: list[int], first: int, second: int) -> float:
    """How far apart two tokens were for the sampler, its noise included."""
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=-1)
    scores = plain.generate([{"prompt_token_ids": context}], one, use_tqdm=False)[0].outputs[0].logprobs[0]
    difference = scores[first].logprob - scores[second].logprob
    if params.temperature:
        noise = gumbel(params.seed, len(context) - 1, len(scores), use_fp64=False)
        difference = difference / params.temperature + noise[first] - noise[second]
    return abs(float(difference))
