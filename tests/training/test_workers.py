"""Several processes train the drafter that one would: the same losses and weights, however a step is shared."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.checkpoint import CHECKPOINT_NAME, DAMAGED_NAME, Progress, RunPaths
from vllm_ctc_spec.training.config import PARALLEL, TrainConfig, WorkerOptions
from vllm_ctc_spec.training.loop import Trainer
from vllm_ctc_spec.training.run import Prepared, prepare, train
from vllm_ctc_spec.training.workers import Workers

SMALL = dict(
    num_frames=5, num_labels=3, markov_rank=4, steps=16, batch_size=4, anchors=6, max_new_tokens=20, held_out=2,
    save_every=4, eval_every=8, optimizer="adamw",
)  # fmt: skip
JOBS = {
    "ddp": ("ddp", {}),
    "ddp in parts": ("ddp", {"accumulate": 2}),
    "fsdp": ("fsdp", {}),
    "fsdp in parts, transitions": ("fsdp", {"accumulate": 2, "lattice": "transitions", "transition_rank": 4}),
    "fsdp, muon": ("fsdp", {"optimizer": "muon"}),
    "fsdp, specformer": ("fsdp", {"architecture": "specformer"}),
}
# A process started by name cannot import a test.
WORKER = """
import json, pickle, sys
import torch, torch.distributed as dist
from vllm_ctc_spec.training.loop import Trainer
from vllm_ctc_spec.training.run import load_target, run_worker
from vllm_ctc_spec.training.workers import Workers

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
step = Trainer.step
with open(sys.argv[3], "rb") as file:
    jobs = pickle.load(file)
for prepared, parallel, stop in jobs:
    def stopping(self, examples):
        local = sum(getattr(p, "_local_tensor", p).numel() for p in self.drafter.parameters())
        whole = sum(p.numel() for p in self.drafter.parameters())
        (prepared.paths.work / f"held-{rank}.json").write_text(json.dumps(local / whole))
        if self.progress.step == stop:
            raise KeyboardInterrupt
        return step(self, examples)
    Trainer.step = stopping
    try:
        run_worker(prepared, load_target(prepared.config, torch.device("cpu")), Workers(rank, 2, parallel))
    except KeyboardInterrupt:
        pass
dist.destroy_process_group()
"""


def paths(folder: Path) -> RunPaths:
    return RunPaths(folder, folder / "work", folder / "work" / "labels")


def job(config: TrainConfig, parallel: str, folder: Path, stop: int = -1) -> tuple[Prepared, str, int]:
    where = paths(folder)
    prepared = prepare(config, where, overwrite=False)
    where.start(config, overwrite=False)
    return prepared, parallel, stop


def run_two(jobs: list[tuple[Prepared, str, int]], folder: Path) -> None:
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    arguments = [f"file://{folder}/rendezvous", str(folder / "jobs")]
    both = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), *arguments]) for rank in range(2)]
    try:
        assert [process.wait(timeout=500) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def config(target_folder, dataset_folder):
    return TrainConfig(target=str(target_folder), data=str(dataset_folder), **SMALL)


@pytest.fixture(scope="module")
def by_two(config, tmp_path_factory):
    """Folder of each job's run by two processes, of one that changes hands (one process, two with shards, two without,
    and one again), and of runs that two processes continue behind a damaged checkpoint."""
    folder = tmp_path_factory.mktemp("two")
    folders = {name: folder / name.replace(" ", "-") for name in JOBS}
    jobs = [
        job(dataclasses.replace(config, **change), parallel, folders[name])
        for name, (parallel, change) in JOBS.items()
    ]
    folders["changing hands"] = folder / "changing-hands"
    muon = dataclasses.replace(config, optimizer="muon")
    train_until(6, muon, folders["changing hands"])
    jobs.append(job(muon, "fsdp", folders["changing hands"], stop=10))
    jobs.append(job(muon, "ddp", folders["changing hands"], stop=14))
    for parallel in PARALLEL:
        folders[f"damaged, {parallel}"] = damaged = folder / f"damaged-{parallel}"
        train_until(10, config, damaged)
        (damaged / "work" / CHECKPOINT_NAME).write_bytes(b"")  # of step 8
        jobs.append(job(config, parallel, damaged))
    run_two(jobs, folder)
    return folders


def train_until(last: int, config: TrainConfig, folder: Path) -> None:
    """By one process, which is interrupted."""
    step = Trainer.step

    def stopping(self, examples):
        if self.progress.step == last:
            raise KeyboardInterrupt
        return step(self, examples)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", stopping)
        train(config, paths(folder), overwrite=False)


def assert_same_run(one: Path, other: Path, tolerance: float) -> None:
    for mine, theirs in zip(read_log(one), read_log(other), strict=True):
        times = {name: 0 for name in mine if name.endswith("seconds")}
        assert {**mine, **times} == pytest.approx({**theirs, **times}, rel=tolerance)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    torch.testing.assert_close(ours, theirs, rtol=10 * tolerance, atol=tolerance)


def tolerance(change: dict) -> float:
    """Muon orthogonalises in bfloat16, where a last bit of the gradient can turn an update's small directions."""
    return 2e-3 if change.get("optimizer") == "muon" else 5e-5


@pytest.mark.parametrize("name", JOBS)
def test_two_workers_train_as_one(name, by_two, config, tmp_path):
    change = JOBS[name][1]
    train(dataclasses.replace(config, **change), paths(tmp_path), overwrite=False)
    assert_same_run(by_two[name], tmp_path, tolerance(change))


def test_a_checkpoint_continues_with_any_number_of_workers(by_two, config, tmp_path):
    muon, folder = dataclasses.replace(config, optimizer="muon"), by_two["changing hands"]
    assert len(read_log(folder)) == 14 and not (folder / "model.safetensors").exists()
    train(muon, paths(folder), overwrite=False)
    train(muon, paths(tmp_path), overwrite=False)
    assert_same_run(folder, tmp_path, tolerance({"optimizer": "muon"}))


@pytest.mark.parametrize("parallel", PARALLEL)
def test_behind_a_damaged_checkpoint_all_workers_go_on_from_the_one_before(parallel, by_two, config, tmp_path):
    folder = by_two[f"damaged, {parallel}"]
    assert (folder / "work" / DAMAGED_NAME).is_file()
    train(config, paths(tmp_path), overwrite=False)
    assert_same_run(folder, tmp_path, tolerance({}))


def test_a_worker_that_sees_another_checkpoint_than_the_main_one_stops(tmp_path):
    class Second(Workers):
        def total(self, values, device):
            return [8.0]

    with pytest.raises(
        TrainingError, match="checkpoint.pt is of step 0 on .* and of step 8 where the main worker runs"
    ):
        Progress(None, []).restore(tmp_path, Second(rank=1, size=2), torch.device("cpu"))


@pytest.mark.parametrize(("name", "share"), [("ddp", 1.0), ("fsdp", 0.5)])
def test_a_worker_holds_its_share_of_the_drafter(name, share, by_two):
    for rank in range(2):
        held = json.loads((by_two[name] / "work" / f"held-{rank}.json").read_text())
        assert held == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"num_workers": 0}, "--num-workers must be 1 or more"),
        ({}, {"num_workers": 3}, "--batch-size 4 cannot be split equally among --num-workers 3"),
        ({"accumulate": 4}, {"num_workers": 2}, "with --accumulate 4 parts each"),
        ({}, {"parallel": "fsdp"}, "give 2 or more"),
    ],
)
def test_workers_that_do_not_fit_the_settings_are_refused(config, change, options, message):
    with pytest.raises(TrainingError, match=message):
        WorkerOptions(**options).check(dataclasses.replace(config, **change))
