"""Times of the stages of a step on a GPU, each beside its floors and its budget. T = 12, N = 63, V = 152 k, bf16.

    python benchmarks/budgets.py               # batches of 1 and 64
    python benchmarks/budgets.py --quick       # of 1

Writes OUTPUT.json and OUTPUT.md; the exit status is 1 if a stage is over its budget or could not be timed.

A stage has two floors: the bytes that must be read and written, at the bandwidth of a plain copy here, and the
operations, at their unit's peak (data sheets). Times are of CUDA graphs: no launch from the host is in them.

tests/kernels/gpu_budget.py holds the kernels to the same budgets without a GPU, by their machine code.
"""

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from kernel_cases import RANK, Model, Shape, attention_arguments
from kernel_time import copy_bandwidth
from pair import RESULTS
from record import describe_run, machine_line, write_record

from vllm_ctc_spec.draft.ctc import SAMPLED_WIDTH, default_width
from vllm_ctc_spec.kernels.best_tokens import best_tokens
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, Frames
from vllm_ctc_spec.kernels.frame_stats import frame_stats
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv
from vllm_ctc_spec.kernels.prefix_chain import candidates, prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_search.gpu import search_candidates
from vllm_ctc_spec.kernels.tree_attention import tree_attention
from vllm_ctc_spec.kernels.tree_mask import tree_mask_reference

VOCABULARY, FRAMES, NODES, DEPTH, LABELS = 151_936, 12, 63, 8, 8
BATCH_SIZES = (1, 64)
MODEL = Model(context=4096, heads=32, kv_heads=8, head_size=128, layers=32)
# Operations a second, for the first name that the device's name contains: fp32 without tensor cores, bf16 with them.
PEAKS = {
    "B200": (75e12, 2250e12), "H200": (67e12, 989e12), "H100 PCIe": (51e12, 756e12), "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
}  # fmt: skip
# By batch size, for an H200.
CANDIDATES_MICROSECONDS = {1: 15.0, 64: 80.0}
SEARCH_MICROSECONDS = {1: 40.0, 64: 120.0}
CHAIN_MICROSECONDS = {1: 60.0, 64: 300.0}
ATTENTION_RATIO = 1.15  # to stock attention with as many rows
COMPACTION_MICROSECONDS, PATH = 10.0, 8


class Floor(NamedTuple):
    num_bytes: float
    operations: float
    peak: float | None  # operations a second of the unit that computes them

    def microseconds(self, bandwidth: float) -> tuple[float, float | None]:
        return self.num_bytes / bandwidth * 1e6, self.operations / self.peak * 1e6 if self.peak else None


class Setting(NamedTuple):
    stage: str
    batch: int
    device: torch.device
    bandwidth: float  # bytes a second of a plain copy
    peaks: tuple[float | None, float | None]  # operations a second, fp32 and bf16


class Row(NamedTuple):
    stage: str
    batch: int
    microseconds: float
    budget: float | None  # microseconds; None: none is set
    floor: Floor
    bytes_floor: float  # microseconds
    operations_floor: float | None  # microseconds; None: this device's peak is not known
    others: dict[str, float] = {}  # noqa: RUF012 - never written to; microseconds of the comparisons
    note: str = ""

    @property
    def within(self) -> bool:
        return self.budget is None or self.microseconds <= self.budget


def candidates_bytes(batch: int, num_tokens: int) -> float:
    """The logits once."""
    return 2.0 * batch * FRAMES * num_tokens


def search_bytes(batch: int, num_nodes: int) -> float:
    """Logits, tokens and head of every candidate once; the head's other half, and the tree, of every node."""
    num_candidates = FRAMES * default_width(num_nodes)
    return float(batch * num_candidates * (2 * FRAMES + 8 + 2 * RANK) + batch * num_nodes * (2 * RANK + 28))


def sampled_chain_bytes(batch: int, num_tokens: int) -> float:
    """Logits, tokens and head of every candidate once, and of every label the row of q, over the whole vocabulary."""
    num_candidates = FRAMES * SAMPLED_WIDTH
    return batch * (num_candidates * (2.0 * FRAMES + 8 + 2 * RANK) + 4.0 * LABELS * num_tokens)


def graph_microseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench_cudagraph(run, return_mode="median") * 1e3


def timed(time: float, budget: float | None, floor: Floor, setting: Setting, **more: Any) -> Row:
    return Row(setting.stage, setting.batch, time, budget, floor, *floor.microseconds(setting.bandwidth), **more)


def frames(setting: Setting) -> Frames:
    batch, device = setting.batch, setting.device
    logits = (torch.randn(batch, FRAMES, VOCABULARY, device=device) * 3).bfloat16()
    odds = torch.randn(batch, FRAMES, device=device)
    log_scale = torch.nn.functional.logsigmoid(-odds) - frame_stats(logits)[0]
    anchor = torch.randint(VOCABULARY, (batch,), device=device)
    return Frames(logits, log_scale, torch.nn.functional.logsigmoid(odds), anchor)


def head(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    w_in, w_out = ((torch.randn(VOCABULARY, RANK, device=device) * 0.1).bfloat16() for _ in range(2))
    return w_in, w_out


def candidates_stage(setting: Setting) -> Row:
    logits, width = frames(setting).logits, default_width(NODES)

    def run() -> None:
        best_tokens(logits, width, frame_stats(logits).tile_best)

    tile_best = frame_stats(logits).tile_best
    # exp, add, two comparisons and a maximum for each logit
    floor = Floor(candidates_bytes(setting.batch, VOCABULARY), 5 * logits.numel(), setting.peaks[0])
    parts = {
        "frame_stats": graph_microseconds(lambda: frame_stats(logits)),
        "best_tokens": graph_microseconds(lambda: best_tokens(logits, width, tile_best)),
    }
    budget = CANDIDATES_MICROSECONDS[setting.batch]
    return timed(graph_microseconds(run), budget, floor, setting, others=parts)


def search_stage(setting: Setting) -> Row:
    batch, device, peak = setting.batch, setting.device, setting.peaks[0]
    without_head, budget = frames(setting), Budget(NODES, default_width(NODES), DEPTH)
    tokens = best_tokens(without_head.logits, budget.width)
    arguments = tokens, without_head._replace(markov=head(device)), budget
    # Every node: T products and RANK products a candidate. One program a request: its peak is one multiprocessor's.
    operations = 2.0 * NODES * tokens.shape[1] * (FRAMES + RANK)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    waves = -(-batch // multiprocessors)
    floor = Floor(search_bytes(batch, NODES), operations * waves, peak and peak / multiprocessors)
    time = graph_microseconds(lambda: search_candidates(*arguments))
    return timed(time, SEARCH_MICROSECONDS[batch], floor, setting)


def sampled_chain_stage(setting: Setting) -> Row:
    batch, device, peak = setting.batch, setting.device, setting.peaks[0]
    given, rows = frames(setting)._replace(markov=head(device)), torch.arange(batch, device=device)
    draft_logits = torch.empty(batch, LABELS, VOCABULARY, device=device)
    sampling = ChainSampling(torch.ones(batch, device=device), rows, rows, rows, draft_logits)
    tokens = candidates(given, SAMPLED_WIDTH)
    operations = 2.0 * LABELS * batch * tokens.shape[1] * (FRAMES + RANK)
    floor = Floor(sampled_chain_bytes(batch, VOCABULARY), operations, peak)
    time = graph_microseconds(lambda: prefix_chain_triton(tokens, given, LABELS, sampling))
    return timed(time, CHAIN_MICROSECONDS[batch], floor, setting)


def attention_stage(setting: Setting) -> Row:
    batch, device = setting.batch, setting.device
    node = torch.arange(1 + NODES)
    parents = torch.where(node > 0, (node - 1) // 2, -1).int().expand(batch, -1).contiguous()
    shape = Shape(VOCABULARY, FRAMES, batch, NODES)
    arguments = attention_arguments(shape, MODEL, torch.bfloat16, device, tree_mask_reference(parents)[1])
    rows, positions = batch * (1 + NODES), MODEL.context + 1 + NODES
    entry = 2 * MODEL.kv_heads * MODEL.head_size
    num_bytes = 2.0 * batch * positions * entry + 2 * arguments["query"].nbytes
    floor = Floor(num_bytes, 4.0 * rows * positions * MODEL.heads * MODEL.head_size, setting.peaks[1])
    time = graph_microseconds(lambda: tree_attention(**arguments))
    stock, of = stock_attention(arguments)
    note = f"{time / stock:.2f} x {of}"
    return timed(time, ATTENTION_RATIO * stock, floor, setting, others={"stock attention": stock}, note=note)


def stock_attention(arguments: dict) -> tuple[float, str]:
    """Microseconds of causal attention of as many rows, and its name: vLLM's over the same paged cache, where vLLM is
    installed, else torch's flash attention over a contiguous cache, which has less to do."""
    query, batch = arguments["query"], len(arguments["seq_lens"])
    rows, positions = query.shape[0] // batch, MODEL.context + 1 + NODES
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        q = query.view(batch, rows, *query.shape[1:]).transpose(1, 2)
        k, v = (q.new_empty(batch, MODEL.kv_heads, positions, MODEL.head_size).normal_() for _ in range(2))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            run = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
            return graph_microseconds(run), "torch's flash attention on contiguous keys"
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * rows
    run = lambda: flash_attn_varlen_func(  # noqa: E731
        q=query, k=arguments["key_cache"], v=arguments["value_cache"], max_seqlen_q=rows, cu_seqlens_q=starts,
        max_seqlen_k=positions, seqused_k=arguments["seq_lens"], block_table=arguments["block_table"],
        softmax_scale=arguments["scale"], causal=True,
    )  # fmt: skip
    return graph_microseconds(run), "vLLM's FlashAttention"


def compaction_stage(setting: Setting) -> Row:
    """A path of eight nodes, none in its place yet: seven moves a request and layer."""
    batch, device = setting.batch, setting.device
    blocks, block_size = batch * -(-(1 + NODES) // 16), 16
    caches = [
        torch.zeros(blocks, MODEL.kv_heads, block_size, 2 * MODEL.head_size, dtype=torch.bfloat16, device=device)
        for _ in range(MODEL.layers)
    ]
    pointers = CachePointers(caches)
    path = torch.arange(1 + NODES, dtype=torch.int32, device=device).repeat(batch, 1)
    path[:, 1:PATH] *= 2
    row = torch.arange(1 + NODES, device=device)
    slots = (torch.arange(batch, device=device)[:, None] * (blocks // batch) * block_size + row).flatten()
    roots = torch.arange(batch, dtype=torch.int32, device=device) * (1 + NODES)
    counts = torch.full((batch,), PATH, dtype=torch.int32, device=device)
    moved = 2.0 * batch * (PATH - 1) * MODEL.layers * MODEL.kv_heads * 2 * MODEL.head_size * 2
    time = graph_microseconds(lambda: compact_kv(pointers, slots, roots, path, counts))
    # The budget is one request's.
    return timed(time, COMPACTION_MICROSECONDS if batch == 1 else None, Floor(moved, 0.0, None), setting)


STAGES: dict[str, Callable[[Setting], Row]] = {
    "log-softmax and candidates": candidates_stage,
    "prefix search and mask": search_stage,
    "sampled chain of 8 labels": sampled_chain_stage,
    "tree attention": attention_stage,
    "compaction": compaction_stage,
}


def measure(device: torch.device, batches: tuple[int, ...]) -> tuple[list[Row], list[str]]:
    """Rows, and a sentence for each stage that could not be timed: the others are timed all the same."""
    name = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(device, lambda run: graph_microseconds(run) / 1e6)
    peaks = next((peaks for part, peaks in PEAKS.items() if part in name), (None, None))
    rows, failures = [], []
    for stage, run in STAGES.items():
        for batch in batches:
            try:
                rows.append(run(Setting(stage, batch, device, bandwidth, peaks)))
            except Exception as problem:
                traceback.print_exc()
                failures.append(f"{stage}, batch {batch}: {type(problem).__name__}: {problem}"[:300])
            torch.cuda.empty_cache()
    return rows, failures


def to_markdown(run: dict, rows: list[Row], failures: list[str]) -> str:
    lines = [
        f"Medians of CUDA graphs, microseconds. {machine_line(run)}; `{run['command']}`.",
        "",
        "| stage | batch | time | budget | | floor of bytes | floor of operations | beside it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        budget = "-" if r.budget is None else f"{r.budget:.1f}"
        operations = "-" if r.operations_floor is None else f"{r.operations_floor:.2f}"
        beside = "; ".join([*(f"{name} {time:.1f}" for name, time in r.others.items()), *([r.note] if r.note else [])])
        lines.append(
            f"| {r.stage} | {r.batch} | {r.microseconds:.1f} | {budget} | {'' if r.within else 'OVER'} | "
            f"{r.bytes_floor:.1f} | {operations} | {beside} |"
        )
    return "\n".join([*lines, *([""] if failures else []), *(f"- failed: {text}" for text in failures)]) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"a batch of {BATCH_SIZES[0]} only")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--output", type=Path, default=RESULTS / "budgets", help="path without suffix")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if not torch.cuda.is_available():
        print("error: budgets are of a GPU, and there is none; benchmarks/kernel_time.py times a CPU.", file=sys.stderr)
        return 1
    torch.manual_seed(args.seed)
    rows, failures = measure(torch.device("cuda"), BATCH_SIZES[:1] if args.quick else BATCH_SIZES)
    run = describe_run("benchmarks/budgets.py", argv)
    record = {"run": run, "rows": [{**r._asdict(), "floor": r.floor._asdict()} for r in rows], "failures": failures}
    write_record(args.output, record, to_markdown(run, rows, failures))
    return int(bool(failures) or not all(r.within for r in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
