"""Acceptance length by source of drafts, for prompts whose answers copy little and for some whose answers copy a lot.

    python benchmarks/sources.py --data gsm8k=gsm8k_test.jsonl      # beside the sets of copying.py; the tiny pair
    python benchmarks/sources.py --pair chat --num-prompts 8 --max-tokens 64

One request at a time, greedy, trees of as many nodes for every source, engines in this process one after the other.
An answer that differs from that of no drafts is an error, at the end. vLLM's n-grams (the longest match, the last one
first) are followed through the answers without an engine. Acceptance lengths do not depend on the machine's speed:
`serve.py` measures that. Writes OUTPUT.json, OUTPUT.md and OUTPUT.png.
"""

import argparse
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import prompts
from copying import SETS
from methods import NGRAM
from pair import RESULTS, V2_RUNNER, add_pair_arguments, choose_pair, ctc_config, ready
from prompts import PromptSet
from record import describe_run, machine_line, write_record
from server import on_cpu

if on_cpu():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.update(V2_RUNNER)

SOURCES = ("ctc", "cache", "ctc+cache")
NO_DRAFTS, NGRAMS = "none", "ngram"
MAX_MODEL_LEN = 512


def speculative_config(drafter: Path, sources: str, nodes: int) -> dict | None:
    if sources == NO_DRAFTS:
        return None
    config = ctc_config(drafter) if "ctc" in sources.split("+") else {"method": "ctc"}
    return {
        **config, "ctc_sources": sources, "ctc_draft": "tree", "num_speculative_tokens": nodes, "ctc_tree_rows": 2**20,
    }  # fmt: skip


def answers(target: Path, config: dict | None, sets: list[PromptSet], max_tokens: int) -> tuple[dict, dict]:
    """By set: prompt and answer of each prompt, in token ids; and the number of drafts that were verified."""
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True} if on_cpu() else {"gpu_memory_utilization": 0.5}
    llm = LLM(
        str(target), speculative_config=config, max_num_seqs=1, max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False, **options,
    )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    found, drafts = {}, {}
    for data in sets:
        if config is not None:
            runner.speculator.meter.reset()
        chats = [[{"role": "user", "content": text}] for text in data.prompts]
        given = llm.chat(chats, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)
        found[data.name] = [(list(one.prompt_token_ids), list(one.outputs[0].token_ids)) for one in given]
        drafts[data.name] = 0 if config is None else int(runner.speculator.meter.totals[0])
    llm.llm_engine.engine_core.shutdown()
    return found, drafts


def num_changed(expected: dict, given: dict) -> int:
    """Answers of all sets that are not the expected ones."""
    return sum(a != b for name in expected for a, b in zip(expected[name], given[name], strict=True))


def num_tokens(given: list[tuple[list[int], list[int]]]) -> int:
    """Without the first of each answer, which the prefill brings."""
    return sum(len(answer) - 1 for _, answer in given)


def ngram_steps(prompt: list[int], answer: list[int], lengths: range, most: int) -> int:
    """Steps to this answer, if each drafts up to `most` tokens behind the last place that agrees with most tokens."""
    text, said, steps = [*prompt, answer[0]], 1, 0
    while said < len(answer):
        draft: list[int] = []
        for length in reversed(lengths):
            places = (at for at in range(len(text) - length - 1, -1, -1) if text[at : at + length] == text[-length:])
            if (place := next(places, None)) is not None:
                draft = text[place + length : place + length + most]
                break
        rest = answer[said:]
        accepted = next((k for k, (a, b) in enumerate(zip(draft, rest)) if a != b), min(len(draft), len(rest)))
        new = min(accepted + 1, len(rest))
        text += rest[:new]
        said, steps = said + new, steps + 1
    return steps


def table_of(run: dict, lengths: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(lengths.values())))
    lines = [
        f"Acceptance length, {run['num_prompts']} prompts of each set, at most {run['max_tokens']} tokens, greedy, one "
        f"request at a time, trees of {run['nodes']} nodes; {NGRAMS}: chains of as many tokens behind matches of "
        f"{NGRAM['prompt_lookup_min']} to {NGRAM['prompt_lookup_max']}.",
        f"{machine_line(run)}; `{run['command']}`.", "",
        f"| sources | {' | '.join(names)} |", "|---|" + "---|" * len(names),
    ]  # fmt: skip
    lines += [f"| {source} | {' | '.join(f'{x:.2f}' for x in row.values())} |" for source, row in lengths.items()]
    *alone, merged = (lengths[source] for source in SOURCES)
    ratios = [merged[name] / max(row[name] for row in alone) for name in names]
    lines += [f"| {SOURCES[-1]} / the better of both | {' | '.join(f'{ratio:.3f}' for ratio in ratios)} |"]
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_pair_arguments(parser)
    prompts.add_arguments(parser)
    parser.add_argument("--nodes", type=int, default=16, help="of a tree (default: 16)")
    parser.add_argument("--num-prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS / "sources", help="path without suffix")
    return choose_pair(parser.parse_args(argv))


def main(argv: list[str]) -> int:
    args = parse(argv)
    ready(args.pair)
    sets = prompts.read(args) if args.data or args.spec_bench else []
    for name, make in SETS.items():
        draws = random.Random(f"{name} 0")
        sets.append(PromptSet(name, [make(draws) for _ in range(args.num_prompts)]))
    sets = [PromptSet(data.name, data.prompts[: args.num_prompts]) for data in sets]
    expected, _ = answers(args.target, None, sets, args.max_tokens)
    lookup = range(NGRAM["prompt_lookup_min"], NGRAM["prompt_lookup_max"] + 1)
    lengths = {
        NGRAMS: {
            name: num_tokens(given) / sum(ngram_steps(*one, lookup, args.nodes) for one in given)
            for name, given in expected.items()
        }
    }
    changed = {}
    for sources in SOURCES:
        config = speculative_config(args.drafter, sources, args.nodes)
        given, drafts = answers(args.target, config, sets, args.max_tokens)
        changed[sources] = num_changed(expected, given)
        lengths[sources] = {name: num_tokens(given[name]) / drafts[name] for name in given}
    run = describe_run(
        "benchmarks/sources.py", argv, pair=args.pair.name, nodes=args.nodes, num_prompts=args.num_prompts,
        max_tokens=args.max_tokens,
    )  # fmt: skip
    record = {"run": run, "acceptance_length": lengths, "changed_answers": changed}
    write_record(args.output, record, table_of(run, lengths))
    import plots

    plots.sources(args.output.with_suffix(".png"), lengths, f"{args.pair.name}, trees of {args.nodes} nodes")
    if any(changed.values()):
        raise SystemExit(f"error: answers are not those without drafts: {changed}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
