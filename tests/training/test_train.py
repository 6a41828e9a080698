"""A whole run on a tiny target: it learns, a kill changes nothing, and every setting matters."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_ctc_spec.config import DrafterConfig, DrafterConfigError
from vllm_ctc_spec.drafter import CTCDrafter, Frames
from vllm_ctc_spec.training import checkpoint, generate, loop
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import sample_batch
from vllm_ctc_spec.training.checkpoint import RunPaths
from vllm_ctc_spec.training.generate import Example
from vllm_ctc_spec.training.loop import Trainer, train
from vllm_ctc_spec.training.loss import prefix_loss
from vllm_ctc_spec.training.settings import TrainConfig, TrainingError

SMALL = dict(
    num_frames=5, num_labels=3, markov_rank=4, steps=12, batch_size=4, anchors=6, max_new_tokens=20, held_out=2,
    save_every=4, eval_every=6,
)  # fmt: skip


@pytest.fixture
def config(target_folder, rows_file):
    return TrainConfig(target=str(target_folder), data=str(rows_file), **SMALL)


def paths(folder: Path, labels: Path | None = None) -> RunPaths:
    return RunPaths(folder, folder / "work", labels or folder / "work" / "labels")


@pytest.fixture(scope="session")
def shared_labels(tmp_path_factory):
    return tmp_path_factory.mktemp("labels")


def read_log(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


@pytest.mark.parametrize("loss", ["prefix", "ctc", "ce"])
def test_training_lowers_the_loss_and_publishes_the_best(config, loss, tmp_path, shared_labels, target):
    config = dataclasses.replace(config, loss=loss, markov_rank=0 if loss == "ctc" else 4, steps=40, eval_every=20)
    report = train(config, paths(tmp_path, shared_labels), overwrite=False)
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == list(range(1, 41))
    mean = [entry["loss_sum"] / entry["anchors_total"] for entry in log]
    assert sum(mean[-5:]) < 0.8 * sum(mean[:5])
    drafter = CTCDrafter.load(tmp_path, target.embedding, target.head)
    assert drafter.config.target == config.target
    measured = [e["held_out_tokens_total"] / e["held_out_steps_total"] for e in log if "held_out_steps_total" in e]
    assert f"with 3 labels: {max(measured):.3f} +-" in report
    assert ("vllm serve" in report) == (loss != "ce")
    assert TrainConfig(**json.loads((tmp_path / "train_config.json").read_text())) == config


def test_a_killed_run_continues_with_the_same_losses(config, tmp_path, shared_labels):
    """The process dies without warning after the checkpoint of step 4, in the middle of what follows."""
    train(config, paths(tmp_path / "whole", shared_labels), overwrite=False)
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    killed = tmp_path / "killed"
    slow = "import time; from vllm_ctc_spec.training import loop; step = loop.Trainer.step\n"
    slow += "loop.Trainer.step = lambda self, e: (time.sleep(0.2), step(self, e))[1]\n"
    slow += "import sys; from vllm_ctc_spec.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", slow, "train", "--target", config.target, "--data", config.data, "--output"]
    command += [str(killed), "--labels", str(shared_labels), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = killed / "work" / "log.jsonl", time.monotonic() + 60
    while not log.is_file() or len(log.read_text().splitlines()) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists()
    with log.open("a") as file:
        file.write('{"step": 7, "loss_s')  # a line that the kill cut short
    report = train(config, paths(killed, shared_labels), overwrite=False)
    assert read_log(killed) == read_log(tmp_path / "whole")
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (killed, tmp_path / "whole"))
    assert ours == theirs
    assert report.splitlines()[1] in train(config, paths(killed, shared_labels), overwrite=False)  # nothing left to do


def test_resuming_starts_at_the_checkpoint(config, tmp_path, shared_labels, monkeypatch):
    step, steps = Trainer.step, []

    def stop_at_ten(self, examples):
        steps.append(self.progress.step)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step(self, examples)

    monkeypatch.setattr(Trainer, "step", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        train(config, paths(tmp_path, shared_labels), overwrite=False)
    train(config, paths(tmp_path, shared_labels), overwrite=False)
    assert steps == [*range(10), 8, 9, 10, 11]


def test_a_crash_while_publishing_leaves_no_drafter(config, tmp_path, shared_labels, monkeypatch):
    train(config, paths(tmp_path, shared_labels), overwrite=False)
    move = checkpoint.shutil.move

    def crash(source, destination):
        if destination.name == "config.json":
            raise OSError("disk gone")
        return move(source, destination)

    monkeypatch.setattr(checkpoint.shutil, "move", crash)
    with pytest.raises(OSError, match="disk gone"):
        train(dataclasses.replace(config, seed=1), paths(tmp_path, shared_labels), overwrite=True)
    with pytest.raises(DrafterConfigError, match="config.json is missing"):
        DrafterConfig.load(tmp_path)


def test_another_run_in_the_folder_is_named_and_replaced_on_request(config, tmp_path, shared_labels):
    train(config, paths(tmp_path, shared_labels), overwrite=False)
    before = (tmp_path / "model.safetensors").read_bytes()
    other = dataclasses.replace(config, lr=1e-3, num_frames=6)
    with pytest.raises(TrainingError, match=r"--num-frames 5 -> 6, --lr 0.004 -> 0.001.*--overwrite"):
        train(other, paths(tmp_path, shared_labels), overwrite=False)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    train(other, paths(tmp_path, shared_labels), overwrite=True)
    assert DrafterConfig.load(tmp_path).num_frames == 6


def test_refusals_write_nothing(config, tmp_path, target_folder):
    output = tmp_path / "out"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("{}\n")
    for change, message in (
        ({"num_labels": 9, "num_frames": 5}, "5 frames hold 1 to 5 labels"),
        ({"markov_rank": -1}, "markov_rank must be 0"),
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
     {"loss": "ce"}, {"num_labels": 2}, {"num_frames": 6}, {"dtype": "bf16"}],
)  # fmt: skip
def test_every_setting_changes_the_second_step(config, change, target):
    examples = [Example([1, 5 + i, 2], [6 + i, 7, 8 + i, 9, 10, 9, 7, 3]) for i in range(4)]

    def second_loss(config):
        shape = {name: getattr(config, name) for name in ("num_frames", "num_labels", "num_layers", "markov_rank")}
        trainer = Trainer(config, DrafterConfig.for_target(target.model.config, **shape), target)
        for _ in range(2):
            entry = trainer.step(examples[: config.batch_size])
        return entry["loss_sum"]

    assert second_loss(config) == second_loss(config)
    assert second_loss(dataclasses.replace(config, **change)) != second_loss(config)


def test_the_best_measured_drafter_is_published(config, tmp_path, shared_labels, monkeypatch):
    measured, weights = iter([Acceptance([9], [3]), Acceptance([4], [2]), Acceptance([9], [3])]), []

    def falling(self, held_out):
        weights.append({name: w.clone() for name, w in self.drafter.state_dict().items()})
        return next(measured)

    monkeypatch.setattr(Trainer, "acceptance", falling)
    report = train(config, paths(tmp_path, shared_labels), overwrite=False)
    assert "best of 12 steps is 6;" in report
    published = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(published, weights[0], rtol=0, atol=0)
    assert any((published[name] != weights[1][name]).any() for name in published)


def test_the_gradient_of_parts_is_the_gradient_of_the_whole(config, target, monkeypatch):
    examples = [Example([1, 5 + i, 2], [6 + i, 7, 8 + i, 9, 10, 9, 7, 3]) for i in range(4)]
    gradients = []
    drafter_config = DrafterConfig.for_target(target.model.config, num_frames=5, num_labels=3)
    batch = sample_batch(examples, 6, 3, seed=0)
    for at_once in (2, 1000):
        monkeypatch.setattr(loop, "ANCHORS_AT_ONCE", at_once)
        trainer = Trainer(config, drafter_config, target)
        loss_sum, anchors_total, _ = trainer.backward(batch)
        gradients.append([p.grad for p in trainer.drafter.parameters()])
    assert anchors_total == 24
    whole = Trainer(config, drafter_config, target)
    frames = whole.drafter(whole.aux_hidden_states(batch.token_ids), batch.anchors, batch.positions)
    frames = Frames(frames.logits.flatten(0, 1), frames.blank_odds.flatten(0, 1))
    result = prefix_loss(frames, batch.labels.flatten(0, 1), batch.valid.flatten(0, 1), None)
    result.loss.mean().backward()
    assert loss_sum == pytest.approx(float(result.loss.detach().sum()))
    for gradient in gradients:
        torch.testing.assert_close(gradient, [p.grad for p in whole.drafter.parameters()])


def test_a_diverging_run_says_so(config, tmp_path, shared_labels):
    with pytest.raises(TrainingError, match="lower --lr"):
        train(dataclasses.replace(config, lr=1e30), paths(tmp_path, shared_labels), overwrite=False)


def test_a_target_that_says_nothing_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "decode", lambda target, prompts, *rest: [[3]] * len(prompts))
    with pytest.raises(TrainingError, match="nothing to draft"):
        train(config, paths(tmp_path), overwrite=False)


def test_the_share_of_labels_that_did_not_fit_is_reported(config, tmp_path, shared_labels):
    config = dataclasses.replace(config, num_frames=3, num_labels=3)
    report = train(config, paths(tmp_path, shared_labels), overwrite=False)
    log = read_log(tmp_path)
    share = sum(e["infeasible_labels_total"] for e in log) / sum(e["labels_total"] for e in log)
    assert 0 < share < 1
    assert f"{share:.2%} of the labels did not fit 3 frames" in report
