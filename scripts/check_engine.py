"""vLLM with the plugin: with chains and trees an embedded pair gives the tokens that it gives without a drafter, eager
and with CUDA graphs, one request at a time and many, greedy and sampled; nothing in the draft waits for the device.
Step times of an 8B shape with dummy weights."""

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
MODES = (("float32, eager", "float32", True), ("float32, CUDA graphs", "float32", False),
         ("bfloat16, CUDA graphs", "bfloat16", False))  # fmt: skip
DRAFTS = ("none", "chain", "chain, sampled", "tree:16", "tree:64")
ONE, MANY, SAMPLED = "one at a time", "together", "together, temperature 1"
QUESTIONS, MAX_TOKENS = {True: 4, False: 24}, 96
ACCEPTED = {ONE: 2.0, MANY: 2.0, SAMPLED: 1.4}  # tokens a step, or the comparison would show little
# Batches of other sizes are summed in another order, which may decide a tie. With 16 bits it decides more than ties,
# so that the first tokens are compared.
IDENTICAL = {"float32": {ONE: 1.0, MANY: 0.9, SAMPLED: 0.9}, "bfloat16": {ONE: 0.75, MANY: 0.75, SAMPLED: 0.75}}
COMPARED_TOKENS = {"float32": MAX_TOKENS, "bfloat16": 8}
GPU_MEMORY = 0.3  # of the device: an embedded target needs little
LATENCY_DRAFTS, LATENCY_BATCHES = ("chain:8", "tree:16", "tree:64"), (1, 16, 64)


class Answers(NamedTuple):
    token_ids: list[list[int]]
    tokens_per_second: float
    acceptance_length: float


Run = dict[str, Answers]  # by ONE, MANY, SAMPLED


def check(settings: Settings) -> Iterator[Outcome]:
    if importlib.util.find_spec("vllm") is None:
        yield Outcome(PART, "vLLM", NOT_RUN, "vLLM is not installed")
        return
    from pair import obstacle, read_pair

    if (why := obstacle(read_pair(settings.pair))) is not None:
        yield Outcome(PART, f"the pair {settings.pair}", FAILED, why)
        return
    on_gpu = torch.cuda.is_available()
    for mode, dtype, eager in MODES:
        if not eager and not on_gpu:
            yield Outcome(PART, mode, NOT_RUN, "it needs a GPU")
            continue
        yield from compare(mode, dtype, eager, settings)
    if on_gpu and not settings.quick:
        yield latency()
    else:
        yield Outcome(PART, "8B shape", NOT_RUN, "it needs a GPU and a run that is not --quick")


def compare(mode: str, dtype: str, eager: bool, settings: Settings) -> Iterator[Outcome]:
    """The first engine has no drafter, and the others are compared with it."""
    reference: Run = {}
    for draft in DRAFTS:
        try:
            run = in_own_process(settings.pair, draft, dtype, eager, QUESTIONS[settings.quick])
        except Exception as problem:
            traceback.print_exc()
            yield Outcome(PART, f"{draft}, {mode}", FAILED, f"{type(problem).__name__}: {problem}"[:300])
            continue
        if draft == DRAFTS[0]:
            reference = run
        for way, answers in run.items():
            name, figures = f"{draft}, {mode}, {way}", answers._asdict()
            del figures["token_ids"]
            if draft == DRAFTS[0]:
                yield verdict(PART, name, True, f"{answers.tokens_per_second:.0f} tokens/s", **figures)
            elif way in reference:
                holds, detail = judge(draft, dtype, way, answers, reference[way])
                yield verdict(PART, name, holds, detail, **figures)


def judge(draft: str, dtype: str, way: str, answers: Answers, reference: Answers) -> tuple[bool, str]:
    detail = f"{answers.tokens_per_second:.0f} tokens/s, {answers.acceptance_length:.2f} tokens a step"
    holds = answers.acceptance_length > ACCEPTED[way]
    if draft.startswith("chain") and way == SAMPLED:
        return holds, f"{detail}; a chain keeps the distribution, not the dice"
    compared = COMPARED_TOKENS[dtype]
    same = sum(a[:compared] == b[:compared] for a, b in zip(answers.token_ids, reference.token_ids))
    whole = len(reference.token_ids)
    detail = f"{same} of {whole} answers identical in the first {compared} tokens, {detail}"
    return holds and same >= IDENTICAL[dtype][way] * whole, detail


def in_own_process(pair: str, draft: str, dtype: str, eager: bool, questions: int) -> Run:
    """Whose end gives back the device's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(generate, pair, draft, dtype, eager, questions).result()


def generate(pair: str, draft: str, dtype: str, eager: bool, questions: int) -> Run:
    """Everything is asked twice: the first time warms up."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    sys.path.append(str(BENCHMARKS))
    from client import read_questions
    from pair import read_pair
    from step_time import speculative_config  # also sets what a CPU needs, before vLLM is imported
    from vllm import LLM, SamplingParams

    served = read_pair(pair)
    kind, _, sampled_drafts = draft.partition(", ")
    speculative = speculative_config(served.drafter, kind)
    if sampled_drafts:
        speculative["draft_sample_method"] = "probabilistic"
    options = {"gpu_memory_utilization": GPU_MEMORY} if torch.cuda.is_available() else {}
    llm = LLM(
        str(served.target), speculative_config=speculative, dtype=dtype, enforce_eager=eager, max_num_seqs=16,
        max_model_len=512, enable_prefix_caching=False, disable_log_stats=False, **options,
    )  # fmt: skip
    if eager and draft != "none" and torch.cuda.is_available():
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        forbid_synchronisation(executor.driver_worker.worker.model_runner.speculator)
    chats = [[{"role": "user", "content": question}] for question in read_questions(served.prompts, questions)]
    greedy = [SamplingParams(temperature=0, max_tokens=MAX_TOKENS) for _ in chats]
    sampled = [SamplingParams(temperature=1, max_tokens=MAX_TOKENS, seed=seed) for seed in range(len(chats))]

    def ask(batches: list[slice], sampling: list[SamplingParams]) -> Answers:
        for _ in range(2):
            before, started = drafts_and_accepted(llm), time.perf_counter()
            answers = [o for b in batches for o in llm.chat(chats[b], sampling[b], use_tqdm=False)]
            seconds = time.perf_counter() - started
        drafts, accepted = (after - b for after, b in zip(drafts_and_accepted(llm), before))
        token_ids = [list(answer.outputs[0].token_ids) for answer in answers]
        return Answers(token_ids, sum(map(len, token_ids)) / seconds, 1 + accepted / max(drafts, 1))

    one_by_one, all_at_once = [slice(i, i + 1) for i in range(len(chats))], [slice(None)]
    return {ONE: ask(one_by_one, greedy), MANY: ask(all_at_once, greedy), SAMPLED: ask(all_at_once, sampled)}


def drafts_and_accepted(llm) -> tuple[int, int]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return tuple(values.get(f"vllm:spec_decode_num_{what}", 0) for what in ("drafts", "accepted_tokens"))


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
