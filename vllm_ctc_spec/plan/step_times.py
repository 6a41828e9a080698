"""Milliseconds of a decoding step by batch size, with drafts and without: two engines in one process that take turns,
so that a machine that gets slower or faster favours neither.

A step costs the same whatever is accepted of its drafts, so that any prompts and any weights are as good as others.
Free of torch until it measures: the number of threads is set before torch is imported.
"""

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import wraps
from statistics import median
from typing import Any

from vllm_ctc_spec.plan.solve import NONE

STEP = "whole step"
ROOM = 128  # tokens a step and request: the largest tree must fit for all of them
GPU_MEMORY = 0.45  # of the device, for each of two engines

Steps = dict[int, dict[str, float]]
"""Milliseconds by batch size and draft."""


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """threads: of a CPU; None: a GPU, or what the environment says. engine: more of vLLM's own options."""

    target: str
    batch_sizes: tuple[int, ...]
    context: int  # tokens of every prompt
    max_tokens: int  # of every request
    repeats: int  # batches of each size
    max_model_len: int
    threads: int | None = None
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Stopwatch:
    """Milliseconds by part, summed over each step of the draft whose turn it is."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.draft = ""
        self.steps: dict[str, list[dict[str, float]]] = defaultdict(list)
        self._step: dict[str, float] = defaultdict(float)

    def wrap(self, owner: object, attribute: str, name: str) -> None:
        inner = getattr(owner, attribute)

        @wraps(inner)
        def timed(*args, **kwargs):
            self.synchronize()
            started = time.perf_counter()
            result = inner(*args, **kwargs)
            self.synchronize()
            self._step[name] += (time.perf_counter() - started) * 1e3
            if name == STEP:
                self.steps[self.draft].append(dict(self._step))
                self._step.clear()
            return result

        setattr(owner, attribute, timed)


def synchronizer() -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def environment(threads: int | None) -> dict[str, str]:
    """Of a process that measures: engines in the process itself, which on a CPU share its threads."""
    shared = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if threads is None:
        return shared
    return shared | {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # vLLM's default on a GPU; without a drafter too, so that nothing but the drafts differs.
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


def start_engine(settings: StepSettings, speculative: Mapping[str, Any] | None, **options: Any) -> Any:
    """vLLM's LLM with room for every batch size, in this process. options: more of its own."""
    os.environ.update(environment(settings.threads))
    # vLLM warms up its chat template and warns, with a traceback, where there is no tokenizer.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; vLLM's default asks for nearly all memory
    from vllm import LLM
    from vllm.platforms import current_platform

    of_device = {"enforce_eager": True} if current_platform.is_cpu() else {"gpu_memory_utilization": GPU_MEMORY}
    largest = max(settings.batch_sizes)
    return LLM(
        settings.target, speculative_config=speculative, max_num_seqs=largest,
        max_num_batched_tokens=max(2048, ROOM * largest), enable_prefix_caching=False, use_tqdm_on_load=False,
        **of_device, **settings.engine, **options,
    )  # fmt: skip


def measure_pair(settings: StepSettings, draft: str, speculative: Mapping[str, Any]) -> Steps:
    """The times of `draft`, which `--speculative-config` asks for, and of NONE; in a process that is not used
    otherwise, because neither engine is ended."""
    llms = {
        name: start_engine(settings, config, max_model_len=settings.max_model_len, skip_tokenizer_init=True)
        for name, config in ((NONE, None), (draft, dict(speculative)))
    }
    stopwatch = Stopwatch(synchronizer())
    running: dict[str, list[int]] = {name: [] for name in llms}
    for name, llm in llms.items():
        core = llm.llm_engine.engine_core.engine_core
        stopwatch.wrap(core, "step_fn", STEP)
        _count_running(core, running[name])
    return {batch: _measure_batch(llms, batch, settings, stopwatch, running) for batch in settings.batch_sizes}


def _count_running(core: Any, counts: list[int]) -> None:
    """Note before every step how many requests are past their first step."""
    inner = core.step_fn

    def counted():
        counts.append(len(core.scheduler.running))
        return inner()

    core.step_fn = counted


def _measure_batch(
    llms: dict[str, Any], batch: int, settings: StepSettings, stopwatch: Stopwatch, running: dict[str, list[int]]
) -> dict[str, float]:
    """Medians over the steps in which all requests of the batch are decoding."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=settings.max_tokens, ignore_eos=True, detokenize=False)
    vocabulary = llms[NONE].llm_engine.model_config.get_vocab_size()
    prompts = [
        {"prompt_token_ids": [(7 * row + 3 * place) % vocabulary for place in range(settings.context)]}
        for row in range(batch)
    ]
    for llm in llms.values():
        llm.generate(prompts, sampling, use_tqdm=False)
    stopwatch.steps.clear()
    for counts in running.values():
        counts.clear()
    for _ in range(settings.repeats):
        for stopwatch.draft, llm in llms.items():
            llm.generate(prompts, sampling, use_tqdm=False)
    return {
        name: median(
            step[STEP] for step, count in zip(stopwatch.steps[name], running[name], strict=True) if count == batch
        )
        for name in llms
    }


def combine(pairs: Mapping[str, Steps]) -> Steps:
    """The times of all drafts as if beside one engine without: no speculation is the median over the processes, and a
    draft keeps its ratio to the one that it took turns with."""
    steps: Steps = {}
    for batch in next(iter(pairs.values())):
        none = median(pair[batch][NONE] for pair in pairs.values())
        steps[batch] = {NONE: none}
        steps[batch] |= {draft: none * pair[batch][draft] / pair[batch][NONE] for draft, pair in pairs.items()}
    return steps
