"""Responses by vLLM engines on a Ray cluster: one actor holds one engine, this process writes what they generate."""

import dataclasses
import os
import pickle
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.dataset import Shard
from vllm_ctc_spec.training.dataset_writer import Advance, Answers
from vllm_ctc_spec.training.engine import Engine, EngineConfig
from vllm_ctc_spec.training.ray.cluster import ray_cluster


@dataclasses.dataclass(frozen=True)
class RayOptions:
    address: str | None  # of a running cluster; None starts Ray on this machine
    num_workers: int | None  # None: one per GPU, or one

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise TrainingError(f"--num-workers must be 1 or more, not {self.num_workers}.")


def refuse_to_guess_dtype(dtype: str, address: str | None) -> None:
    """Refuse to guess the dtype of a target on other machines (TrainingError)."""
    if dtype == "auto" and address is not None and not torch.cuda.is_available():
        raise TrainingError(
            "--dtype auto follows this machine, which has no GPU, and --ray-address lets others generate: say "
            "--dtype bfloat16 or --dtype float32."
        )


class EngineActor:
    """A shard in, its answers out, both as bytes: lists of unequal lengths have no type in a Ray batch."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row with `number` and `shard`, to one with `number`, `answers` and `error`.

        An error is returned, not raised: Ray hands on only the text of an exception's traceback.
        """
        shard, answers, error = pickle.loads(batch["shard"][0]), [], ""
        try:
            if self._engine is None:
                # The workers of one machine would all be bound to the same core.
                os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
                self._engine = Engine(dataclasses.replace(self._config, log=None))
            answers = self._engine.responses(shard)
        except TrainingError as caught:
            error = str(caught)
        return {"number": batch["number"], "answers": [pickle.dumps(answers)], "error": [error]}


def workers_that_fit(options: RayOptions, resources: dict[str, float], each: int) -> tuple[int, dict[str, int]]:
    """The number of actors, and the resources of each of them; each: GPUs or CPUs of an engine."""
    kind, name = ("GPU", "num_gpus") if resources.get("GPU") else ("CPU", "num_cpus")
    available = int(resources.get(kind, 0))
    count = options.num_workers or (max(1, available // each) if kind == "GPU" else 1)
    if count * each > available:
        raise TrainingError(
            f"{count} workers (--num-workers) of {each} {kind}s each (--tensor-parallel-size) need {count * each}, and "
            f"the Ray cluster has {available}."
        )
    return count, {name: each}


def generate_with_ray(
    config: EngineConfig, shards: Sequence[Shard], advance: Advance, options: RayOptions
) -> Iterator[tuple[Shard, Answers]]:
    """Shards in the order in which the actors finish them. `advance` is not called: an actor reports whole shards."""
    with ray_cluster(options.address, options.num_workers) as ray:
        data = _ray_data()
        count, resources = workers_that_fit(options, ray.cluster_resources(), config.tensor_parallel_size)
        data.DataContext.get_current().enable_progress_bars = False  # ours counts prompts
        items = [{"number": number, "shard": pickle.dumps(shard)} for number, shard in enumerate(shards)]
        generated = data.from_items(items, override_num_blocks=len(items)).map_batches(
            EngineActor,
            fn_constructor_args=(config,),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(count, len(items))),
            **resources,
        )
        try:
            for row in generated.iter_rows():
                if row["error"]:
                    raise TrainingError(row["error"])
                yield shards[row["number"]], pickle.loads(row["answers"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(f"A Ray worker was lost ({reason}); the same command continues.") from error


def _ray_data() -> ModuleType:
    try:
        import ray.data
    except ImportError as error:
        raise TrainingError(f"Ray Data cannot be imported ({error}): pip install 'ray[data,train]'.") from error
    return ray.data
