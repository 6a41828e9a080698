"""Where a decoding step's time goes: target forward, verification, drafter, and their own parts, by kind of draft.

    python benchmarks/step_time.py                             # the tiny embedded pair and its prompts
    python benchmarks/step_time.py --drafts chain tree:16

One engine for each kind of draft, all in this process, greedy. They take turns batch by batch: a machine that gets
slower or faster favours none. Medians over all decoding steps. Writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import psutil
from client import read_questions
from pair import RESULTS, V2_RUNNER, add_pair_arguments, choose_pair, ctc_config, ready
from record import describe_run, machine_line, write_record
from server import on_cpu
from tqdm import tqdm

from vllm_ctc_spec.plan.step_times import STEP, Stopwatch, synchronizer
from vllm_ctc_spec.serving.cpu.threads import is_large

if on_cpu():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the engines share this process's threads
    os.environ.update(V2_RUNNER)  # without a drafter too: only the drafts may differ

BUSY_SECONDS = 3.0  # how busy the machine is with other things is measured first
DRAFTS = ("none", "chain", "tree:8", "tree:16", "tree:32", "tree:64")
TOKENS, SPEED = "tokens a step and request", "tokens/s"
# Parts, and how deep each lies in the ones above it. The parts of a part need not add up to it.
PARTS = {
    "target forward": 0,
    "attention, all layers": 1,
    "tree layout": 0,
    "verification": 0,
    "tree walk": 1,
    "compaction": 1,
    "drafter": 0,
    "context keys and values": 1,
    "draft module forward": 1,
    "frame statistics": 1,
    "chain or tree search, masks included": 1,
}


def speculative_config(drafter: Path, draft: str) -> dict | None:
    """draft: `none`, `chain[:LABELS]`; `tree:NODES` or `transform:NODES` (trees of that size in batches of any size);
    or `scheduled:NODES` (trees that are smaller in larger batches, as in a user's server)."""
    kind, _, nodes = draft.partition(":")
    if kind == "none":
        return None
    config = {**ctc_config(drafter), "ctc_draft": "chain"}
    if kind != "chain":
        config["ctc_draft"] = "tree"
    if kind in ("tree", "transform"):
        config["ctc_tree_rows"] = 2**20
    if nodes:
        config["num_speculative_tokens"] = int(nodes)
    if kind == "transform":
        config["ctc_search"] = "transform"
    return config


def instrument_engine(stopwatch: Stopwatch, llm) -> None:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    proposer = runner.speculator
    stopwatch.wrap(core, "step_fn", STEP)
    stopwatch.wrap(runner.model, "forward", "target forward")
    for name, layer in get_layers_from_vllm_config(runner.vllm_config, Attention).items():
        if proposer is None or name not in proposer.draft_attn_layer_names:
            stopwatch.wrap(layer.impl, "forward", "attention, all layers")
    stopwatch.wrap(runner, "sample", "verification")
    if proposer is None:
        return
    stopwatch.wrap(proposer, "propose", "drafter")
    stopwatch.wrap(proposer, "_precompute_context_kv", "context keys and values")
    stopwatch.wrap(proposer, "_run_model", "draft module forward")


def instrument_functions(stopwatch: Stopwatch) -> None:
    """Time the functions that all engines share."""
    import vllm_ctc_spec.accept.walk
    import vllm_ctc_spec.draft.ctc
    import vllm_ctc_spec.serving.tree.compaction
    import vllm_ctc_spec.serving.tree.model_state

    stopwatch.wrap(vllm_ctc_spec.draft.ctc, "frame_stats", "frame statistics")
    for search in ("draft_chain", "draft_tree"):
        stopwatch.wrap(vllm_ctc_spec.draft.ctc, search, "chain or tree search, masks included")
    stopwatch.wrap(vllm_ctc_spec.serving.tree.model_state, "tree_layout", "tree layout")
    stopwatch.wrap(vllm_ctc_spec.accept.walk, "tree_walk", "tree walk")
    compaction = vllm_ctc_spec.serving.tree.compaction.PathCompaction
    for kind in (compaction, *compaction.__subclasses__()):
        stopwatch.wrap(kind, "run", "compaction")


def measure_steps(llms: dict, prompts: list, batch_size: int, max_tokens: int, stopwatch: Stopwatch) -> dict[str, dict]:
    """By draft: median milliseconds of each part over the decoding steps, tokens a step, tokens a second. Prompts go in
    full batches of `batch_size`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for llm in llms.values():
        llm.generate(prompts[:batch_size], sampling, use_tqdm=False)
    stopwatch.steps.clear()
    seconds = dict.fromkeys(llms, 0.0)
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"batch {batch_size}"):
        batch = prompts[start : start + batch_size]
        for stopwatch.draft, llm in llms.items():
            started = time.perf_counter()
            llm.generate(batch, sampling, use_tqdm=False)
            seconds[stopwatch.draft] += time.perf_counter() - started
    batches = -(-len(prompts) // batch_size)
    result = {}
    for draft, steps in stopwatch.steps.items():
        result[draft] = {name: median(step.get(name, 0.0) for step in steps) for name in (STEP, *PARTS)}
        result[draft][TOKENS] = batches * max_tokens / len(steps)
        result[draft][SPEED] = len(prompts) * max_tokens / seconds[draft]
    return result


def to_markdown(run: dict, by_size: dict[int, dict[str, dict]]) -> str:
    lines = [
        f"Medians over the decoding steps of {run['num_prompts']} prompts, greedy, {run['max_tokens']} tokens each, "
        "engines in one process, taking turns. `tree:N` searches exact prefixes, `transform:N` is the paper's way, "
        "with N nodes each. A part that is indented belongs to the one above. Tokens a second include prefill; where "
        "requests of a batch end at different times, tokens a step and request fall short of the acceptance length.",
        f"{machine_line(run)}; `{run['command']}`.",
    ]
    for size, drafts in by_size.items():
        lines += ["", f"| batch {size}, milliseconds | " + " | ".join(drafts) + " |", "|---|" + "---|" * len(drafts)]
        lines.append(f"| {SPEED} | " + " | ".join(f"{parts[SPEED]:.0f}" for parts in drafts.values()) + " |")
        lines.append(f"| {TOKENS} | " + " | ".join(f"{parts[TOKENS]:.2f}" for parts in drafts.values()) + " |")
        for name, depth in {STEP: 0, **PARTS}.items():
            cells = " | ".join(f"{parts[name]:.2f}" for parts in drafts.values())
            lines.append(f"| {'&nbsp;&nbsp;' * depth}{name} | {cells} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser)
    kinds = "none, chain[:N], tree:N, transform:N, scheduled:N"
    parser.add_argument("--drafts", nargs="+", default=DRAFTS, metavar="DRAFT", help=kinds)
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "step_time", help="path without suffix")
    return choose_pair(parser.parse_args(argv))


def main(argv: list[str]) -> int:
    args = parse(argv)
    ready(args.pair)
    busy = psutil.cpu_percent(BUSY_SECONDS)
    threads = None
    if on_cpu():  # torch, which vLLM imports, reads it then
        threads = len(os.sched_getaffinity(0)) if is_large(args.target) else 1
        threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(threads)))
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True} if on_cpu() else {}
    llms = {
        draft: LLM(
            str(args.target), speculative_config=speculative_config(args.drafter, draft),
            max_num_seqs=max(args.batch_sizes), enable_prefix_caching=False, **options,
        )
        for draft in args.drafts
    }  # fmt: skip
    stopwatch = Stopwatch(synchronizer())
    instrument_functions(stopwatch)
    for llm in llms.values():
        instrument_engine(stopwatch, llm)
    tokenizer = next(iter(llms.values())).get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in read_questions(args.pair.prompts, args.num_prompts)
    ]
    by_size = {size: measure_steps(llms, prompts, size, args.max_tokens, stopwatch) for size in args.batch_sizes}
    run = describe_run(
        "benchmarks/step_time.py",
        argv,
        prompts=args.pair.prompts.name,
        num_prompts=len(prompts),
        max_tokens=args.max_tokens,
        threads=threads,
        machine_busy_percent_before=busy,
    )
    write_record(args.output, {"run": run, "steps_ms": by_size}, to_markdown(run, by_size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
