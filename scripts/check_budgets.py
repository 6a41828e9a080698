"""Times of the stages of a step, each beside its floors and its budget. T = 12, N = 64, V = 152 k, bf16.

Two floors: the bytes that must be read and written, at the bandwidth that a plain copy reaches here, and the
operations, at the peak of what does them (data sheets). Times are of CUDA graphs: no launch from the host is in them.
"""

import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from kernel_cases import RANK, Model, Shape, attention_arguments
from kernel_time import copy_bandwidth
from outcome import FAILED, NOT_RUN, OK, Outcome, Settings, verdict

from vllm_ctc_spec.draft.ctc import default_width
from vllm_ctc_spec.kernels.contract import Budget, Frames
from vllm_ctc_spec.kernels.frame_stats import frame_stats
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv
from vllm_ctc_spec.kernels.prefix_search.gpu import best_tokens, search_candidates
from vllm_ctc_spec.kernels.tree_attention import tree_attention
from vllm_ctc_spec.kernels.tree_mask import tree_mask_reference

PART = "budgets"
VOCABULARY, FRAMES, NODES, DEPTH = 151_936, 12, 64, 8
BATCH_SIZES = (1, 64)
MODEL = Model(context=4096, heads=32, kv_heads=8, head_size=128, layers=32)
# Operations a second, the first name that the device's contains: fp32 without tensor cores, bf16 with them.
PEAKS = {
    "B200": (75e12, 2250e12), "H200": (67e12, 989e12), "H100 PCIe": (51e12, 756e12), "H100": (67e12, 989e12),
    "A100": (19.5e12, 312e12),
}  # fmt: skip
READS = 1.5  # log-softmax and candidates: times of reading the logits once
SEARCH_MICROSECONDS = {1: 30.0, 64: 120.0}
ATTENTION_RATIO = 1.15  # to stock attention with as many rows
COMPACTION_MICROSECONDS, PATH = 10.0, 8


class Floor(NamedTuple):
    num_bytes: float
    operations: float
    peak: float | None  # operations a second of what computes them

    def microseconds(self, bandwidth: float) -> tuple[float, float | None]:
        return self.num_bytes / bandwidth * 1e6, self.operations / self.peak * 1e6 if self.peak else None


def check(settings: Settings) -> Iterator[Outcome]:
    if not torch.cuda.is_available():
        yield Outcome(PART, "stages of a step", NOT_RUN, "times and budgets are of a GPU; CPU: kernel_time.py")
        return
    torch.manual_seed(settings.seed)
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    bandwidth = copy_bandwidth(device, lambda run: graph_microseconds(run) / 1e6)
    peaks = next((peaks for part, peaks in PEAKS.items() if part in name), (None, None))
    stages = {
        "log-softmax and candidates": candidates_stage,
        "prefix search and mask": search_stage,
        "tree attention": attention_stage,
        "compaction": compaction_stage,
    }
    for stage, run in stages.items():
        for batch in BATCH_SIZES[:1] if settings.quick else BATCH_SIZES:
            try:
                yield run(f"{stage}, batch {batch}", batch, device, bandwidth, peaks)
            except Exception as problem:
                traceback.print_exc()
                yield Outcome(PART, stage, FAILED, f"{type(problem).__name__}: {problem}"[:300])
            torch.cuda.empty_cache()


def graph_microseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench_cudagraph(run, return_mode="median") * 1e3


def stage(name: str, time: float, budget: float, floor: Floor, bandwidth: float, **figures: float) -> Outcome:
    of_bytes, of_operations = floor.microseconds(bandwidth)
    detail = f"{time:.1f} us of {budget:.1f}; floors: {of_bytes:.1f} us for {floor.num_bytes / 1e6:.2f} MB"
    if of_operations is not None:
        detail += f", {of_operations:.2f} us for {floor.operations / 1e6:.1f} M operations"
    figures |= {"microseconds": time, "budget": budget, "bytes": floor.num_bytes, "operations": floor.operations}
    return verdict(PART, name, time <= budget, detail, bytes_floor=of_bytes, operations_floor=of_operations, **figures)


def frames(batch: int, device: torch.device) -> Frames:
    logits = (torch.randn(batch, FRAMES, VOCABULARY, device=device) * 3).bfloat16()
    odds = torch.randn(batch, FRAMES, device=device)
    log_scale = torch.nn.functional.logsigmoid(-odds) - frame_stats(logits)[0]
    anchor = torch.randint(VOCABULARY, (batch,), device=device)
    return Frames(logits, log_scale, torch.nn.functional.logsigmoid(odds), anchor)


def candidates_stage(name: str, batch: int, device: torch.device, bandwidth: float, peaks: tuple) -> Outcome:
    logits, width = frames(batch, device).logits, default_width(NODES)

    def run() -> None:
        frame_stats(logits)
        best_tokens(logits, width)

    # exp, add, two comparisons and a maximum for each logit
    floor = Floor(logits.nbytes, 5 * logits.numel(), peaks[0])
    parts = {
        "frame_stats": graph_microseconds(lambda: frame_stats(logits)),
        "best_tokens": graph_microseconds(lambda: best_tokens(logits, width)),
    }
    budget = READS * floor.microseconds(bandwidth)[0]
    return stage(name, graph_microseconds(run), budget, floor, bandwidth, **parts)


def search_stage(name: str, batch: int, device: torch.device, bandwidth: float, peaks: tuple) -> Outcome:
    without_head, budget = frames(batch, device), Budget(NODES, default_width(NODES), DEPTH)
    tokens = best_tokens(without_head.logits, budget.width)
    head = tuple((torch.randn(VOCABULARY, RANK, device=device) * 0.1).bfloat16() for _ in range(2))
    arguments = tokens, without_head._replace(markov=head), budget
    num_candidates = tokens.shape[1]
    # Every node: T products and RANK products a candidate. One program a request: its peak is one multiprocessor's.
    operations = 2.0 * NODES * num_candidates * (FRAMES + RANK)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    peak = peaks[0] and peaks[0] / multiprocessors
    once = batch * num_candidates * (2 * FRAMES + 8 + 2 * RANK) + batch * NODES * (2 * RANK + 28)
    waves = -(-batch // multiprocessors)
    floor = Floor(once, operations * waves, peak)
    time = graph_microseconds(lambda: search_candidates(*arguments))
    return stage(name, time, SEARCH_MICROSECONDS[batch], floor, bandwidth)


def attention_stage(name: str, batch: int, device: torch.device, bandwidth: float, peaks: tuple) -> Outcome:
    node = torch.arange(1 + NODES)
    parents = torch.where(node > 0, (node - 1) // 2, -1).int().expand(batch, -1).contiguous()
    shape = Shape(VOCABULARY, FRAMES, batch, NODES)
    arguments = attention_arguments(shape, MODEL, torch.bfloat16, device, tree_mask_reference(parents)[1])
    rows, positions = batch * (1 + NODES), MODEL.context + 1 + NODES
    entry = 2 * MODEL.kv_heads * MODEL.head_size
    num_bytes = 2.0 * batch * positions * entry + 2 * arguments["query"].nbytes
    floor = Floor(num_bytes, 4.0 * rows * positions * MODEL.heads * MODEL.head_size, peaks[1])
    time = graph_microseconds(lambda: tree_attention(**arguments))
    stock, of = stock_attention(arguments)
    outcome = stage(name, time, ATTENTION_RATIO * stock, floor, bandwidth, stock_microseconds=stock)
    return outcome._replace(detail=f"{outcome.detail}; {time / stock:.2f} x {of} ({stock:.1f} us)")


def stock_attention(arguments: dict) -> tuple[float, str]:
    """Microseconds of causal attention of as many rows, and whose: vLLM's over the same paged cache, where it is
    installed, else torch's flash attention over a contiguous one, which has less to do."""
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


def compaction_stage(name: str, batch: int, device: torch.device, bandwidth: float, peaks: tuple) -> Outcome:
    """A path of eight nodes, none of which is in its place: seven moves a request and layer."""
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
    floor = Floor(moved, 0.0, None)
    if batch > 1:  # the budget is one request's
        outcome = stage(name, time, float("inf"), floor, bandwidth)
        return outcome._replace(status=OK, detail=outcome.detail.replace(" of inf", ", no budget"))
    return stage(name, time, COMPACTION_MICROSECONDS, floor, bandwidth)
