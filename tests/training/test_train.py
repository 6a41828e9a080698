"""A whole run on a tiny target: it learns, a kill changes nothing, and every setting matters."""

import dataclasses
import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file

from vllm_ctc_spec.drafter.config import ARCHITECTURES, DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.training import checkpoint, dataset_writer
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import epochs, sample_batch
from vllm_ctc_spec.training.checkpoint import RunPaths
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.dataset import Example, read_shard
from vllm_ctc_spec.training.dataset_writer import plan_shards, write_states
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.loop import Trainer
from vllm_ctc_spec.training.prompts import PromptBuilder, read_prompts
from vllm_ctc_spec.training.run import drafter_shape, examples_read, prepare, train
from vllm_ctc_spec.training.target import Target, TargetText

from .tiny import answers_of, by_transformers

SMALL = dict(
    num_frames=5, num_labels=3, markov_rank=4, steps=12, batch_size=4, anchors=6, max_new_tokens=20, held_out=2,
    save_every=4, eval_every=6,
)  # fmt: skip


@pytest.fixture
def config(target_folder, dataset_folder):
    return TrainConfig(target=str(target_folder), data=str(dataset_folder), **SMALL)


@pytest.fixture
def from_prompts(config, rows_file):
    """The same run, whose target has to answer first."""
    return dataclasses.replace(config, data=str(rows_file))


def paths(folder: Path, labels: Path | None = None) -> RunPaths:
    return RunPaths(folder, folder / "work", labels or folder / "work" / "labels")


def read_log(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if not key.endswith("seconds")} for entry in entries]


def changed(config: TrainConfig, **change) -> TrainConfig:
    """Other settings, with what follows from them resolved again."""
    return dataclasses.replace(config, **{"lattice": None, "transition_rank": None, "blank_share": None, **change})


def make_trainer(config: TrainConfig, target) -> Trainer:
    shape = drafter_shape(config, target.config)
    hidden_states = in_process(target, shape.aux_hidden_state_layer_ids)
    return Trainer(config, shape, hidden_states, target.embedding, target.head)


SPECFORMER = {"architecture": "specformer"}
TRAINED = [
    {"lattice": "ctc"}, {"lattice": "transitions"}, {"loss": "ctc", "markov_rank": 0}, {"loss": "ce"},
    SPECFORMER | {"lattice": "transitions", "frame_attention": "causal", "positional_rank": 8},
]  # fmt: skip


@pytest.mark.parametrize("settings", TRAINED, ids=lambda settings: ", ".join(map(str, settings.values())))
def test_training_lowers_the_loss_and_publishes_the_best(config, settings, tmp_path, target):
    config = changed(config, **settings, steps=40, eval_every=20)
    report = train(config, paths(tmp_path), overwrite=False)
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, 41))
    mean = [entry["loss_sum"] / entry["anchors_total"] for entry in log]
    assert sum(mean[-5:]) < 0.8 * sum(mean[:5])
    drafter = CTCDrafter.load(tmp_path, target.embedding, target.head)
    assert drafter.config.target == config.target
    for name in ("architecture", "frame_attention", "positional_rank"):
        assert getattr(drafter.config, name) == getattr(config, name)
    measured = [e["held_out_tokens_total"] / e["held_out_steps_total"] for e in log if "held_out_steps_total" in e]
    assert f"with chains of 3 labels: {max(measured):.3f} +-" in report
    assert TrainConfig(**json.loads((tmp_path / "train_config.json").read_text())) == config
    assert report.splitlines()[-1].startswith("Each training sequence was read 7.")
    card = metadata_load(tmp_path / "README.md")
    assert (card["license"], card["base_model"]) == ("unknown", Path(config.target).name)


def test_a_run_says_what_it_will_take_and_how_long(config, tmp_path, capsys):
    train(config, paths(tmp_path), overwrite=False)
    said = capsys.readouterr().out.splitlines()
    (forecast,) = [line for line in said if line.startswith("The steps read 48 sequences, each of the ")]
    assert "labels at" in forecast
    (time_left,) = [line for line in said if line.startswith("step 10: ")]
    assert "seconds a step, about" in time_left and time_left.endswith("to go")
    (halfway,) = [line for line in said if line.startswith("step 6: held-out acceptance length")]
    assert "; about " in halfway and halfway.endswith(" to go")


def test_losses_are_those_of_a_training_step(config, target, dataset_folder):
    """With all anchors, whose choice then does not matter."""
    trainer = make_trainer(dataclasses.replace(config, anchors=50), target)
    examples = read_shard(dataset_folder / "train-00000.jsonl")[:6]
    sums, numbers = trainer.losses(trainer.drafter, examples)
    batch = sample_batch(examples, 50, config.num_labels, 0)
    loss_sum, _, _ = trainer.backward(examples, batch)
    assert sum(sums) == pytest.approx(loss_sum, rel=1e-4) and sum(numbers) == int(batch.valid[..., 0].sum())
    assert len(sums) == len(numbers) == sum(len(example.response) > 1 for example in examples)


def test_the_sequences_that_were_read_are_all_or_those_of_a_short_run(config, dataset_folder):
    examples = read_shard(dataset_folder / "train-00000.jsonl")
    usable = [example for example in examples if len(example.response) > 1]
    few = examples_read(examples, dataclasses.replace(config, steps=2))
    batches = epochs(examples, config.batch_size, config.seed)
    assert {id(each) for each in few} == {id(each) for batch in (next(batches), next(batches)) for each in batch}
    every = examples_read(examples, dataclasses.replace(config, steps=50))
    assert len(few) == 8 and {id(each) for each in every} == {id(each) for each in usable}


def test_what_was_sampled_is_not_compared_with_what_was_not(config, dataset_folder, tmp_path):
    sampled = shutil.copytree(dataset_folder, tmp_path / "sampled")
    settings = json.loads((sampled / "settings.json").read_text())
    (sampled / "settings.json").write_text(json.dumps({**settings, "temperature": 1.0}))
    for data, compared in ((sampled, False), (dataset_folder, True)):
        report = train(dataclasses.replace(config, data=str(data)), paths(tmp_path / data.name), overwrite=False)
        assert ("the loss on held-out responses is" in report) == compared


def test_settings_that_an_earlier_version_did_not_record_are_their_defaults(config, tmp_path):
    train(config, paths(tmp_path), overwrite=False)
    for folder in (tmp_path, tmp_path / "work"):
        recorded = json.loads((folder / "train_config.json").read_text())
        for name in ("regenerate", "license", "base_model"):
            del recorded[name]
        (folder / "train_config.json").write_text(json.dumps(recorded))
    train(config, paths(tmp_path), overwrite=False)
    del recorded["lr"]
    (tmp_path / "work" / "train_config.json").write_text(json.dumps(recorded))
    with pytest.raises(TrainingError, match="--lr 0.004 -> 0.5"):
        train(dataclasses.replace(config, lr=0.5), paths(tmp_path), overwrite=False)


def test_the_licence_may_change_when_a_run_is_repeated(config, tmp_path):
    train(config, paths(tmp_path), overwrite=False)
    train(dataclasses.replace(config, license="mit", base_model="org/name"), paths(tmp_path), overwrite=False)
    card = metadata_load(tmp_path / "README.md")
    assert (card["license"], card["base_model"]) == ("mit", "org/name")


def test_a_killed_run_continues_with_the_same_losses(config, tmp_path):
    """The process dies without warning after the checkpoint of step 4, in the middle of what follows."""
    train(config, paths(tmp_path / "whole"), overwrite=False)
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    killed = tmp_path / "killed"
    waiting = "import time; from vllm_ctc_spec.training import loop; step = loop.Trainer.step\n"
    waiting += "loop.Trainer.step = lambda self, e: time.sleep(600) if self.progress.step == 6 else step(self, e)\n"
    waiting += "import sys; from vllm_ctc_spec.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", waiting, "train", "--target", config.target, "--data", config.data, "--output"]
    command += [str(killed), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = killed / "work" / "log.jsonl", time.monotonic() + 300  # a busy machine loads PyTorch for minutes
    try:
        while not log.is_file() or len(log.read_text().splitlines()) < 6:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (killed / "config.json").exists()
    with log.open("a") as file:
        file.write('{"step": 7, "loss_s')  # a line that the kill cut short
    report = train(config, paths(killed), overwrite=False)
    assert read_log(killed) == read_log(tmp_path / "whole")
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (killed, tmp_path / "whole"))
    assert ours == theirs
    assert report.splitlines()[1] in train(config, paths(killed), overwrite=False)  # nothing left to do


def test_resuming_starts_at_the_checkpoint(config, tmp_path, monkeypatch):
    step, steps = Trainer.step, []

    def stop_at_ten(self, examples):
        steps.append(self.progress.step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step(self, examples)

    monkeypatch.setattr(Trainer, "step", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        train(config, paths(tmp_path), overwrite=False)
    train(config, paths(tmp_path), overwrite=False)
    assert steps == [*range(10), 8, 9, 10, 11]


def test_a_crash_while_publishing_leaves_no_drafter(config, tmp_path, monkeypatch):
    train(config, paths(tmp_path), overwrite=False)
    move = checkpoint.shutil.move

    def crash(source, destination):
        if destination.name == "config.json":
            raise OSError("disk gone")
        return move(source, destination)

    monkeypatch.setattr(checkpoint.shutil, "move", crash)
    with pytest.raises(OSError, match="disk gone"):
        train(dataclasses.replace(config, seed=1), paths(tmp_path), overwrite=True)
    with pytest.raises(DrafterConfigError, match="config.json is missing"):
        DrafterConfig.load(tmp_path)


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(config, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def full_at_the_second(state, path):
        saved.append(path)
        if len(saved) == 2:
            path.write_bytes(b"half of it")
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    with pytest.raises(TrainingError, match="checkpoint.pt cannot be written to .*the same command continues"):
        train(config, paths(tmp_path), overwrite=False)
    assert torch.load(tmp_path / "work" / "checkpoint.pt")["step"] == 4
    assert not list((tmp_path / "work").glob("*.tmp"))
    train(config, paths(tmp_path), overwrite=False)
    assert [entry["step"] for entry in read_log(tmp_path)] == list(range(1, 13))


def test_a_full_disk_at_the_end_publishes_nothing(config, tmp_path, monkeypatch):
    def full(self, folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CTCDrafter, "save", full)
        with pytest.raises(TrainingError, match="The drafter cannot be written to .*the same command continues"):
            train(config, paths(tmp_path), overwrite=False)
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "work" / "staged").exists()
    train(config, paths(tmp_path), overwrite=False)
    assert DrafterConfig.load(tmp_path).num_frames == 5


def test_a_dataset_gives_the_run_of_its_prompts_and_so_do_its_stored_states(
    from_prompts, tmp_path, target, monkeypatch
):
    config, labels = from_prompts, tmp_path / "labels"
    train(config, paths(tmp_path / "prompts", labels), overwrite=False, generate=by_transformers)
    from_dataset = dataclasses.replace(config, data=str(labels))
    train(from_dataset, paths(tmp_path / "dataset"), overwrite=False)
    assert read_log(tmp_path / "dataset") == read_log(tmp_path / "prompts")
    assert DrafterConfig.load(tmp_path / "dataset").target_dtype == "float32"
    assert DrafterConfig.load(tmp_path / "prompts").target_dtype == "float32"
    layer_ids = drafter_shape(config, target.config).aux_hidden_state_layer_ids
    run = in_process(target, layer_ids)

    def states(shards, advance):
        for shard in shards:
            ids = [torch.tensor([e.prompt + e.response]) for e in read_shard(shard.path(labels))]
            yield shard, torch.cat([run([], each)[0] for each in ids])

    text = TargetText.load(config.target)
    prompts = read_prompts(config.data, PromptBuilder(text, text.max_length, 20), 2)
    write_states(labels, plan_shards(prompts, 0.0), layer_ids, states)
    with monkeypatch.context() as patch:
        patch.setattr(Target, "load", None)  # such a run needs the target's tables alone
        train(dataclasses.replace(from_dataset, features="stored"), paths(tmp_path / "stored"), overwrite=False)
    stored = [entry["loss_sum"] for entry in read_log(tmp_path / "stored")]
    assert stored == pytest.approx([entry["loss_sum"] for entry in read_log(tmp_path / "prompts")], rel=2e-2)
    assert stored != [entry["loss_sum"] for entry in read_log(tmp_path / "prompts")]  # they are rounded to bf16
    other = dataclasses.replace(from_dataset, features="stored", aux_layers=(3,))
    with pytest.raises(TrainingError, match=r"not after \[3\]"):
        train(other, paths(tmp_path / "other"), overwrite=False)


def test_stored_features_need_a_dataset(from_prompts, tmp_path):
    config = from_prompts
    with pytest.raises(TrainingError, match="--features stored needs hidden states.*--hidden-states"):
        train(dataclasses.replace(config, features="stored"), paths(tmp_path), overwrite=False)
    assert not list(tmp_path.iterdir())


def test_another_run_in_the_folder_is_named_and_replaced_on_request(config, tmp_path):
    train(config, paths(tmp_path), overwrite=False)
    before = (tmp_path / "model.safetensors").read_bytes()
    other = dataclasses.replace(config, lr=1e-3, num_frames=6)
    with pytest.raises(TrainingError, match=r"--num-frames 5 -> 6, --lr 0.004 -> 0.001.*--overwrite"):
        train(other, paths(tmp_path), overwrite=False)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    train(other, paths(tmp_path), overwrite=True)
    assert DrafterConfig.load(tmp_path).num_frames == 6


def test_parts_of_a_step_checkpoints_and_measurements_may_change_in_between(config, tmp_path):
    """None of them changes the weights of a step."""
    train(config, paths(tmp_path / "whole"), overwrite=False)
    step, folder = Trainer.step, tmp_path / "changed"

    def stop(self, examples):
        if self.progress.step == 10:
            raise KeyboardInterrupt
        return step(self, examples)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stop)
        train(config, paths(folder), overwrite=False)
    change = dict(accumulate=2, save_every=3, eval_every=4)
    train(dataclasses.replace(config, **change), paths(folder), overwrite=False)
    log, whole = read_log(folder), read_log(tmp_path / "whole")
    assert [e["loss_sum"] for e in log] == pytest.approx([e["loss_sum"] for e in whole], rel=1e-4)
    assert [e["step"] for e in log if "held_out_steps_total" in e] == [6, 12]
    assert json.loads((folder / "train_config.json").read_text()).items() >= change.items()
    with pytest.raises(TrainingError, match="other settings .--batch-size 4 -> 2.; use"):
        train(dataclasses.replace(config, batch_size=2), paths(folder), overwrite=False)


def test_a_gpu_that_is_full_is_a_sentence(config, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB.")

    monkeypatch.setattr(Trainer, "backward", full)
    sentence = r"memory is too small \(CUDA out of memory. Tried to allocate 2.00 GiB\); the same run .*--accumulate"
    with pytest.raises(TrainingError, match=sentence):
        train(config, paths(tmp_path), overwrite=False)
    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    with pytest.raises(TrainingError, match=sentence):
        train(config, paths(tmp_path), overwrite=False)


@pytest.mark.parametrize(("gpu", "dtype"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_computes_in_bf16_unless_told_otherwise(gpu, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert TrainConfig("t", "d").dtype == EvalConfig("t", "d", "f").dtype == dtype
    assert TrainConfig("t", "d", dtype="fp32").dtype == EvalConfig("t", "d", "f", dtype="fp32").dtype == "fp32"


def test_beside_a_target_in_fp16_a_drafter_is_multiplied_in_bf16(config, tmp_path, monkeypatch):
    """fp16 has no range for gradients."""
    dtypes, linear = {True: set(), False: set()}, torch.nn.functional.linear

    def noting(*args):
        result = linear(*args)
        dtypes[result.requires_grad].add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", noting)
    monkeypatch.setattr(Trainer, "acceptance", lambda self, drafter, held_out: Acceptance([4], [2]))
    train(dataclasses.replace(config, dtype="fp16", steps=2), paths(tmp_path), overwrite=False)
    assert torch.float16 in dtypes[False]
    assert torch.bfloat16 in dtypes[True] and torch.float16 not in dtypes[True]
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "model.safetensors").values())


def test_nothing_is_loaded_or_claimed_while_a_run_is_prepared(config, from_prompts, tmp_path, monkeypatch):
    """The engine that answers needs the memory, and the weights may be needed in other processes alone."""
    monkeypatch.setattr(Target, "load", None)
    described = prepare(config, paths(tmp_path / "dataset"), False)
    assert not list(tmp_path.iterdir())
    examples = {tuple(example.prompt): example.response for example in described.examples + described.held_out}

    def recorded(engine, shards, advance):
        for shard in shards:
            yield shard, answers_of(shard, lambda prompt: examples[tuple(prompt)])

    prepared = prepare(from_prompts, paths(tmp_path / "prompts"), False, recorded)
    assert [path.name for path in (tmp_path / "prompts" / "work").iterdir()] == ["labels"]
    assert (described.drafter_config, described.examples) == (prepared.drafter_config, prepared.examples)


def test_the_target_answers_as_the_run_asks_and_where_shards_are_missing(from_prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_writer, "SHARD_PROMPTS", 8)
    config = dataclasses.replace(from_prompts, temperature=1.0, seed=3, chat_template_kwargs={"thinking": False})
    asked = []

    def generate(engine, shards, advance):
        asked.append((engine, [shard.path(Path()).name for shard in shards]))
        yield from by_transformers(engine, shards, advance)

    labels = tmp_path / "labels"
    first = prepare(config, paths(tmp_path / "out", labels), False, generate)
    engine, names = asked.pop()
    assert (engine.target, engine.dtype, engine.max_new_tokens, engine.seed) == (config.target, "float32", 20, 3)
    assert names == ["held-out-00000.jsonl", *(f"train-{i:05d}.jsonl" for i in range(3))]
    recorded = json.loads((labels / "settings.json").read_text())
    assert (recorded["temperature"], recorded["chat_template_kwargs"]) == (1.0, {"thinking": False})
    (labels / "train-00001.jsonl").unlink()
    again = prepare(config, paths(tmp_path / "other", labels), False, generate)
    assert asked.pop()[1] == ["train-00001.jsonl"] and again.held_out == first.held_out
    prepare(config, paths(tmp_path / "other", labels), False, generate)
    assert not asked


def test_answers_of_other_settings_or_another_target_are_refused_then_replaced(from_prompts, tmp_path, target):
    folder = tmp_path / "target"
    shutil.copytree(from_prompts.target, folder)
    config, where = dataclasses.replace(from_prompts, target=str(folder)), paths(tmp_path / "out", tmp_path / "labels")
    first = prepare(config, where, False, by_transformers)
    other = dataclasses.replace(config, max_new_tokens=5)
    with pytest.raises(TrainingError, match="--max-new-tokens 20 -> 5.*--overwrite"):
        prepare(other, where, False, by_transformers)
    assert prepare(config, where, False, by_transformers).examples == first.examples
    replaced = prepare(other, where, True, by_transformers)
    assert {len(example.response) for example in replaced.examples} <= {1, 2, 3, 4, 5}
    with torch.no_grad():
        target.model.model.layers[1].mlp.up_proj.weight += 0.1
    target.model.save_pretrained(folder)
    with pytest.raises(TrainingError, match="--target-weights"):
        prepare(other, where, False, by_transformers)


def test_refusals_write_nothing(config, tmp_path, target_folder):
    output = tmp_path / "out"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\n")
    for change, message in (
        ({"num_labels": 9, "num_frames": 5}, "5 frames hold 1 to 5 labels"),
        ({"markov_rank": -1}, "markov_rank must be 0"),
        ({"frame_attention": "causal"}, "are a SpecFormer's; leave them out, or set architecture"),
        ({"data": str(empty)}, "0 usable rows"),
        ({"target": str(tmp_path / "nowhere")}, "config.json is missing"),
    ):
        with pytest.raises((TrainingError, DrafterConfigError), match=message):
            train(dataclasses.replace(config, **change), paths(output), overwrite=False)
    assert not output.exists()
    files = sorted(target_folder.iterdir())
    for overwrite in (False, True):
        with pytest.raises(TrainingError, match="did not write"):
            train(config, paths(target_folder), overwrite)
    with pytest.raises(TrainingError, match="is a file"):
        train(config, paths(empty), overwrite=False)
    assert sorted(target_folder.iterdir()) == files


@pytest.mark.parametrize(
    "change",
    [{"anchors": 3}, {"batch_size": 2}, {"seed": 1}, {"lr": 1e-3}, {"num_layers": 1}, {"markov_rank": 0},
     {"loss": "ce"}, {"lattice": "transitions"}, {"num_labels": 2}, {"num_frames": 6}, {"dtype": "bf16"},
     {"optimizer": "adamw"}, {"warmup": 0}, {"clip": 1e-3}, {"position_decay": 1.0}, {"blank_share": 0.9},
     {"aux_layers": (1,)}, SPECFORMER],
)  # fmt: skip
def test_every_setting_changes_the_second_step(config, change, target):
    examples = [Example([1, 5 + i, 2], [6 + i, 7, 8 + i, 9, 10, 9, 7, 3]) for i in range(4)]

    def third_loss(config):
        trainer = make_trainer(config, target)
        for _ in range(3):
            entry = trainer.step(examples[: config.batch_size])
        return entry["loss_sum"]

    config = dataclasses.replace(config, steps=60, warmup=2)
    assert third_loss(config) == third_loss(config)
    assert third_loss(changed(config, **change)) != third_loss(config)


@pytest.mark.parametrize("change", [{"frame_attention": "causal"}, {"positional_rank": 8}], ids=str)
def test_every_setting_of_a_specformer_changes_its_frames(config, change, target):
    """From the same weights where shapes agree."""
    batch = sample_batch([Example([1, 5, 2], [6, 7, 8, 9, 10, 9, 7, 3])], 3, 3, seed=0)

    def loss(**settings) -> float:
        trainer = make_trainer(changed(config, **SPECFORMER, **settings), target)
        return trainer.backward([Example([1, 5, 2], [6, 7, 8, 9, 10, 9, 7, 3])], batch)[0]

    assert loss(**change) != loss()


def test_the_matrices_of_every_architecture_are_muons(config, target):
    for architecture in ARCHITECTURES:
        others, muon = make_trainer(changed(config, architecture=architecture), target).progress.optimizers
        shapes = [tuple(p.shape) for p in others.param_groups[0]["params"] if p.ndim == 2]
        tables = {(5, 32), (31, 4), (1, 32), (2, 32)}  # frame queries, label-conditional head, blank, norms of depths
        assert set(shapes) <= tables and len(muon.param_groups[0]["params"]) >= 8


def test_the_best_measured_drafter_is_published(config, tmp_path, monkeypatch):
    measured, weights = iter([Acceptance([9], [3]), Acceptance([4], [2]), Acceptance([9], [3])]), []

    def falling(self, drafter, held_out):
        weights.append({name: w.clone() for name, w in drafter.state_dict().items()})
        return next(measured)

    monkeypatch.setattr(Trainer, "acceptance", falling)
    report = train(config, paths(tmp_path), overwrite=False)
    assert "best of 12 steps is 6;" in report
    published = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(published, weights[0], rtol=0, atol=0)
    assert any((published[name] != weights[1][name]).any() for name in published)


def test_the_gradient_of_parts_is_the_gradient_of_the_whole(config, target):
    examples = [Example([1, 5 + i, 2], [6 + i, 7, 8 + i, 9, 10, 9, 7, 3][: 8 - i]) for i in range(4)]
    batch = sample_batch(examples, 6, 3, seed=0)
    results = []
    for accumulate in (1, 2, 4):
        trainer = make_trainer(dataclasses.replace(config, accumulate=accumulate), target)
        sums = trainer.backward(examples, batch)
        results.append((sums, [p.grad for p in trainer.drafter.parameters()]))
    whole = results[0]
    assert whole[0][1] == int(batch.valid.sum())
    for sums, gradients in results[1:]:
        assert sums == pytest.approx(whole[0])
        torch.testing.assert_close(gradients, whole[1])


def test_a_run_can_start_from_another_drafter(config, tmp_path, target):
    """A CTC drafter from a cross-entropy start takes all but the blank; without a step in between it is the same."""
    train(changed(config, loss="ce"), paths(tmp_path / "ce"), overwrite=False)
    started = make_trainer(dataclasses.replace(config, init=str(tmp_path / "ce")), target).drafter.state_dict()
    weights = load_file(tmp_path / "ce" / "model.safetensors")
    assert started.keys() - weights.keys() == {"blank_head.weight", "blank_head.bias"}
    torch.testing.assert_close({name: started[name] for name in weights}, weights, rtol=0, atol=0)
    with pytest.raises(DrafterConfigError, match="config.json is missing"):
        make_trainer(dataclasses.replace(config, init=str(tmp_path)), target)


def test_the_tree_that_is_served_is_what_chooses_the_best(config, tmp_path):
    config = dataclasses.replace(config, tree_nodes=8)
    report = train(config, paths(tmp_path), overwrite=False)
    assert "with trees of 8 nodes" in report and DrafterConfig.load(tmp_path).tree_nodes == 8
    chain = train(dataclasses.replace(config, tree_nodes=0), paths(tmp_path / "chain"), overwrite=False)
    entries = [entry for entry in read_log(tmp_path) if "held_out_steps_total" in entry]
    chains = [entry for entry in read_log(tmp_path / "chain") if "held_out_steps_total" in entry]
    assert "with chains" in chain
    assert all(a["held_out_steps_total"] < b["held_out_steps_total"] for a, b in zip(entries, chains, strict=True))


def test_metrics_reach_tensorboard(config, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(config, paths(tmp_path), overwrite=False)
    events = reader.EventAccumulator(str(tmp_path / "work" / "tensorboard")).Reload()
    logged = [(e.step, e.value) for e in events.Scalars("loss_sum")]
    assert logged == [(e["step"], pytest.approx(e["loss_sum"])) for e in read_log(tmp_path)]


def test_a_diverging_run_says_so(config, tmp_path):
    with pytest.raises(TrainingError, match="lower --lr"):
        train(dataclasses.replace(config, lr=1e30), paths(tmp_path), overwrite=False)


def test_a_target_that_says_nothing_is_refused(from_prompts, tmp_path):
    def end_at_once(engine, shards, advance):
        return ((shard, answers_of(shard, lambda _: [3])) for shard in shards)

    with pytest.raises(TrainingError, match="nothing to draft"):
        train(from_prompts, paths(tmp_path), overwrite=False, generate=end_at_once)


def test_the_share_of_labels_that_did_not_fit_is_reported(config, tmp_path):
    config = dataclasses.replace(config, num_frames=3, num_labels=3)
    report = train(config, paths(tmp_path), overwrite=False)
    log = read_log(tmp_path)
    share = sum(e["infeasible_labels_total"] for e in log) / sum(e["labels_total"] for e in log)
    assert 0 < share < 1
    assert f"{share:.2%} of the labels did not fit 3 frames" in report
