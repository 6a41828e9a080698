"""The same run by several processes, on one machine or many: Ray Train starts them and replaces those that die.

Everything is checked and every response generated here, once, before a worker starts. All machines are assumed to see
the same files under the same paths: the target, a dataset, and above all the run's work folder. New workers continue
from the checkpoint there when one was lost.
"""

import dataclasses
import os
import platform
import shutil
import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from vllm_ctc_spec.errors import TrainingError, UserError
from vllm_ctc_spec.training.answers import Generate, generate_here
from vllm_ctc_spec.training.checkpoint import RunPaths, recover
from vllm_ctc_spec.training.config import SETTINGS_NAME, TrainConfig, WorkerOptions
from vllm_ctc_spec.training.forecast import Pace
from vllm_ctc_spec.training.memory import explain_out_of_memory
from vllm_ctc_spec.training.metrics import LogFollower, StepBar
from vllm_ctc_spec.training.ray.cluster import ray_cluster
from vllm_ctc_spec.training.run import OOM_REMEDIES, Prepared, load_target, prepare, run_worker
from vllm_ctc_spec.training.workers import Workers

MAX_FAILURES = 3  # of a run
# For a worker that waits for another. The main one measures and writes checkpoints alone: with thousands of long
# responses that may take longer than Ray's half hour. Ray sees a worker that died without this limit.
TIMEOUT_SECONDS = 4 * 3600
POLL_SECONDS = 0.5
TRANSIENT = (RuntimeError, OSError)  # a lost peer, or a storage that does not answer: workers start again


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a worker is sent."""

    prepared: Prepared
    parallel: str
    threads: int
    folder: str  # where relative paths start


def train(
    config: TrainConfig, paths: RunPaths, overwrite: bool, options: WorkerOptions, generate: Generate = generate_here
) -> str:
    """Run or continue `config` with Ray; returns the report to print. generate: as in `run.prepare`."""
    options.check(config)
    paths.check(config, overwrite)
    with ray_cluster(options.ray_address, options.num_workers) as ray:
        kind = device_kind(ray.cluster_resources(), options.num_workers)
        with explain_out_of_memory(OOM_REMEDIES):
            prepared = prepare(config, paths, overwrite, generate)
        paths.start(config, overwrite)
        recover(paths.work)  # here too, where the user sees its message
        threads = options.threads or max(1, torch.get_num_threads() // options.num_workers)
        job = Job(prepared, options.parallel, threads, os.getcwd())
        print(f"Ray starts {options.num_workers} workers with a {kind} each.")
        try:
            return follow(start_workers(job, options.num_workers, kind), config, paths)
        finally:
            shutil.rmtree(_ray_folder(paths), ignore_errors=True)


def _ray_folder(paths: RunPaths) -> Path:
    """The folder of Ray Train's own state; nothing of ours is in it."""
    return (paths.work / "ray").resolve()


def device_kind(resources: dict[str, float], num_workers: int) -> str:
    """Each worker takes one of these: a GPU where there are any, else a CPU (TrainingError if they are too few)."""
    kind = "GPU" if resources.get("GPU") else "CPU"
    available = int(resources.get(kind, 0))
    if num_workers > available:
        raise TrainingError(f"--num-workers {num_workers} needs as many {kind}s, and the Ray cluster has {available}.")
    return kind


def start_workers(job: Job, num_workers: int, kind: str) -> Future:
    """Workers with a device of this `kind` each; the report, once the run is through. A thread of its own leaves Ctrl-C
    to the main one."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.callback import UserCallback

    class GiveUp(UserCallback):
        """Does not start workers again after errors that would come again: bad input, or a fault in the code."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                cause = _cause(error)
                if isinstance(cause, UserError):
                    raise cause
                if cause is not error and not isinstance(cause, TRANSIENT):
                    raise error

    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=TIMEOUT_SECONDS),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=kind == "GPU", resources_per_worker={kind: 1}),
        run_config=RunConfig(
            storage_path=str(_ray_folder(job.prepared.paths)),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[GiveUp()],
        ),
    )
    outcome: Future = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit().return_value)
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    return outcome


def follow(outcome: Future, config: TrainConfig, paths: RunPaths) -> str:
    """Show what the main worker logs until the outcome is there."""
    from ray.train import ControllerError, TrainingFailedError

    log = LogFollower(paths.work)
    with StepBar(config.steps, log.last_step, Pace(config, log.earlier)) as bar:
        while not outcome.done():
            wait([outcome], POLL_SECONDS)
            for entry in log.new_entries():
                bar.show(entry)
    try:
        return outcome.result()
    except TrainingFailedError as error:
        if isinstance(error, ControllerError):
            raise error.controller_failure from None
        failures = getattr(error, "worker_failures", {}).values() or [error]
        reasons = sorted({_last_line(_cause(failure)) for failure in failures})
        raise TrainingError(
            f"Workers were lost again after {MAX_FAILURES} restarts ({'; '.join(reasons)}); "
            "the same command continues from the last checkpoint."
        ) from error


def _cause(error: Exception) -> Exception:
    """The exception of a worker: Ray Train sends it inside another one whose text is the traceback."""
    return getattr(error, "_base_exc", error)


def _last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1].rstrip('.')}"


def train_loop(config: dict[str, Job]) -> str | None:
    """A worker's whole life."""
    from ray.train import get_context
    from ray.train.torch import get_device

    job, context, device = config["job"], get_context(), get_device()
    work_folder = Path(job.folder, job.prepared.paths.work)
    if not (Path(job.folder).is_dir() and (work_folder / SETTINGS_NAME).is_file()):
        raise TrainingError(
            f"{work_folder} is not to be seen on {platform.node()}; start the run in a folder, and give --work and "
            "--output, on storage that all machines of the Ray cluster share."
        )
    os.chdir(job.folder)
    torch.set_num_threads(job.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    workers = Workers(context.get_world_rank(), context.get_world_size(), job.parallel)
    with explain_out_of_memory(OOM_REMEDIES):
        return run_worker(job.prepared, load_target(job.prepared.config, device), workers)
