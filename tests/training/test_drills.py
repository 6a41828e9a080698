"""What goes wrong while a drafter is trained or its data are generated: one sentence, nothing that was written is lost,
and the same command continues. docs/operations.md is the table of these drills.

Killed workers of Ray are in ray/test_train.py, a run that is killed without warning is in test_train.py. The slow ones
start vLLM or Ray: half a minute each.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from vllm_ctc_spec.cli import main
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.serving import plugin
from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.checkpoint import CHECKPOINT_NAME, DAMAGED_NAME, PREVIOUS_NAME
from vllm_ctc_spec.training.conversations import Conversation
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import Example, Shard, StoredStates, _check_stored_layers
from vllm_ctc_spec.training.dataset_writer import write_states
from vllm_ctc_spec.training.loop import Trainer
from vllm_ctc_spec.training.metrics import LOG_NAME

from .tiny import answers_of, make_target, write_rows

OPTIONS = dict(
    num_frames=5, num_labels=3, markov_rank=4, steps=12, batch_size=4, anchors=6, max_new_tokens=20, held_out=2,
    save_every=4, eval_every=6, optimizer="adamw",
)  # fmt: skip
PROGRAM = "import sys; from vllm_ctc_spec.cli import main; sys.exit(main(sys.argv[1:]))"
CONTINUES = "vllm-ctc: interrupted; the same command continues."


def training(target: Path, data: Path, folder: Path) -> list[str]:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    folders = [f"--target={target}", f"--data={data}", f"--output={folder / 'out'}"]
    return ["train", *folders, *options]


@pytest.fixture
def command(target_folder, dataset_folder, tmp_path) -> list[str]:
    """A small training, whose folder is `tmp_path / "out"`."""
    return training(target_folder, dataset_folder, tmp_path)


@pytest.fixture
def work(tmp_path) -> Path:
    return tmp_path / "out" / "work"


def log_lines(work: Path) -> list[str]:
    return (work / LOG_NAME).read_text().splitlines() if (work / LOG_NAME).is_file() else []


def sentence(capsys) -> str:
    """The only sentence on stderr, behind progress bars."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (said,) = [line for line in error.splitlines() if line.startswith("vllm-ctc: ")]
    return said


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process], seconds: float = 60) -> list[psutil.Process]:
    """Those that are still there after so long."""
    return psutil.wait_procs(processes, timeout=seconds)[1]


def end(process: subprocess.Popen, others: list[psutil.Process]) -> None:
    """Leave nothing behind, whatever a test has found."""
    for one in (process, *others):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """The command in a process of its own, as a user runs it; what it prints goes to `log`."""
    environment = dict(os.environ)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", plugin.V2_VARIABLE):
        environment.pop(name, None)
    with log.open("wb") as output:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def stop_at(step: int, act: Callable[[], None], monkeypatch) -> None:
    """Before this step of the training, do something."""
    original = Trainer.step

    def stepping(self, examples):
        if self.progress.step == step:
            act()
        return original(self, examples)

    monkeypatch.setattr(Trainer, "step", stepping)


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_at(step: int, command: list[str], monkeypatch, capsys) -> str:
    """What it printed until then."""
    with monkeypatch.context() as patch:
        stop_at(step, interrupt, patch)
        assert main(command) == 130
    return capsys.readouterr().out


def steps_of(work: Path) -> dict[str, int]:
    """Of the checkpoints that are there, by name."""
    paths = [work / name for name in (CHECKPOINT_NAME, PREVIOUS_NAME)]
    return {path.name: torch.load(path)["step"] for path in paths if path.is_file()}


def weights(work: Path) -> bytes:
    return (work.parent / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(target_folder, dataset_folder, tmp_path_factory) -> bytes:
    """The weights that `command` ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main(training(target_folder, dataset_folder, folder)) == 0
    return weights(folder / "out" / "work")


# Signals


def test_sigterm_in_a_training_is_a_sentence_and_it_continues_from_the_checkpoint(command, work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(6, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert main(command) == 128 + signal.SIGTERM
    assert sentence(capsys) == CONTINUES
    before = log_lines(work)
    assert len(before) == 6 and torch.load(work / CHECKPOINT_NAME)["step"] == 4
    assert not list(work.glob("*.tmp")) and not (work.parent / "config.json").exists()
    assert main(command) == 0
    after = log_lines(work)  # every line has its own time: what lies before the checkpoint is not repeated
    assert after[:4] == before[:4] and [json.loads(line)["step"] for line in after] == list(range(1, 13))


def test_the_handler_of_sigterm_is_left_as_it_was(command):
    before = signal.getsignal(signal.SIGTERM)
    assert main(command) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_sigterm_in_a_training_with_ray_leaves_no_process_behind(command, work, tmp_path):
    """Ray, its workers and the run end together."""
    pytest.importorskip("ray.train")
    log = tmp_path / "log"
    process, others = start([*command, "--num-workers=2", "--steps=5000"], log), []
    try:
        wait_for(lambda: len(log_lines(work)) >= 6, process)
        others = descendants(process)
        assert len(others) > 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=180) == 128 + signal.SIGTERM
        assert CONTINUES in log.read_text().splitlines()
        assert not alive(others)
    finally:
        end(process, others)


ROWS = 4000


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """A target that vLLM can serve."""
    return make_target(tmp_path_factory.mktemp("served"), head_dim=32)


def finish_data(target: Path, rows: Path, output: Path) -> list[Shard]:
    """Continue a dataset without an engine; the shards that were missing."""
    generated = []

    def generate(config, shards, advance):
        for shard in shards:
            generated.append(shard)
            yield shard, answers_of(shard, lambda _: [4])

    asked = DataConfig(str(target), str(rows), output, 40, held_out=2, dtype="float32")
    make_dataset(asked, False, generate)
    return generated


@pytest.mark.slow
@pytest.mark.parametrize("drill", ["SIGTERM", "SIGKILL", "engine killed"])
def test_data_that_are_killed_while_vllm_generates_continue_with_the_missing_shards(drill, served, tmp_path):
    rows, output = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "data"
    options = ["--max-new-tokens=40", "--held-out=2", "--dtype=float32"]
    folders = [f"--target={served}", f"--prompts={rows}", f"--output={output}"]
    log = tmp_path / "log"
    process, others = start(["data", *folders, *options], log), []
    try:
        wait_for(lambda: len(list(output.glob("train-*.jsonl"))) >= 2, process)
        others = descendants(process)
        (engine,) = [p for p in others if p.name() == "VLLM::EngineCore"]
        if drill == "engine killed":
            engine.kill()
        else:
            process.send_signal(signal.Signals[drill])
        process.wait(timeout=180)
        left = alive(others, 5 if drill == "SIGKILL" else 60)
    finally:
        end(process, others)
    lines = log.read_text().splitlines()  # vLLM's own among them, also after ours
    if drill == "SIGTERM":
        assert process.returncode == 128 + signal.SIGTERM and CONTINUES in lines
    elif drill == "engine killed":
        (last,) = [line for line in lines if line.startswith("vllm-ctc: ")]
        assert process.returncode == 1 and last.startswith("vllm-ctc: vLLM failed while it generated responses of")
        assert last.endswith("the same command continues.")
    # A process that is killed cannot end vLLM's.
    assert bool(left) == (drill == "SIGKILL")
    kept = {path.name: path.read_bytes() for path in output.glob("*.jsonl")}
    assert not [path for path in output.iterdir() if path.suffix == ".tmp" and drill != "SIGKILL"]
    missing = finish_data(served, rows, output)
    assert missing and len(missing) + len(kept) == 2 + (ROWS - 2 - 1) // 128
    assert all((output / name).read_bytes() == content for name, content in kept.items())


# A full disk: writing to /dev/full fails as there, with ENOSPC.


def test_a_disk_that_fills_during_a_checkpoint_keeps_the_two_before(command, work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(10, lambda: (work / f"{CHECKPOINT_NAME}.tmp").symlink_to("/dev/full"), patch)
        assert main(command) == 1
    said = sentence(capsys)
    assert said.startswith(f"vllm-ctc: {CHECKPOINT_NAME} cannot be written to {work} (")
    assert said.endswith("when there is room, the same command continues.")
    assert steps_of(work) == {CHECKPOINT_NAME: 8, PREVIOUS_NAME: 4} and not list(work.glob("*.tmp"))
    before = log_lines(work)
    assert main(command) == 0
    assert log_lines(work)[:8] == before[:8] and len(log_lines(work)) == 12


def test_a_disk_that_is_full_for_the_log_is_a_sentence(command, work, monkeypatch, capsys):
    work.mkdir(parents=True)
    (work / LOG_NAME).symlink_to("/dev/full")
    assert main(command) == 1
    assert sentence(capsys) == (
        f"vllm-ctc: {LOG_NAME} cannot be written to {work} ([Errno 28] No space left on device); when there is room, "
        "the same command continues."
    )


def test_a_disk_that_fills_when_a_run_is_resumed_keeps_the_log(command, work, monkeypatch, capsys):
    interrupt_at(6, command, monkeypatch, capsys)
    before = log_lines(work)
    (work / f"{LOG_NAME}.tmp").symlink_to("/dev/full")
    assert main(command) == 1
    assert f"{LOG_NAME} cannot be written to {work}" in sentence(capsys)
    assert log_lines(work) == before


# Damaged files


def flip_a_bit(content: bytes) -> bytes:
    """In the midst of the largest of the stored tensors, which torch reads without a word."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "a bit": flip_a_bit,
    "something else": lambda content: b"What is this?",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_behind_a_damaged_checkpoint_is_the_one_before(damage, command, work, undisturbed, monkeypatch, capsys):
    interrupt_at(10, command, monkeypatch, capsys)
    newest, before = work / CHECKPOINT_NAME, log_lines(work)
    damaged = DAMAGES[damage](newest.read_bytes())
    newest.write_bytes(damaged)
    said = interrupt_at(10, command, monkeypatch, capsys)
    assert f"The checkpoint {newest} is damaged (" in said
    assert f") and now {DAMAGED_NAME}: steps 5 to 10 are lost, and the run goes on from step 4, the checkpoint" in said
    # The damaged one has not pushed out the sound one.
    assert steps_of(work) == {CHECKPOINT_NAME: 8, PREVIOUS_NAME: 4}
    assert (work / DAMAGED_NAME).read_bytes() == damaged
    assert main(command) == 0
    after = log_lines(work)
    assert [json.loads(line)["step"] for line in after] == list(range(1, 13))
    assert after[:4] == before[:4] and after[4:10] != before[4:]
    assert weights(work) == undisturbed and "is damaged" not in capsys.readouterr().out


def test_a_crash_while_checkpoints_change_places_leaves_the_one_before(command, work, undisturbed, monkeypatch, capsys):
    replace = os.replace

    def crash(source, target):
        if Path(target).name == CHECKPOINT_NAME and (work / PREVIOUS_NAME).exists():
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        assert main(command) == 130
    assert steps_of(work) == {PREVIOUS_NAME: 4} and len(log_lines(work)) == 8
    before = log_lines(work)
    assert "is damaged" not in interrupt_at(6, command, monkeypatch, capsys)
    assert steps_of(work) == {CHECKPOINT_NAME: 4}  # where the others of several workers look
    assert main(command) == 0
    assert steps_of(work) == {CHECKPOINT_NAME: 12, PREVIOUS_NAME: 8}
    assert weights(work) == undisturbed and log_lines(work)[:4] == before[:4]


@pytest.mark.parametrize(("step", "there"), [(6, [CHECKPOINT_NAME]), (10, [CHECKPOINT_NAME, PREVIOUS_NAME])])
def test_if_all_checkpoints_are_damaged_nothing_starts_from_zero(step, there, command, work, monkeypatch, capsys):
    interrupt_at(step, command, monkeypatch, capsys)
    newest, before = work / CHECKPOINT_NAME, log_lines(work)
    whole = newest.read_bytes()
    damaged = {name: flip_a_bit((work / name).read_bytes()) for name in there}
    for name, content in damaged.items():
        (work / name).write_bytes(content)
    assert main(command) == 1
    said = sentence(capsys)
    assert said.startswith(f"vllm-ctc: The checkpoint {newest} is damaged (")
    assert said.endswith("restore it from a copy, or start the run again with --overwrite.")
    assert log_lines(work) == before
    assert {path.name: path.read_bytes() for path in work.glob("checkpoint*")} == damaged
    # Either way out.
    newest.write_bytes(whole)
    interrupt_at(step, command, monkeypatch, capsys)
    kept = 4 * (step // 4)
    assert log_lines(work)[:kept] == before[:kept]
    (work / DAMAGED_NAME).write_bytes(whole)
    interrupt_at(2, [*command, "--overwrite"], monkeypatch, capsys)
    assert not list(work.glob("checkpoint*")) and len(log_lines(work)) == 2


def test_damaged_settings_of_a_run_are_named(command, work, capsys):
    work.mkdir(parents=True)
    (work / "train_config.json").write_bytes(bytes(100))
    assert main(command) == 1
    assert sentence(capsys).startswith(f"vllm-ctc: {work / 'train_config.json'} is damaged (")
    assert not (work / CHECKPOINT_NAME).exists()


@pytest.mark.parametrize("damage", ["half of it", "zeros", "nothing"])
def test_a_shard_of_responses_that_was_cut_is_generated_again(damage, target_folder, rows_file, tmp_path):
    output = tmp_path / "data"
    finish_data(target_folder, rows_file, output)
    shard = output / "train-00000.jsonl"
    whole = shard.read_bytes()
    shard.write_bytes(DAMAGES[damage](whole))
    (missing,) = finish_data(target_folder, rows_file, output)
    assert missing.path(output) == shard and shard.read_bytes() == whole


def test_damaged_hidden_states_are_computed_again(tmp_path):
    shards = [Shard("train", index, [0], [Conversation.of_one([1, 2])], 0.0) for index in range(2)]
    computed = []

    def compute(missing, advance):
        for shard in missing:
            computed.append(shard.index)
            yield shard, torch.ones(3, 8)

    write_states(tmp_path, shards, (1,), compute)
    states = shards[1].path(tmp_path, ".safetensors")
    states.write_bytes(states.read_bytes()[:20])
    with pytest.raises(TrainingError, match="holds hidden states after no layers.*repeat `vllm-ctc data`"):
        _check_stored_layers([Example([1], [2, 3], StoredStates(states, 0))], (1,))
    write_states(tmp_path, shards, (1,), compute)
    assert computed == [0, 1, 1]


def test_a_target_that_is_gone_or_unreadable_is_a_sentence(command, tmp_path, target_folder, capsys):
    for folder in (tmp_path / "gone", tmp_path / "unreadable"):
        arguments = [f"--target={folder}" if part.startswith("--target=") else part for part in command]
        if folder.name == "unreadable":
            folder.mkdir()
            for path in target_folder.iterdir():
                (folder / path.name).symlink_to(path)
            (folder / "model.safetensors").unlink()
            (folder / "model.safetensors").mkdir()  # as it would be for somebody who may not read it, and for root too
        assert main(arguments) == 1
        assert str(folder) in sentence(capsys) and not (tmp_path / "out").exists()
