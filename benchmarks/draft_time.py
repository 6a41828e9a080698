"""Milliseconds of one draft in vLLM, by kind of drafter: those of `ablation.py --table architectures`.

    python benchmarks/draft_time.py                            # for the tiny embedded target
    python benchmarks/draft_time.py --shape 8b                 # on a GPU: a target with dummy weights
    python benchmarks/draft_time.py --pair chat --draft-vocab-sizes 4096 8192 0   # drafters like the pair's

A draft costs the same whatever its drafter has learned, so that all drafters are random. One engine for each, all in
one process, greedy chains; they take turns batch by batch. Medians over all decoding steps: the whole of a draft, the
context's keys and values and the search among it, and the forward of its module. Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from ablation import ARCHITECTURES, SHARED
from pair import RESULTS, add_pair_arguments, choose_pair, ctc_config, ready
from random_pair import LOAD_FORMAT, SHAPES, register_load_format, save_random_drafter, save_shape
from record import describe_run, machine_line, write_record
from server import on_cpu
from transformers import AutoConfig

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.plan.process import in_own_process
from vllm_ctc_spec.plan.step_times import Stopwatch, environment, synchronizer
from vllm_ctc_spec.serving.cpu.threads import is_large
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.run import drafter_shape

PARTS = {"ms": "drafter", "forward_ms": "draft module forward"}  # key of the file: part of `step_time.py`


def save_drafters(target: Path, folder: Path, rows: list[str]) -> dict[str, tuple[Path, int]]:
    """A random drafter for each row of the table: its folder and its number of parameters."""
    config, saved = AutoConfig.from_pretrained(target), {}
    for number, row in enumerate(rows):
        settings = {**SHARED, "draft_vocab_size": "full", **ARCHITECTURES[row]}
        shape = drafter_shape(TrainConfig(target=str(target), data="", **settings), config)
        saved[row] = folder / str(number), save_random_drafter(shape, folder / str(number))
    return saved


def save_vocabularies(drafter: Path, folder: Path, sizes: list[int]) -> dict[str, tuple[Path, int]]:
    """Random drafters that differ from this one in the number of labels; 0: all of the target's tokens."""
    config, saved = DrafterConfig.load(drafter), {}
    for size in sizes:
        shape = dataclasses.replace(config, draft_vocab_size=size)
        where = folder / str(size)
        saved[f"{shape.draft_vocab_size} labels"] = where, save_random_drafter(shape, where)
    return saved


def measure(
    target: Path, drafters: dict[str, Path], batch_sizes: list[int], context: int, max_tokens: int, repeats: int,
    options: dict,
) -> dict[str, dict[str, dict[int, float]]]:  # fmt: skip
    """By row, part and batch size; in a process of its own."""
    from step_time import instrument_engine, measure_steps
    from vllm import LLM

    if options.get("load_format") == LOAD_FORMAT:
        register_load_format()
    if on_cpu():
        options = {**options, "dtype": "float32", "enforce_eager": True}
    else:
        options = {**options, "gpu_memory_utilization": 0.9 / len(drafters)}
    llms = {
        row: LLM(
            str(target), speculative_config={**ctc_config(folder), "ctc_draft": "chain"}, skip_tokenizer_init=True,
            max_num_seqs=max(batch_sizes), max_model_len=context + 2 * max_tokens, enable_prefix_caching=False,
            max_num_batched_tokens=max(2048, 64 * max(batch_sizes)), **options,
        )
        for row, folder in drafters.items()
    }  # fmt: skip
    stopwatch = Stopwatch(synchronizer())
    for llm in llms.values():
        instrument_engine(stopwatch, llm)
    vocabulary = next(iter(llms.values())).llm_engine.model_config.get_vocab_size()
    found: dict[str, dict[str, dict[int, float]]] = {row: {key: {} for key in PARTS} for row in drafters}
    for size in batch_sizes:
        prompts = [
            {"prompt_token_ids": [(7 * row + 3 * place) % vocabulary for place in range(context)]}
            for row in range(size * repeats)
        ]
        for row, parts in measure_steps(llms, prompts, size, max_tokens, stopwatch).items():
            for key, part in PARTS.items():
                found[row][key][size] = parts[part]
    return found


def to_markdown(run: dict, drafts: dict[str, dict]) -> str:
    sizes = list(next(iter(drafts.values()))["ms"])
    lines = [
        f"Medians over decoding steps, {run['context']} tokens of context, {run['weights']}; chains of "
        f"{run['labels']}. In brackets: of it, the forward of the draft module.",
        f"{machine_line(run)}; `{run['command']}`.",
        "",
        "| milliseconds a draft | parameters | " + " | ".join(f"{size} at a time" for size in sizes) + " |",
        "|---|---|" + "---|" * len(sizes),
    ]
    for row, found in drafts.items():
        cells = (f"{found['ms'][size]:.2f} ({found['forward_ms'][size]:.2f})" for size in sizes)
        lines.append(f"| {row} | {found['parameters'] / 1e6:.2f} M | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser, overrides=["target"])
    parser.add_argument("--shape", choices=SHAPES, help="a target of this shape with dummy weights")
    parser.add_argument("--rows", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="ROW")
    parser.add_argument(
        "--draft-vocab-sizes", type=int, nargs="+", metavar="LABELS",
        help="instead of these rows: drafters like the pair's with so many labels, 0 for all tokens",
    )  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, default=128, help="tokens of every prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="of every request")
    parser.add_argument("--repeats", type=int, default=3, help="batches of each size")
    parser.add_argument("--output", type=Path, default=RESULTS / "draft_time", help="path without suffix")
    args = parser.parse_args(argv)
    if args.shape and args.draft_vocab_sizes:
        parser.error("--draft-vocab-sizes are of drafters like the pair's; leave --shape out")
    return choose_pair(args)


def main(argv: list[str]) -> int:
    args = parse(argv)
    threads = None
    if on_cpu():
        threads = len(os.sched_getaffinity(0)) if is_large(args.target) else 1
    os.environ.update(environment(threads))  # before the process that measures starts
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    busy, options = psutil.cpu_percent(3.0), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.shape:
            args.target, options = save_shape(args.shape, folder / "target"), {"load_format": LOAD_FORMAT}
        else:
            ready(args.pair, drafter=False)
        if args.draft_vocab_sizes:
            saved = save_vocabularies(args.pair.drafter, folder, args.draft_vocab_sizes)
            labels = DrafterConfig.load(args.pair.drafter).num_labels
        else:
            saved = save_drafters(args.target, folder, args.rows)
            labels = SHARED["num_labels"]
        found = in_own_process(
            measure, args.target, {row: where for row, (where, _) in saved.items()}, args.batch_sizes, args.context,
            args.max_tokens, args.repeats, options,
        )  # fmt: skip
    drafts = {row: {"parameters": saved[row][1], **parts} for row, parts in found.items()}
    weights = f"dummy weights of the shape {args.shape}" if args.shape else f"the target of the pair {args.pair.name}"
    run = describe_run(
        "benchmarks/draft_time.py", argv, context=args.context, threads=threads, machine_busy_percent_before=busy,
        weights=weights, labels=labels,
    )  # fmt: skip
    write_record(args.output, {"run": run, "drafts": drafts}, to_markdown(run, drafts))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
