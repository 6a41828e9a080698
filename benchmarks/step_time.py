"""Where a decoding step's time goes: target forward, verification, drafter, and the drafter's own parts.

    python benchmarks/step_time.py                             # the embedded pair and prompts

One engine in this process, greedy, one row per batch size; medians over all decoding steps. Then the collapse and chain
functions alone, at the same shapes. Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import median

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import psutil
from client import read_questions
from pair import DRAFTER, PROMPTS, RESULTS, TARGET, ctc_config, existing
from report import describe_run
from server import on_cpu
from tqdm import tqdm

if on_cpu():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

BUSY_SECONDS = 3.0  # how busy the machine is with other things is measured first
STEP, TARGET_FORWARD, DRAFT = "step", "target forward", "drafter"
VERIFY, MODULE, CHAIN = "verification", "draft module forward", "prefix chain"
CONTEXT, FRAMES = "context keys and values", "frame statistics"
SHARES = (TARGET_FORWARD, VERIFY, DRAFT, CONTEXT, MODULE, FRAMES, CHAIN)


class Stopwatch:
    """Milliseconds by name, one entry per call; `synchronize` makes them true on a GPU."""

    def __init__(self, synchronize: Callable[[], None]):
        self.synchronize = synchronize
        self.times: dict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: object, attribute: str, name: str) -> None:
        inner = getattr(owner, attribute)

        @wraps(inner)
        def timed(*args, **kwargs):
            self.synchronize()
            started = time.perf_counter()
            result = inner(*args, **kwargs)
            self.synchronize()
            self.times[name].append((time.perf_counter() - started) * 1e3)
            return result

        setattr(owner, attribute, timed)


def synchronizer() -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def instrument(llm, stopwatch: Stopwatch) -> None:
    import vllm_ctc_spec.proposer as module

    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    stopwatch.wrap(core, "step_fn", STEP)
    stopwatch.wrap(runner.model, "forward", TARGET_FORWARD)
    stopwatch.wrap(runner, "sample", VERIFY)
    stopwatch.wrap(runner.speculator, "propose", DRAFT)
    stopwatch.wrap(runner.speculator, "_precompute_context_kv", CONTEXT)
    stopwatch.wrap(runner.speculator, "_run_model", MODULE)
    stopwatch.wrap(module, "frame_stats", FRAMES)
    stopwatch.wrap(module, "prefix_chain", CHAIN)


def measure_steps(llm, prompts: list, batch_size: int, max_tokens: int, stopwatch: Stopwatch) -> dict[str, float]:
    """Median milliseconds by part over the decoding steps; prompts go in full batches of `batch_size`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate(prompts[:batch_size], sampling, use_tqdm=False)
    stopwatch.times.clear()
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"batch {batch_size}"):
        llm.generate(prompts[start : start + batch_size], sampling, use_tqdm=False)
    return {name: median(stopwatch.times[name]) for name in (STEP, *SHARES)}


def measure_functions(batch_size: int, drafter, repeats: int, synchronize: Callable[[], None]) -> dict[str, float]:
    """Median milliseconds of the drafter's functions alone, on random frames of this drafter's shapes."""
    import torch
    from vllm_ctc_spec.kernels.collapse import collapse
    from vllm_ctc_spec.kernels.frame_stats import frame_stats
    from vllm_ctc_spec.kernels.prefix_chain import prefix_chain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, drafter.num_frames, drafter.vocab_size)
    logits = (3 * torch.randn(shape, generator=generator)).to(device)
    log_blank = torch.log(torch.rand(shape[:2], generator=generator)).to(device)
    log_label = torch.log1p(-log_blank.exp()) - logits.logsumexp(-1)
    anchor = torch.zeros(batch_size, dtype=torch.int64, device=device)
    rank = drafter.markov_rank
    tables = [torch.randn(drafter.vocab_size, rank, generator=generator).to(device) for _ in range(2)] if rank else None
    alignment = logits.argmax(-1)
    labels = drafter.num_labels
    functions = {
        FRAMES: lambda: frame_stats(logits),
        CHAIN: lambda: prefix_chain(logits, log_label, log_blank, anchor, labels, tables and tuple(tables)),
        "collapse": lambda: collapse(alignment, drafter.vocab_size, anchor, labels),
    }
    result = {}
    for name, function in functions.items():
        times = []
        for _ in range(repeats):
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        result[name] = median(times[repeats // 10 :])
    return result


def to_markdown(run: dict, steps: dict[int, dict], functions: dict[int, dict]) -> str:
    sizes = list(steps)
    head = "| | " + " | ".join(f"batch {size}" for size in sizes) + " |\n|---|" + "---|" * len(sizes)
    lines = [
        f"Medians over the decoding steps of {run['num_prompts']} prompts, greedy, {run['max_tokens']} tokens each, "
        "one engine in one process. The last four parts belong to the drafter.",
        f"vLLM {run['vllm']}, torch {run['torch']}, Python {run['python']}, {run['gpu'] or run['cpu']}; "
        f"{run['date'][:10]}; `{run['command']}`.",
        "",
        head,
        "| whole step, ms | " + " | ".join(f"{steps[size][STEP]:.2f}" for size in sizes) + " |",
    ]
    for name in SHARES:
        cells = (f"{steps[size][name]:.2f} ({steps[size][name] / steps[size][STEP]:.0%})" for size in sizes)
        lines.append(f"| {name}, ms (share) | " + " | ".join(cells) + " |")
    for name in functions[sizes[0]]:
        lines.append(f"| {name} alone, ms | " + " | ".join(f"{functions[size][name]:.3f}" for size in sizes) + " |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--drafter", type=Path, default=DRAFTER)
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="jsonl with the key `question`")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=300, help="of the functions alone")
    parser.add_argument("--output", type=Path, default=RESULTS / "step_time", help="path without suffix")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    existing(args.target)
    existing(args.drafter)
    busy = psutil.cpu_percent(BUSY_SECONDS)
    from vllm import LLM

    from vllm_ctc_spec.config import DrafterConfig

    options = {"dtype": "float32", "enforce_eager": True} if on_cpu() else {}
    llm = LLM(
        str(args.target), speculative_config=ctc_config(args.drafter), max_num_seqs=max(args.batch_sizes),
        enable_prefix_caching=False, **options,
    )  # fmt: skip
    stopwatch = Stopwatch(synchronizer())
    instrument(llm, stopwatch)
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in read_questions(args.prompts, args.num_prompts)
    ]
    steps = {size: measure_steps(llm, prompts, size, args.max_tokens, stopwatch) for size in args.batch_sizes}
    drafter = DrafterConfig.load(args.drafter)
    functions = {
        size: measure_functions(size, drafter, args.repeats, stopwatch.synchronize) for size in args.batch_sizes
    }
    run = describe_run("step_time.py", args, argv, len(prompts), busy)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"run": run, "steps_ms": steps, "functions_ms": functions}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    table = to_markdown(run, steps, functions)
    args.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
