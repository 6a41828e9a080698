"""vLLM with the plugin: the embedded pair gives the same greedy tokens with chains and trees as without a drafter, in
eager mode and with CUDA graphs, and nothing in the draft waits for the device; step times of an 8B shape with dummy
weights."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from outcome import FAILED, NOT_RUN, Outcome, Settings, verdict

PART = "engine"
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
DRAFTS = ("none", "chain", "tree:16", "tree:64")
QUESTIONS, MAX_TOKENS = {True: 4, False: 24}, 96
ACCEPTED = 2.0  # tokens a step, or the comparison would show little: the embedded drafter reaches 4
GPU_MEMORY = 0.3  # of the device: the embedded target needs little
LATENCY_DRAFTS, LATENCY_BATCHES = ("chain:8", "tree:16", "tree:64"), (1, 16, 64)


class Run(NamedTuple):
    token_ids: list[list[int]]
    seconds: float
    steps: int


def check(settings: Settings) -> Iterator[Outcome]:
    if importlib.util.find_spec("vllm") is None:
        yield Outcome(PART, "vLLM", NOT_RUN, "vLLM is not installed")
        return
    on_gpu = torch.cuda.is_available()
    for mode in ("eager", "CUDA graphs"):
        if mode != "eager" and not on_gpu:
            yield Outcome(PART, mode, NOT_RUN, "they need a GPU")
            continue
        yield from compare(mode, settings)
    if on_gpu and not settings.quick:
        yield latency()
    else:
        yield Outcome(PART, "8B shape", NOT_RUN, "it needs a GPU and a run that is not --quick")


def compare(mode: str, settings: Settings) -> Iterator[Outcome]:
    """The first engine has no drafter, and the others are compared with it."""
    reference: Run | None = None
    for draft in DRAFTS:
        name = f"{draft}, {mode}"
        try:
            run = in_own_process(draft, mode == "eager", QUESTIONS[settings.quick])
        except Exception as problem:
            traceback.print_exc()
            yield Outcome(PART, name, FAILED, f"{type(problem).__name__}: {problem}"[:300])
            continue
        tokens = sum(map(len, run.token_ids))
        speed, length = tokens / run.seconds, tokens / run.steps
        figures = {"tokens_per_second": speed, "tokens_per_step": length}
        if reference is None:
            reference = run if draft == DRAFTS[0] else None
            yield verdict(PART, name, draft == DRAFTS[0], f"{speed:.0f} tokens/s, one request at a time", **figures)
            continue
        same = sum(a == b for a, b in zip(run.token_ids, reference.token_ids))
        detail = f"{same} of {len(run.token_ids)} answers identical, {speed:.0f} tokens/s, {length:.2f} tokens a step"
        yield verdict(PART, name, same == len(run.token_ids) and length > ACCEPTED, detail, **figures)


def in_own_process(draft: str, eager: bool, questions: int) -> Run:
    """Whose end gives back the device's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(generate, draft, eager, questions).result()


def generate(draft: str, eager: bool, questions: int) -> Run:
    """Greedy answers in float32, one request at a time, twice: the first warms up."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    sys.path.append(str(BENCHMARKS))
    from client import read_questions
    from pair import DRAFTER, PROMPTS, TARGET
    from step_time import speculative_config  # also sets what a CPU needs, before vLLM is imported
    from vllm import LLM, SamplingParams

    options = {"gpu_memory_utilization": GPU_MEMORY} if torch.cuda.is_available() else {}
    llm = LLM(
        str(TARGET), speculative_config=speculative_config(DRAFTER, draft), dtype="float32", enforce_eager=eager,
        max_num_seqs=4, max_model_len=512, enable_prefix_caching=False, **options,
    )  # fmt: skip
    core = llm.llm_engine.engine_core.engine_core
    if eager and draft != "none" and torch.cuda.is_available():
        forbid_synchronisation(core.model_executor.driver_worker.worker.model_runner.speculator)
    steps, inner = 0, core.step_fn

    def counted():
        nonlocal steps
        steps += 1
        return inner()

    core.step_fn = counted
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    chats = [[{"role": "user", "content": question}] for question in read_questions(PROMPTS, questions)]
    llm.chat(chats[:2], sampling, use_tqdm=False)
    steps, started = 0, time.perf_counter()
    answers = [llm.chat(chat, sampling, use_tqdm=False)[0] for chat in chats]
    seconds = time.perf_counter() - started
    return Run([list(answer.outputs[0].token_ids) for answer in answers], seconds, steps)


def forbid_synchronisation(proposer) -> None:
    """Whatever would wait for the device between the draft's forward and its labels is an error."""
    for name in ("_generate_draft", "observe_verification"):
        inner = getattr(proposer, name)

        def guarded(*args, inner=inner, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return inner(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        setattr(proposer, name, guarded)


def latency() -> Outcome:
    """`benchmarks/latency_model.py` for an 8B target with dummy weights, CUDA graphs as vLLM has them by default."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "latency"
        command = [
            sys.executable, BENCHMARKS / "latency_model.py", "--shape", "8b", "--drafts", *LATENCY_DRAFTS,
            "--batch-sizes", *LATENCY_BATCHES, "--output", output,
        ]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return Outcome(PART, "8B shape", FAILED, last[:300])
        steps = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["step_ms"]
    times = "; ".join(
        f"batch {batch}: " + ", ".join(f"{draft} {time:.2f}" for draft, time in row.items())
        for batch, row in steps.items()
    )
    return verdict(PART, "8B shape", True, f"milliseconds a step: {times}", step_ms=steps)
