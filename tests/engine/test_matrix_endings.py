"""Where an answer ends: inside an accepted path, and not before it may.

With a drafter a step brings several tokens. What follows the end was accepted too and must not be seen. The cases are
made from the steps that the drafting engine took.
"""

import shutil

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from .conftest import DRAFTS, Pair

PROMPTS = [f"{count} {what} make" for count in ("3", "a", "No") for what in ("plums", "boxes", "trains", "!")]
LENGTH = 60
EOS = "A"  # the target says it to half of these
ENDLESS = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(scope="module")
def pair(tiny_pair, tmp_path_factory) -> Pair:
    """`tiny_pair`, with a common letter as the end of the text."""
    target = shutil.copytree(tiny_pair.target, tmp_path_factory.mktemp("common_end") / "target")
    config = target / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<eos>", EOS))
    return Pair(target, tiny_pair.drafter)


@pytest.fixture(scope="module")
def plain(engine, pair):
    return engine(pair.target)


@pytest.fixture(scope="module", params=DRAFTS)
def ctc(request, engine, pair):
    return engine(pair.target, {"method": "ctc", "model": str(pair.drafter), **DRAFTS[request.param]})


@pytest.fixture(scope="module")
def steps(ctc) -> list[list[list[int]]]:
    """The tokens that each step brought to each request, nothing ending it."""
    parameters = ENDLESS.clone()
    parameters.output_kind = RequestOutputKind.DELTA
    engine, brought = ctc.llm_engine, [[] for _ in PROMPTS]
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, parameters)
    while engine.has_unfinished_requests():
        for output in engine.step():
            brought[int(output.request_id)].append(list(output.outputs[0].token_ids))
    return brought


def answers(llm, parameters: SamplingParams | list[SamplingParams], prompts: list[str] = PROMPTS) -> list[tuple]:
    """Logprobs of a token that was cut off would be one too many."""
    samples = [output.outputs[0] for output in llm.generate(prompts, parameters, use_tqdm=False)]
    return [
        (list(sample.token_ids), sample.text, sample.finish_reason, sample.stop_reason, len(sample.logprobs))
        for sample in samples
    ]


def ending(**parameters) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": LENGTH, "logprobs": 0, **parameters})


def is_inside(steps_of_request: list[list[int]], token: int) -> bool:
    """Whether the first step that has the token goes on after it."""
    first = next((step for step in steps_of_request if token in step), None)
    return first is not None and first.index(token) < len(first) - 1


@pytest.mark.feature("end of text inside an accepted path")
def test_the_end_of_the_text_inside_an_accepted_path(plain, ctc, steps):
    eos = ctc.get_tokenizer().convert_tokens_to_ids(EOS)
    assert sum(is_inside(brought, eos) for brought in steps) > 2
    given = answers(ctc, ending())
    assert given == answers(plain, ending())
    assert {reason for _, _, reason, *_ in given} == {"stop", "length"}


@pytest.mark.feature("`ignore_eos`")
def test_an_end_of_the_text_that_is_ignored(plain, ctc):
    given = answers(ctc, ending(ignore_eos=True))
    assert given == answers(plain, ending(ignore_eos=True)) != answers(plain, ending())
    assert {len(tokens) for tokens, *_ in given} == {LENGTH}


@pytest.mark.feature("`min_tokens`")
@pytest.mark.parametrize("least", [15, 30])
def test_the_end_of_the_text_is_forbidden_at_first(plain, ctc, least):
    given = answers(ctc, ending(min_tokens=least))
    assert given == answers(plain, ending(min_tokens=least)) != answers(plain, ending())
    assert least <= min(len(tokens) for tokens, *_ in given) < LENGTH


@pytest.mark.feature("stop tokens")
def test_stop_tokens_inside_an_accepted_path(plain, ctc, steps):
    cases = [
        (prompt, step[0])
        for prompt, brought in zip(PROMPTS[:4], steps)
        for step in brought
        if len(step) > 1 and is_inside(brought, step[0])
    ]
    assert len(cases) > 10
    prompts = [prompt for prompt, _ in cases]
    parameters = [ending(stop_token_ids=[token], ignore_eos=True) for _, token in cases]
    assert answers(ctc, parameters, prompts) == answers(plain, parameters, prompts)


@pytest.mark.feature("stop strings")
@pytest.mark.parametrize("kept", [False, True], ids=["cut off", "kept"])
def test_stop_strings_inside_accepted_paths_and_across_them(plain, ctc, steps, kept):
    """Ends before a step's last token: within the step, or begun in the step before."""
    cases = []

    def decode(tokens: list[int]) -> str:
        return ctc.get_tokenizer().decode(tokens, skip_special_tokens=True)

    for prompt, brought in zip(PROMPTS[:4], steps):
        tokens = [token for step in brought for token in step]
        begin = len(brought[0])
        for step in brought[1:]:
            for first in (begin - 1, begin):
                stop, is_inside_the_step = decode(tokens[first : first + 2]), first + 2 < begin + len(step)
                if len(stop) == 2 and is_inside_the_step and decode(tokens).index(stop) == len(decode(tokens[:first])):
                    cases.append((prompt, stop))
            begin += len(step)
    assert len(cases) > 20
    prompts = [prompt for prompt, _ in cases]
    parameters = [ending(stop=[stop], include_stop_str_in_output=kept, ignore_eos=True) for _, stop in cases]
    given = answers(ctc, parameters, prompts)
    assert given == answers(plain, parameters, prompts)
    assert all(reason == "stop" for _, _, reason, *_ in given)
