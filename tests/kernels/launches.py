"""Every kernel launch of every public function, recorded on meta tensors, without a GPU.

The functions are called with their kernels replaced by recorders, so that what is compiled from this is exactly what
would be launched.
"""

import ast
import importlib
import pkgutil
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import vllm_ctc_spec.kernels
from vllm_ctc_spec.draft.ctc import SAMPLED_WIDTH, default_width
from vllm_ctc_spec.kernels import (
    best_tokens,
    collapse,
    ctc_transform,
    history_tree,
    kv_compaction,
    prefix_chain,
    prefix_search,
    tree_attention,
    tree_layout,
    tree_merge,
    tree_walk,
)
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, Frames, TreeRows

VOCABULARY = 151_936
BATCH = 64
LARGE_VOCABULARY, LARGE_BATCH = 256_000, 1024
TREE_NODES = (16, 64)  # a usual tree and the largest
TREE_ROWS = (8, 16, 32, 65)  # of scheduled trees and of the largest: a tile of each size, and the rest of one


class Launch(NamedTuple):
    kernel: triton.JITFunction
    args: tuple
    options: dict
    grid: tuple[int, ...]
    is_default: bool = False  # of a drafter and of trees as they come without options

    @property
    def values(self) -> dict:
        """Of the kernel's parameters, and of the compiler's options."""
        return dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.options


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: triton.JITFunction, calls: list[Launch]) -> None:
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid: tuple):
        return lambda *args, **options: self.calls.append(Launch(self.kernel, args, options, grid))


def kernel_modules() -> list:
    found = pkgutil.walk_packages(vllm_ctc_spec.kernels.__path__, "vllm_ctc_spec.kernels.")
    return [importlib.import_module(module.name) for module in found]


def launched_kernels() -> set[str]:
    """The names of what is launched anywhere in `kernels/`, `name[grid](...)`."""
    return {
        node.func.value.id
        for module in kernel_modules()
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }


def recorded_calls(architecture: int) -> list[Launch]:
    """The list to which all calls of kernels go from now on, as on a GPU of this compute capability, 90 for 9.0."""
    calls: list[Launch] = []
    launched = launched_kernels()
    for module in kernel_modules():
        for name, value in list(vars(module).items()):
            kernel = value.kernel if isinstance(value, Recorder) else value
            if isinstance(kernel, triton.JITFunction) and name in launched:
                setattr(module, name, Recorder(kernel, calls))
    tree_attention.gpu._compute_capability = lambda device: architecture // 10
    return calls


def record_launches(architecture: int) -> list[Launch]:
    """Distinct launches, those of default shapes first."""
    calls = recorded_calls(architecture)
    default_shapes()
    num_default = len(calls)
    other_chains()
    other_transforms()
    other_searches()
    other_trees()
    launches: dict[tuple, Launch] = {}
    for number, launch in enumerate(calls):
        dtypes = tuple(arg.dtype if isinstance(arg, torch.Tensor) else None for arg in launch.args)
        key = launch.kernel.__name__, dtypes, tuple(launch.options.items())
        launches.setdefault(key, launch._replace(is_default=number < num_default))
    return list(launches.values())


def arguments_beyond_int32() -> list[str]:
    """What holds 2^31 elements or more at the largest shapes that are to work."""
    calls = recorded_calls(90)
    largest_shapes()
    return sorted(
        {
            f"{call.kernel.__name__} {name}"
            for call in calls
            for name, arg in zip(call.kernel.arg_names, call.args, strict=False)
            if isinstance(arg, torch.Tensor) and arg.numel() >= 2**31
        }
    )


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def frames_of(
    num_frames: int,
    dtype: torch.dtype,
    rank: int,
    steps: bool = False,
    batch: int = BATCH,
    num_tokens: int = VOCABULARY,
) -> Frames:
    """rank: of the head, 0 for none; steps: with transitions."""
    return Frames(
        logits=empty(batch, num_frames, num_tokens, dtype=dtype),
        log_scale=empty(batch, num_frames),
        log_blank=empty(batch, num_frames),
        anchor=empty(batch, dtype=torch.int64),
        markov=(empty(num_tokens, rank, dtype=dtype),) * 2 if rank else None,
        transitions=empty(batch, 1 + num_frames, num_frames) if steps else None,
    )


def sampled_chain(frames: Frames, num_labels: int = 16) -> None:
    batch, num_frames, num_tokens = frames.logits.shape
    words = empty(batch, dtype=torch.int64)
    sampling = ChainSampling(empty(batch), words, words, words, empty(batch, num_labels, num_tokens))
    tokens = empty(batch, num_frames * SAMPLED_WIDTH, dtype=torch.int64)
    prefix_chain.prefix_chain_triton(tokens, frames, num_labels, sampling)


def transform(frames: Frames, num_nodes: int, width: int | None = None, chains: bool = True) -> None:
    budget = Budget(num_nodes, width or default_width(num_nodes), 8)
    ctc_transform.ctc_transform_triton(frames, budget, empty(len(frames.anchor), dtype=torch.bool) if chains else None)


def search(frames: Frames, num_nodes: int, width: int | None = None, chains: bool = False) -> None:
    budget = Budget(num_nodes, width or default_width(num_nodes), 8)
    chain_only = empty(len(frames.anchor), dtype=torch.bool) if chains else None
    prefix_search.prefix_search_triton(frames, budget, chain_only)


def verification(num_nodes: int, batch: int = BATCH) -> None:
    """What happens to a tree before and after the target's forward."""
    width = 1 + num_nodes
    table, words = empty(batch, width, dtype=torch.int32), empty(batch, width, dtype=torch.int64)
    rows = empty(128 * batch, dtype=torch.int64)
    requests, starts = empty(batch, dtype=torch.int32), empty(batch + 1, dtype=torch.int32)
    out_rows = TreeRows(starts, starts, rows)
    tree_layout.tree_layout_triton(rows, starts, starts, requests, table, words, rows, out_rows)
    tree_walk.tree_walk_triton(rows, rows, table, requests, starts)
    tree_walk.tree_walk_triton(rows, rows, table, requests, starts, empty(128 * batch, dtype=torch.bool))
    compaction(torch.bfloat16, width, batch)
    reordering(width, batch)


def merging(num_nodes: int, num_sources: int = 2, batch: int = BATCH) -> None:
    shape = batch, num_sources, 1 + num_nodes
    trees = empty(*shape, dtype=torch.int64), empty(*shape, dtype=torch.int32), empty(*shape)
    tree_merge.gpu.tree_merge_triton(*trees, empty(batch, num_sources), empty(batch, dtype=torch.bool))


def history(
    num_nodes: int,
    batch: int = BATCH,
    is_guess: bool = False,
    table: int = 0,
    growth: history_tree.Growth | None = None,
) -> None:
    """is_guess: of another text than the request's own; table: followers of the frozen table."""
    text, lengths = empty(batch, 32768, dtype=torch.int32), empty(batch, dtype=torch.int32)
    texts = history_tree.Texts(text, lengths, text, lengths, lengths if is_guess else None)
    words = empty(batch, dtype=torch.int64)
    frozen = empty(VOCABULARY, table, 3, dtype=torch.int32) if table else None
    history_tree.gpu.history_tree_triton(
        texts, words, words, empty(history_tree.CLASSES, history_tree.RANKS), num_nodes, num_nodes,
        empty(batch, dtype=torch.bool), frozen, growth or history_tree.USUAL_GROWTH,
    )  # fmt: skip


def compaction(dtype: torch.dtype, width: int, batch: int = BATCH) -> None:
    cache = empty(1024, 8, 16, 256, dtype=dtype)
    caches = kv_compaction.CachePointers([cache] * 32)
    of_requests = empty(batch, dtype=torch.int32)
    path = empty(batch, width, dtype=torch.int32)
    kv_compaction.compact_kv_triton(caches, empty(8192, dtype=torch.int64), of_requests, path, of_requests)


def reordering(width: int, batch: int) -> None:
    """Hidden states, as `TreeLayout.put_path_first` moves their rows: blocks of one entry."""
    states = empty(8192, 1, 1, 4096, dtype=torch.bfloat16)
    of_requests = empty(batch, dtype=torch.int32)
    path = empty(batch, width, dtype=torch.int32)
    caches = kv_compaction.CachePointers([states] * 5)
    kv_compaction.compact_kv_triton(caches, empty(8192, dtype=torch.int64), of_requests, path, of_requests)


def attention(
    head_size: int, dtype: torch.dtype, group: int, requests: int = BATCH, max_rows: int = 65, num_blocks: int = 1024
) -> None:
    keys, values = empty(num_blocks, 8, 16, 2 * head_size, dtype=dtype).transpose(1, 2).split(head_size, -1)
    query = empty(8192, 8 * group, head_size, dtype=dtype)
    blocks, of_requests = empty(requests, 512, dtype=torch.int32), empty(requests, dtype=torch.int32)
    rows = TreeRows(of_requests, of_requests, empty(8192, dtype=torch.int64))
    tree_attention.tree_attention_triton(
        query, keys, values, query, blocks, of_requests, rows, head_size**-0.5, max_rows
    )


def default_shapes() -> None:
    """12 frames, the trainer's default, and the 24 frames of learned transitions, 16-bit weights, a head of rank 64;
    chains of 8 labels, greedy and sampled; trees; attention of heads of 128 in groups of 4, for many requests, and for
    one, whose context is split."""
    collapse.collapse_triton(empty(BATCH, 12, dtype=torch.int64), VOCABULARY, empty(BATCH, dtype=torch.int64), 8)
    for num_frames, steps in ((12, False), (24, True)):
        frames = frames_of(num_frames, torch.bfloat16, 64, steps)
        sampled_chain(frames, num_labels=8)
        for num_nodes in TREE_NODES:
            search(frames, num_nodes, chains=True)
            search(frames_of(num_frames, torch.bfloat16, 64, steps, batch=1), num_nodes, chains=True)
    transform(frames_of(12, torch.bfloat16, 0), 16)
    for num_nodes in TREE_NODES:
        verification(num_nodes)
        merging(num_nodes)
        history(num_nodes)
    for max_rows in TREE_ROWS:
        for requests in (1, BATCH):
            attention(128, torch.bfloat16, group=4, requests=requests, max_rows=max_rows)


def largest_shapes() -> None:
    """1024 requests, 24 frames, chains of 24 labels and trees of 64 nodes over 256 000 tokens; more frames and
    candidates than that where they are of another kernel; 2M positions of the cache."""
    large = {"batch": LARGE_BATCH, "num_tokens": LARGE_VOCABULARY}
    collapse.collapse_triton(
        empty(LARGE_BATCH, 64, dtype=torch.int64), LARGE_VOCABULARY, empty(LARGE_BATCH, dtype=torch.int64), 64
    )
    sampled_chain(frames_of(24, torch.bfloat16, 256, steps=True, **large), num_labels=24)
    search(frames_of(64, torch.bfloat16, 256, steps=True, **large), 64, width=128, chains=True)
    transform(frames_of(64, torch.bfloat16, 0, batch=LARGE_BATCH), 64)
    verification(64, LARGE_BATCH)
    merging(64, 3, LARGE_BATCH)
    history(64, LARGE_BATCH, table=8)
    attention(128, torch.bfloat16, group=4, requests=LARGE_BATCH, num_blocks=2**17)
    attention(128, torch.bfloat16, group=4, requests=1, num_blocks=2**17)


def other_chains() -> None:
    collapse.collapse_triton(empty(BATCH, 32, dtype=torch.int64), VOCABULARY, empty(BATCH, dtype=torch.int64), 16)
    best_tokens.best_tokens_triton(empty(BATCH, 12, 40), 40)  # fewer tiles than candidates
    sampled_chain(frames_of(12, torch.bfloat16, 0))
    sampled_chain(frames_of(12, torch.float32, 64))
    sampled_chain(frames_of(32, torch.float16, 0))
    sampled_chain(frames_of(32, torch.float32, 256))
    sampled_chain(frames_of(1, torch.bfloat16, 5))
    sampled_chain(frames_of(12, torch.bfloat16, 0, steps=True))
    sampled_chain(frames_of(64, torch.float32, 0, steps=True))


def other_transforms() -> None:
    """The largest tree, one of no power of two, and the smallest one."""
    transform(frames_of(12, torch.bfloat16, 0), 64)
    transform(frames_of(12, torch.float16, 0), 33, width=9, chains=False)
    transform(frames_of(64, torch.float32, 0), 64)
    transform(frames_of(12, torch.bfloat16, 0), 1, width=5)
    transform(frames_of(1, torch.bfloat16, 0), 1, width=1, chains=False)


def other_searches() -> None:
    """Without a head, of other dtypes, the largest ones, and the smallest ones."""
    search(frames_of(12, torch.bfloat16, 0), 16)
    search(frames_of(12, torch.float32, 64), 16, chains=True)
    search(frames_of(12, torch.float32, 256), 64)
    search(frames_of(32, torch.float32, 256), 64)
    search(frames_of(64, torch.float32, 64), 64)
    search(frames_of(64, torch.float32, 64), 64, width=128)
    search(frames_of(1, torch.bfloat16, 5), 1)
    search(frames_of(12, torch.bfloat16, 0, steps=True), 16)
    search(frames_of(64, torch.float32, 64, steps=True), 64)
    search(frames_of(64, torch.bfloat16, 0, steps=True), 1)
    search(frames_of(1, torch.bfloat16, 5, steps=True), 1)


def other_trees() -> None:
    """Three sources; a guess, a table, the paper's growth; other sizes of heads and of elements."""
    merging(64, 3)
    merging(33, 1)
    history(31, is_guess=True)
    history(64, table=8)
    history(1, growth=history_tree.Growth(1, 3, scanned=8, nodes=64, by_match=False))
    for dtype in (torch.float8_e4m3fn, torch.float32):
        compaction(dtype, 65)
    for head_size in (64, 80, 192):
        attention(head_size, torch.bfloat16, group=4)
    attention(256, torch.bfloat16, group=4, requests=1, max_rows=17)
    attention(128, torch.float16, group=8, requests=1)
    attention(128, torch.float16, group=1, requests=1, max_rows=17)
    for head_size in (64, 128, 256):
        attention(head_size, torch.float32, group=4, requests=1)
