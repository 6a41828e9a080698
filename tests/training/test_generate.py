"""Responses in this process: those of transformers for each prompt alone, in the target's own law."""

import dataclasses

import pytest
import torch
from transformers import GenerationConfig

from vllm_ctc_spec.training import generate
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.target import Target

from .tiny import make_target

PROMPTS = [[1, 5, 6, 3, 2], [1, 7, 3, 2], [1, 8, 9, 10, 11, 12, 3, 2], [1, 20, 3, 2], [1, 4, 4, 3, 2]]
LONG = [1] + [5] * 57 + [3, 2]


def responses(target, prompts, *settings, **more) -> list[list[int]]:
    return [example.response for example in respond(target, prompts, *settings, **more)]


def test_greedy_responses_are_the_most_probable_tokens_to_the_end_token(target):
    first = target.model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1].argmax()
    # An end token that one row says at once, so that rows end at different times.
    target = dataclasses.replace(target, eos_ids=frozenset({int(first), 3}))
    found = respond(target, PROMPTS, 12)
    assert [example.prompt for example in found] == PROMPTS
    for example in found:
        expected: list[int] = []
        while len(expected) < 12 and not (expected and expected[-1] in target.eos_ids):
            logits = target.model(input_ids=torch.tensor([example.prompt + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert example.response == expected
    assert len({len(example.response) for example in found}) > 1


def test_padding_on_the_left_has_no_positions(target):
    """Rotary targets only see differences, others would see the shift."""
    seen = []
    target.model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    respond(target, PROMPTS, 2)
    rows = sorted(PROMPTS, key=len)
    assert [row[-len(p) :] for row, p in zip(seen[0].tolist(), rows)] == [list(range(len(p))) for p in rows]
    assert seen[1][:, 0].tolist() == [len(p) for p in rows]


def test_responses_end_at_the_targets_positions_and_a_long_row_does_not_shorten_the_others(target):
    target = dataclasses.replace(target, eos_ids=frozenset())
    seen = []
    target.model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    found = responses(target, [PROMPTS[0], LONG], 12)
    assert [len(response) for response in found] == [12, target.max_length - len(LONG)]
    assert found[0] == responses(target, PROMPTS[:1], 12)[0]
    assert max(int(positions.max()) for positions in seen) < target.max_length


@pytest.mark.parametrize(("bound", "value", "batches"), [("ROWS_AT_ONCE", 2, 3), ("TOKENS_AT_ONCE", 1, 5)])
def test_rows_that_need_too_much_memory_are_split_with_the_same_responses(target, monkeypatch, bound, value, batches):
    expected, sizes, whole = responses(target, PROMPTS, 12), [], target.model.generate
    monkeypatch.setattr(generate, bound, value)
    monkeypatch.setattr(
        target.model, "generate", lambda ids, **options: sizes.append(len(ids)) or whole(ids, **options)
    )
    assert responses(target, PROMPTS, 12) == expected
    assert len(sizes) == batches and sum(sizes) == 5


def test_a_long_prompt_does_not_pad_short_ones():
    """A step of a batch reads every row up to the longest: 15 short prompts and one of 1600 tokens took minutes."""
    batches = generate._batches([1600, 100, 20, 110, 30, 900, 700], 96, 8192)
    assert batches == [(96, [2, 4, 1, 3]), (96, [6, 5]), (96, [0])]


def test_samples_follow_the_targets_law_whatever_its_folder_asks_for(tmp_path):
    folder = make_target(tmp_path)
    GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, eos_token_id=3).save_pretrained(folder)
    target = Target.load(str(folder), torch.device("cpu"), torch.float32)
    count, law = 4000, target.model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    found = responses(target, [PROMPTS[0]] * count, 1, temperature=1.0)
    frequencies = torch.bincount(torch.tensor(found)[:, 0], minlength=len(law)) / count
    assert law.max() < 0.9
    assert (frequencies - law).abs().sum() < 0.1  # expected: about 0.8 * sqrt(31 / 4000) = 0.07 at most
    assert target.eos_ids == {3}


def test_temperature_and_seed_decide_the_samples(target):
    def sampled(seed, temperature=1.0):
        return responses(target, PROMPTS, 12, temperature, seed)

    assert sampled(0) == sampled(0) != sampled(1)
    assert sampled(0, 1e-4) == responses(target, PROMPTS, 12)
