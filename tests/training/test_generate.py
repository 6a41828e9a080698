"""Labels: the same as Hugging Face's own generation, cached in shards, never mixed between runs."""

import dataclasses

import pytest
import torch

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training import dataset, generate
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.generate import decode, make_labels, sample
from vllm_ctc_spec.training.prompts import Prompts

CONFIG = TrainConfig(target="t", data="d", max_new_tokens=12)
PROMPTS = [[1, 5, 6, 3, 2], [1, 7, 3, 2], [1, 8, 9, 10, 11, 12, 3, 2], [1, 20, 3, 2], [1, 4, 4, 3, 2]]


def test_greedy_responses_are_those_of_generate(target, monkeypatch):
    monkeypatch.setattr(generate, "CACHE_BLOCK", 3)
    logits = target.model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1]
    # An end token that one row says at once, so that rows leave the batch at different times.
    target = dataclasses.replace(target, eos_ids=frozenset({int(logits.argmax()), 3}))
    ended = []
    responses = decode(target, PROMPTS, 12, advance=ended.append)
    assert ended == [1] * len(PROMPTS)
    for prompt, response in zip(PROMPTS, responses):
        expected = target.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=sorted(target.eos_ids)
        )[0, len(prompt) :].tolist()
        assert response == expected
    assert len({len(response) for response in responses}) > 1


def test_padding_on_the_left_has_no_positions(target):
    """Rotary targets only see differences, others would see the shift."""
    seen = []
    target.model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    decode(target, PROMPTS, 2)
    assert [row[-len(p) :] for row, p in zip(seen[0].tolist(), PROMPTS)] == [list(range(len(p))) for p in PROMPTS]
    assert seen[1][:, 0].tolist() == [len(p) for p in PROMPTS]


def test_responses_end_at_the_targets_positions(target):
    prompt = [1] + [5] * 57 + [3, 2]
    target = dataclasses.replace(target, eos_ids=frozenset())
    assert len(decode(target, [prompt], 12)[0]) == target.max_length - len(prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("tokens", "batches"), [(1, 5), (40, 3), (10_000, 1)])
def test_rows_that_need_too_much_memory_are_split_with_the_same_responses(
    target, monkeypatch, temperature, tokens, batches
):
    def responses():
        return decode(target, prompts, 12, temperature, torch.Generator().manual_seed(3))

    # One row reaches the last position, which must not end the others.
    prompts = [*PROMPTS[:4], [1] + [5] * 57 + [3, 2]] if tokens == 1 else PROMPTS
    expected, sizes, whole = responses(), [], generate._decode_batch
    monkeypatch.setattr(generate, "TOKENS_AT_ONCE", tokens)
    monkeypatch.setattr(generate, "_decode_batch", lambda t, p, *rest: sizes.append(len(p)) or whole(t, p, *rest))
    assert responses() == expected
    assert len(sizes) == batches and sum(sizes) == 5


def test_a_long_row_does_not_shorten_the_others(target):
    """Although it leaves less room behind it in the batch."""
    target = dataclasses.replace(target, eos_ids=frozenset())
    responses = decode(target, [PROMPTS[0], [1] + [5] * 57 + [3, 2]], 12)
    assert [len(response) for response in responses] == [12, target.max_length - 60]
    assert responses[0] == decode(target, PROMPTS[:1], 12)[0]


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3]).log()
    dice = torch.tensor([0.0, 0.4999, 0.5001, 0.6999, 0.7001, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits.expand(6, 5), dice)[:, 0].tolist() == [1, 1, 3, 3, 4, 4]


def test_temperature_and_seed_decide_the_samples(target):
    def responses(seed, temperature=1.0):
        return decode(target, PROMPTS, 12, temperature, torch.Generator().manual_seed(seed))

    assert responses(0) == responses(0) != responses(1)
    assert responses(0, 1e-4) == decode(target, PROMPTS, 12)


def labels(target, folder, overwrite=False, **settings):
    prompts = Prompts(PROMPTS[:4], PROMPTS[4:], 0, 0)
    return make_labels(dataclasses.replace(CONFIG, **settings), target, prompts, folder, overwrite)


def test_a_rerun_decodes_only_the_missing_shards(target, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_PROMPTS", 2)
    first = labels(target, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == [
        "held-out-00000.jsonl", "train-00000.jsonl", "train-00001.jsonl",
    ]  # fmt: skip
    (tmp_path / "train-00001.jsonl").unlink()
    decoded = []
    monkeypatch.setattr(generate, "decode", lambda t, rows, *rest: decoded.append(rows) or decode(t, rows, *rest))
    assert labels(target, tmp_path) == first
    assert decoded == [sorted(PROMPTS[:4], key=len)[2:]]


def test_labels_of_other_settings_are_refused_then_replaced(target, tmp_path):
    first = labels(target, tmp_path)
    with pytest.raises(TrainingError, match="--max-new-tokens 12 -> 5.*--overwrite"):
        labels(target, tmp_path, max_new_tokens=5)
    assert labels(target, tmp_path) == first
    train, _ = labels(target, tmp_path, overwrite=True, max_new_tokens=5)
    assert {len(example.response) for example in train} <= {1, 2, 3, 4, 5}


def test_labels_of_a_retrained_target_are_refused(target, tmp_path):
    config = dataclasses.replace(CONFIG, target=str(tmp_path / "target"))
    prompts = Prompts(PROMPTS[:4], PROMPTS[4:], 0, 0)
    target.model.save_pretrained(config.target)
    make_labels(config, target, prompts, tmp_path / "labels", overwrite=False)
    with torch.no_grad():
        target.model.model.layers[1].mlp.up_proj.weight += 0.1
    target.model.save_pretrained(config.target)
    with pytest.raises(TrainingError, match="--target-weights"):
        make_labels(config, target, prompts, tmp_path / "labels", overwrite=False)


def test_held_out_responses_are_greedy_at_any_temperature(target, tmp_path):
    train, held_out = labels(target, tmp_path, temperature=1.0, seed=3)
    assert [e.response for e in held_out] == decode(target, PROMPTS[4:], 12)
    assert [e.response for e in train] != decode(target, sorted(PROMPTS[:4], key=len), 12)
