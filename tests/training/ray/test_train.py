"""`vllm-ctc train` with several workers under Ray: one process's run, though a worker is killed on the way."""

import contextlib
import json
import re
import shutil
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from vllm_ctc_spec.cli import main
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.checkpoint import CHECKPOINT_NAME, RunPaths
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.run import Prepared

OPTIONS = dict(
    num_frames=5, num_labels=3, markov_rank=4, steps=40, batch_size=4, anchors=6, max_new_tokens=20, held_out=2,
    save_every=10, eval_every=20, optimizer="adamw",
)  # fmt: skip


@pytest.fixture(scope="module")
def ray_train():
    pytest.importorskip("ray.train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon a dead worker is missed
        from vllm_ctc_spec.training.ray import train as ray_train

        yield ray_train


@pytest.fixture(scope="module")
def cluster(ray_train):
    """Address of a Ray cluster with two places."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    yield started.address
    started.shutdown()


@pytest.fixture(scope="module")
def train(target_folder, dataset_folder):
    def run(output: Path, *more: str, **change) -> int:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in {**OPTIONS, **change}.items()]
        where = ["--target", str(target_folder), "--data", str(dataset_folder)]
        return main(["train", *where, "--output", str(output), *options, *more])

    return run


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """Folder of one process's run."""
    folder = tmp_path_factory.mktemp("alone")
    assert train(folder) == 0
    return folder


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    for mine, theirs in zip(read_log(one), read_log(other), strict=True):
        times = {name: 0 for name in mine if name.endswith("seconds")}
        assert {**mine, **times} == pytest.approx({**theirs, **times}, rel=2e-4)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, weight in theirs.items():
        assert ours[name].numpy() == pytest.approx(weight.numpy(), rel=2e-3, abs=2e-4), name


def error_of(capsys) -> str:
    """The one sentence on stderr, behind progress bars."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm-ctc: ")][-1]


class Kill(threading.Thread):
    """SIGKILL for this process's main training worker, once the log is so long. Nobody else writes, so that what is
    there just after it is all that the first workers have left."""

    def __init__(self, log: Path, entries: int):
        super().__init__(daemon=True)
        self.log, self.entries = log, entries
        self.text, self.step = "", 0  # of the log and the checkpoint, just after

    def run(self) -> None:
        victim, deadline = None, time.monotonic() + 300
        while time.monotonic() < deadline:
            if victim is None:
                victim = self.main_worker()
            elif self.log.read_text().count("\n") >= self.entries:
                victim.kill()
                psutil.wait_procs([victim], timeout=60)
                self.text = self.log.read_text()
                self.step = torch.load(self.log.parent / CHECKPOINT_NAME)["step"]
                return
            time.sleep(0.01)

    def main_worker(self) -> psutil.Process | None:
        """The one that has opened the log."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if str(self.log.resolve()) in [file.path for file in process.open_files()]:
                    return process
        return None


def test_a_run_goes_on_after_a_worker_is_killed_as_one_process_would(train, alone, tmp_path, monkeypatch, capsys):
    """With shards and a local Ray. Relative paths too mean the same to the workers."""
    import ray

    monkeypatch.chdir(tmp_path)
    kill = Kill(tmp_path / "two" / "work" / "log.jsonl", entries=15)
    kill.start()
    assert train(Path("two"), "--num-workers", "2", "--parallel", "fsdp") == 0
    kill.join()
    log, seen, kept = kill.log.read_text().splitlines(), kill.text.splitlines(), kill.step
    assert 15 <= len(seen) < 40 and kept >= 10
    # Each line has its own time: what lies before the checkpoint is not repeated, what lies behind is.
    assert log[:kept] == seen[:kept]
    assert log[kept : len(seen)] != seen[kept:] or kept == len(seen)
    assert_same_run(tmp_path / "two", alone)
    output = capsys.readouterr()
    assert "Ray starts 2 workers with a CPU each." in output.out and "40/40" in output.err
    assert re.findall(r"^step (\d+): held-out", output.out, re.MULTILINE) == ["20", "40"]
    assert "two: best of 40 steps" in output.out and "vllm serve" in output.out
    assert "Traceback" not in output.err and "RayTrainWorker" not in output.err
    assert not ray.is_initialized() and not (tmp_path / "two" / "work" / "ray").exists()


@pytest.fixture
def damaged(alone, tmp_path) -> Path:
    """A copy of that folder, whose newest checkpoint, that of the last step, is cut."""
    folder = Path(shutil.copytree(alone, tmp_path / "two"))
    newest = folder / "work" / CHECKPOINT_NAME
    newest.write_bytes(newest.read_bytes()[:-1000])
    return folder


def assert_loss_is_named(damaged: Path, capsys) -> None:
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The checkpoint")]
    assert said.startswith(f"The checkpoint {damaged / 'work' / CHECKPOINT_NAME} is damaged (")
    assert said.endswith("steps 31 to 40 are lost, and the run goes on from step 30, the checkpoint before.")


@pytest.mark.slow
def test_behind_a_damaged_checkpoint_the_workers_go_on_from_the_one_before(train, alone, damaged, cluster, capsys):
    """Two workers of Ray: half a minute, several times that on a machine that is busy."""
    assert train(damaged, "--num-workers", "2", "--ray-address", cluster) == 0
    assert_loss_is_named(damaged, capsys)
    log, before = ((folder / "work" / "log.jsonl").read_text().splitlines() for folder in (damaged, alone))
    assert log[:30] == before[:30] and log[30:] != before[30:]
    assert_same_run(damaged, alone)


def test_a_damaged_checkpoint_is_named_where_the_run_is_started(
    ray_train, train, damaged, cluster, monkeypatch, capsys
):
    """And not in a log of Ray's."""
    finished = Future()
    finished.set_result("report")
    monkeypatch.setattr(ray_train, "start_workers", lambda *_: finished)
    assert train(damaged, "--num-workers", "2", "--ray-address", cluster) == 0
    assert_loss_is_named(damaged, capsys)
    assert torch.load(damaged / "work" / CHECKPOINT_NAME)["step"] == 30


def test_what_would_fail_again_is_said_in_a_sentence_at_once(train, cluster, tmp_path, capsys):
    assert train(tmp_path, "--num-workers", "2", "--ray-address", cluster, lr=1e30) == 1
    assert "start again with --overwrite and a lower --lr." in error_of(capsys)
    events = tmp_path / "work" / "tensorboard"
    assert not events.exists() or len(list(events.iterdir())) == 1  # of one attempt


def test_a_cluster_with_too_few_places_is_named(train, cluster, tmp_path, capsys):
    assert train(tmp_path / "out", "--num-workers", "4", "--ray-address", cluster) == 1
    assert "--num-workers 4 needs as many CPUs, and the Ray cluster has 2." in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_workers_get_the_threads_asked_for_or_an_equal_share(ray_train, train, cluster, tmp_path, monkeypatch):
    jobs, finished = [], Future()
    finished.set_result("report")
    monkeypatch.setattr(ray_train, "start_workers", lambda job, num_workers, kind: jobs.append(job) or finished)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    workers = ["--num-workers", "2", "--ray-address", cluster]
    assert train(tmp_path, *workers) == train(tmp_path, *workers, "--threads", "3") == 0
    assert [job.threads for job in jobs] == [4, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-workers", "3"], "--batch-size 4 cannot be split equally among --num-workers 3"),
        (["--parallel", "fsdp"], "--parallel fsdp shares a drafter among --num-workers"),
        (["--ray-address", "head"], "--ray-address must be HOST:PORT"),
        (["--ray-address", "127.0.0.1:1"], "No Ray cluster answers at --ray-address 127.0.0.1:1"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(options, message, train, tmp_path, capsys):
    pytest.importorskip("ray")
    assert train(tmp_path / "out", *options) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_ray_is_told_how_to_install_it(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert train(tmp_path / "out", "--num-workers", "2") == 1
    assert "pip install 'ray[data,train]'" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_workers_wait_for_hours_while_the_main_one_measures(ray_train, tmp_path, monkeypatch):
    import ray.train.torch

    asked = []

    class Asked:
        def __init__(self, *_, **options):
            asked.append(options)

        def fit(self):
            return SimpleNamespace(return_value="report")

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Asked)
    prepared = Prepared(None, RunPaths(tmp_path, tmp_path, tmp_path), None, [], [])
    assert ray_train.start_workers(ray_train.Job(prepared, "ddp", 1, str(tmp_path)), 2, "CPU").result(60) == "report"
    assert asked[0]["torch_config"].timeout_s == 4 * 3600


def test_every_worker_takes_a_gpu_where_there_are_any(ray_train):
    assert ray_train.device_kind({"CPU": 8.0}, 2) == "CPU"
    assert ray_train.device_kind({"CPU": 8.0, "GPU": 2.0}, 2) == "GPU"
    with pytest.raises(TrainingError, match="--num-workers 4 needs as many GPUs, and the Ray cluster has 2"):
        ray_train.device_kind({"CPU": 8.0, "GPU": 2.0}, 4)


def test_a_worker_that_does_not_see_the_work_folder_says_so(ray_train, monkeypatch, tmp_path):
    import ray.train
    import ray.train.torch

    monkeypatch.setattr(ray.train, "get_context", lambda: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    prepared = Prepared(None, RunPaths(Path("out"), Path("out", "work"), Path("labels")), None, [], [])
    with pytest.raises(TrainingError, match="out/work is not to be seen on .* share"):
        ray_train.train_loop({"job": ray_train.Job(prepared, "ddp", 1, str(tmp_path))})


def test_a_worker_whose_gpu_is_full_says_so(ray_train, monkeypatch, tmp_path):
    """In a sentence, for which no worker is started again."""
    import ray.train
    import ray.train.torch

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=int, get_world_size=int))
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(ray_train, "load_target", full)
    (tmp_path / "train_config.json").touch()
    prepared = Prepared(None, RunPaths(tmp_path, tmp_path, tmp_path), None, [], [])
    with pytest.raises(TrainingError, match=r"Tried to allocate 2.00 GiB\); the same run goes on in less memory"):
        ray_train.train_loop({"job": ray_train.Job(prepared, "ddp", 1, str(tmp_path))})


def test_workers_that_are_lost_again_and_again_end_in_a_sentence(ray_train, tmp_path):
    from ray.train import WorkerGroupError

    outcome, lost = Future(), RuntimeError("peer\nclosed.")
    outcome.set_exception(WorkerGroupError("long", {0: lost, 1: lost}))
    config = TrainConfig(target="target", data="data")
    with pytest.raises(TrainingError, match=r"after 3 restarts \(RuntimeError: closed\); the same command continues"):
        ray_train.follow(outcome, config, RunPaths(tmp_path, tmp_path, tmp_path))
