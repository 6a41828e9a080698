"""Responses by vLLM engines in Ray's workers: the same shards as without Ray, and errors as one sentence.

Those that start engines take minutes on a busy machine: `pytest -m slow tests/training/ray/test_data.py`.
"""

import dataclasses
import json
import pickle
import sys

import pytest
import torch

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training import dataset, dataset_writer
from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.conversations import Answer, Conversation
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import read_examples
from vllm_ctc_spec.training.engine import EngineConfig
from vllm_ctc_spec.training.ray import data as ray_data
from vllm_ctc_spec.training.ray.data import RayOptions, generate_with_ray, refuse_to_guess_dtype, workers_that_fit

from ..tiny import answers_of, by_transformers, make_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("served"), head_dim=32)


@pytest.fixture
def config(folder, rows_file, tmp_path):
    return DataConfig(str(folder), str(rows_file), tmp_path / "data", 20, 0.0, 3, held_out=2, dtype="float32")


def with_ray(num_workers):
    return lambda config, shards, advance: generate_with_ray(config, shards, advance, RayOptions(None, num_workers))


@pytest.mark.slow
def test_two_workers_make_the_missing_shards_as_one_process_does(config, monkeypatch):
    monkeypatch.setattr(dataset_writer, "SHARD_PROMPTS", 4)
    expected = dataclasses.replace(config, output=config.output.with_name("expected"))
    make_dataset(expected, False, by_transformers)
    make_dataset(config, False, by_transformers)
    for missing in ("train-00001", "train-00003", "train-00005"):
        (config.output / f"{missing}.jsonl").unlink()
    seen = []

    def generate(engine, shards, advance):
        for shard, responses in with_ray(2)(engine, shards):
            seen.append((shard.part, shard.index))
            yield shard, responses

    make_dataset(config, False, generate)
    assert sorted(seen) == [("train", 1), ("train", 3), ("train", 5)]
    assert [path.read_bytes() for path in sorted(config.output.iterdir())] == [
        path.read_bytes() for path in sorted(expected.output.iterdir())
    ]
    assert len(read_examples(config.output, "train")) == 22


@pytest.mark.slow
def test_workers_continue_conversations_with_the_targets_answers(config, tmp_path):
    (tmp_path / "rows").write_text("".join(json.dumps({"turns": [c, c + "b"]}) + "\n" for c in "defghijk"))
    config = dataclasses.replace(config, prompts=str(tmp_path / "rows"), regenerate=True, max_new_tokens=8, held_out=1)
    expected = dataclasses.replace(config, output=config.output.with_name("expected"))
    make_dataset(expected, False, by_transformers)
    make_dataset(config, False, with_ray(1))
    found, right = (read_examples(each.output, "train") for each in (config, expected))
    assert found == right and {example.turn for example in found} == {1, 2}


@pytest.mark.slow
def test_what_a_worker_refuses_is_said_here(config, tmp_path):
    """vLLM's attention on a CPU has no head of 16: the engine starts and fails."""
    bad = dataclasses.replace(config, target=str(make_target(tmp_path / "bad", head_dim=16)))
    if torch.cuda.is_available():
        pytest.skip("a GPU serves this target")
    with pytest.raises(TrainingError, match="vLLM failed while it generated responses") as caught:
        make_dataset(bad, False, with_ray(1))
    assert "\n" not in str(caught.value) and not config.output.exists()


def test_the_dtype_on_other_machines_is_not_guessed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="say --dtype bfloat16 or --dtype float32"):
        refuse_to_guess_dtype("auto", "10.0.0.1:6379")
    for dtype, address in (("auto", None), ("float32", "10.0.0.1:6379")):
        refuse_to_guess_dtype(dtype, address)


def test_a_missing_ray_is_one_sentence(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TrainingError, match=r"pip install 'ray\[data,train\]'"):
        make_dataset(config, False, with_ray(1))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(TrainingError, match=r"Ray Data cannot be imported .*pip install 'ray\[data,train\]'"):
        ray_data._ray_data()
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("asked", "each", "resources", "expected"),
    [
        (None, 1, {"CPU": 8.0}, (1, {"num_cpus": 1})),
        (3, 1, {"CPU": 8.0}, (3, {"num_cpus": 1})),
        (None, 1, {"CPU": 8.0, "GPU": 4.0}, (4, {"num_gpus": 1})),
        (2, 1, {"CPU": 8.0, "GPU": 4.0}, (2, {"num_gpus": 1})),
        (None, 2, {"CPU": 8.0, "GPU": 5.0}, (2, {"num_gpus": 2})),
        (2, 2, {"CPU": 4.0}, (2, {"num_cpus": 2})),
    ],
)
def test_as_many_workers_as_fit_or_as_asked(asked, each, resources, expected):
    assert workers_that_fit(RayOptions(None, asked), resources, each) == expected


def test_more_workers_than_the_cluster_has_are_refused():
    with pytest.raises(TrainingError, match=r"3 workers \(--num-workers\) of 2 GPUs each .* need 6, and .* has 4"):
        workers_that_fit(RayOptions(None, 3), {"CPU": 8.0, "GPU": 4.0}, 2)
    with pytest.raises(TrainingError, match="--num-workers must be 1 or more"):
        RayOptions(None, 0)


def test_an_actor_starts_one_engine_and_returns_its_errors(monkeypatch):
    started = []
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # restored: the actor sets it

    class Recorder:
        def __init__(self, config):
            started.append(config)

        def responses(self, shard):
            if shard.part == "train":
                raise TrainingError("no more")
            return answers_of(shard, lambda prompt: [token + 1 for token in prompt])

    monkeypatch.setattr(ray_data, "Engine", Recorder)
    actor = ray_data.EngineActor(EngineConfig("t", "auto", 9, 9, 9, 0))
    assert not started
    right = [[Answer([1, 2], [2, 3])]]
    for number, (part, expected, error) in enumerate([("held-out", right, ""), ("train", [], "no more")]):
        shard = dataset.Shard(part, 0, [0], [Conversation.of_one([1, 2])], 0.0)
        found = actor({"number": [number], "shard": [pickle.dumps(shard)]})
        assert (found["number"], pickle.loads(found["answers"][0]), found["error"]) == ([number], expected, [error])
    assert len(started) == 1
