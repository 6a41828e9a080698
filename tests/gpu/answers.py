"""Answers of one vLLM engine to a pair's questions, as JSON; a program, so that its end gives the device's memory back.

    python answers.py PAIR DRAFT DTYPE QUESTIONS OUTPUT.json [--eager]

DRAFT is none, chain, "chain, sampled" or tree:N. Each way of asking gives the tokens, tokens a second and a step.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from client import read_questions  # noqa: E402
from pair import read_pair  # noqa: E402
from step_time import speculative_config  # noqa: E402 - it sets what a CPU needs, before vLLM is imported
from vllm import LLM, SamplingParams  # noqa: E402

ONE, MANY, SAMPLED = "one at a time", "together", "together, temperature 1"
MAX_TOKENS = 96
GPU_MEMORY = 0.3  # of the device: an embedded target needs little


def engine(pair, draft: str, dtype: str, eager: bool) -> LLM:
    kind, _, sampled_drafts = draft.partition(", ")
    speculative = speculative_config(pair.drafter, kind)
    if sampled_drafts:
        speculative["draft_sample_method"] = "probabilistic"
    options = {"gpu_memory_utilization": GPU_MEMORY} if torch.cuda.is_available() else {}
    llm = LLM(
        str(pair.target), speculative_config=speculative, dtype=dtype, enforce_eager=eager, max_num_seqs=16,
        max_model_len=512, enable_prefix_caching=False, disable_log_stats=False, **options,
    )  # fmt: skip
    if eager and draft != "none" and torch.cuda.is_available():
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        forbid_synchronisation(executor.driver_worker.worker.model_runner.speculator)
    return llm


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


def drafts_and_accepted(llm: LLM) -> tuple[int, int]:
    values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return tuple(values.get(f"vllm:spec_decode_num_{what}", 0) for what in ("drafts", "accepted_tokens"))


def answers(llm: LLM, questions: list[str]) -> dict[str, dict]:
    """Everything is asked twice: the first time warms up."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    greedy = [SamplingParams(temperature=0, max_tokens=MAX_TOKENS) for _ in chats]
    sampled = [SamplingParams(temperature=1, max_tokens=MAX_TOKENS, seed=seed) for seed in range(len(chats))]

    def ask(batches: list[slice], sampling: list[SamplingParams]) -> dict:
        for _ in range(2):
            before, started = drafts_and_accepted(llm), time.perf_counter()
            given = [o for b in batches for o in llm.chat(chats[b], sampling[b], use_tqdm=False)]
            seconds = time.perf_counter() - started
        drafts, accepted = (after - b for after, b in zip(drafts_and_accepted(llm), before))
        token_ids = [list(answer.outputs[0].token_ids) for answer in given]
        speed = sum(map(len, token_ids)) / seconds
        return {"token_ids": token_ids, "tokens_per_second": speed, "acceptance_length": 1 + accepted / max(drafts, 1)}

    one_by_one, all_at_once = [slice(i, i + 1) for i in range(len(chats))], [slice(None)]
    return {ONE: ask(one_by_one, greedy), MANY: ask(all_at_once, greedy), SAMPLED: ask(all_at_once, sampled)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("pair", "draft", "dtype"):
        parser.add_argument(name)
    parser.add_argument("questions", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args(argv)
    pair = read_pair(args.pair)
    llm = engine(pair, args.draft, args.dtype, args.eager)
    found = answers(llm, read_questions(pair.prompts, args.questions))
    args.output.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
