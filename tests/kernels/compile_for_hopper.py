"""Compile every kernel launch of every public function for sm_90, without a GPU, and print what each needs as JSON.

The functions are called on meta tensors with their kernels replaced by recorders, so that what is compiled is exactly
what would be launched. Run by test_compiles_for_hopper.py in a process without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type
from vllm_ctc_spec.kernels import (
    collapse,
    ctc_transform,
    frame_stats,
    kv_compaction,
    prefix_chain,
    prefix_search_best_first,
    tree_attention,
    tree_layout,
    tree_mask,
    tree_walk,
)

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
VOCABULARY = 151_936


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: triton.JITFunction, launches: list) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def record_launches() -> list:
    launches = []
    modules = (
        collapse, ctc_transform, frame_stats, kv_compaction, prefix_chain, prefix_search_best_first, tree_attention,
        tree_layout, tree_mask, tree_walk,
    )  # fmt: skip
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                setattr(module, name, Recorder(value, launches))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def chain(
        num_frames: int, dtype: torch.dtype, rank: int, sampled: bool, steps: bool = False, num_labels: int = 16
    ) -> None:
        batch = 64
        markov = (empty(VOCABULARY, rank, dtype=dtype), empty(VOCABULARY, rank, dtype=dtype)) if rank else None
        slots = empty(batch, dtype=torch.int64)
        draft_logits = empty(batch, num_labels, VOCABULARY)
        sampling = prefix_chain.ChainSampling(empty(batch), slots, slots, slots, draft_logits) if sampled else None
        frames = empty(batch, num_frames)
        logits = empty(batch, num_frames, VOCABULARY, dtype=dtype)
        transitions = empty(batch, 1 + num_frames, num_frames) if steps else None
        prefix_chain.prefix_chain_triton(logits, frames, frames, slots, num_labels, markov, sampling, transitions)

    collapse.collapse_triton(empty(64, 32, dtype=torch.int64), VOCABULARY, empty(64, dtype=torch.int64), 16)
    frame_stats.frame_stats_triton(empty(64, 12, VOCABULARY, dtype=torch.bfloat16))
    frame_stats.frame_stats_triton(empty(64, 12, VOCABULARY))
    chain(12, torch.bfloat16, rank=0, sampled=False)
    chain(12, torch.bfloat16, rank=64, sampled=True)
    chain(12, torch.float32, rank=64, sampled=False)
    chain(32, torch.float16, rank=0, sampled=True)
    chain(32, torch.float32, rank=256, sampled=True)
    chain(1, torch.bfloat16, rank=5, sampled=True)
    chain(12, torch.bfloat16, rank=0, sampled=False, steps=True)
    chain(12, torch.bfloat16, rank=64, sampled=True, steps=True)
    chain(64, torch.float32, rank=0, sampled=True, steps=True)
    chain(1, torch.float16, rank=0, sampled=False, steps=True)
    transforms(empty)
    searches(empty)
    trees(empty)
    return launches


def transforms(empty: Callable[..., torch.Tensor], batch: int = 64) -> None:
    """The usual tree, one of no power of two, the largest one, and the smallest one."""

    def transform(num_frames: int, num_nodes: int, width: int, dtype: torch.dtype, chains: bool) -> None:
        logits, frames = empty(batch, num_frames, VOCABULARY, dtype=dtype), empty(batch, num_frames)
        chain_only = empty(batch, dtype=torch.bool) if chains else None
        anchor = empty(batch, dtype=torch.int64)
        ctc_transform.ctc_transform_triton(logits, frames, frames, anchor, num_nodes, width, 8, chain_only)

    transform(12, 16, 10, torch.bfloat16, chains=True)
    transform(12, 33, 9, torch.float16, chains=False)
    transform(64, 64, 64, torch.float32, chains=True)
    transform(1, 1, 1, torch.bfloat16, chains=False)


def searches(empty: Callable[..., torch.Tensor], batch: int = 64) -> None:
    """The usual trees, the largest ones, and the smallest one."""

    def search(
        num_frames: int, num_nodes: int, dtype: torch.dtype, rank: int, chains: bool = False, steps: bool = False
    ) -> None:
        logits, frames = empty(batch, num_frames, VOCABULARY, dtype=dtype), empty(batch, num_frames)
        markov = (empty(VOCABULARY, rank, dtype=dtype),) * 2 if rank else None
        chain_only = empty(batch, dtype=torch.bool) if chains else None
        anchor = empty(batch, dtype=torch.int64)
        transitions = empty(batch, 1 + num_frames, num_frames) if steps else None
        prefix_search_best_first.prefix_search_triton(
            logits, frames, frames, anchor, num_nodes, num_nodes, 8, markov, chain_only, transitions
        )

    search(12, 16, torch.bfloat16, rank=0)
    search(12, 16, torch.float32, rank=64, chains=True)
    search(12, 64, torch.bfloat16, rank=64, chains=True)
    search(12, 64, torch.float32, rank=256)
    search(32, 64, torch.float32, rank=256)
    search(64, 64, torch.float32, rank=64)
    search(1, 1, torch.bfloat16, rank=5)
    search(12, 16, torch.bfloat16, rank=0, steps=True)
    search(12, 64, torch.bfloat16, rank=64, chains=True, steps=True)
    search(64, 64, torch.float32, rank=64, steps=True)
    search(64, 1, torch.bfloat16, rank=0, steps=True)
    search(1, 1, torch.bfloat16, rank=5, steps=True)


def trees(empty: Callable[..., torch.Tensor], batch: int = 64, width: int = 65, num_layers: int = 32) -> None:
    """What happens to a tree in the target's forward and after it, for the usual sizes of models."""
    table, per_request = empty(batch, width, dtype=torch.int32), empty(batch + 1, dtype=torch.int32)
    rows, words = empty(8192, dtype=torch.int64), empty(batch, width, dtype=torch.int64)
    slots = empty(batch, dtype=torch.int32)
    tree_layout.tree_layout_triton(
        rows, per_request, per_request, slots, table, words, rows, rows, per_request, per_request
    )
    tree_walk.tree_walk_triton(rows, rows, table, slots, per_request)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        caches = kv_compaction.CachePointers([empty(1024, 8, 16, 256, dtype=dtype)] * num_layers)
        kv_compaction.compact_kv_triton(caches, rows, per_request, table, slots)

    def attention(head_size: int, dtype: torch.dtype, group: int, requests: int = batch, max_rows: int = width):
        keys, values = empty(1024, 8, 16, 2 * head_size, dtype=dtype).transpose(1, 2).split(head_size, -1)
        query = empty(8192, 8 * group, head_size, dtype=dtype)
        blocks = empty(requests, 512, dtype=torch.int32)
        tree_attention.tree_attention_triton(
            query, keys, values, query, blocks, slots, slots, slots, rows, head_size**-0.5, max_rows
        )

    for head_size in (64, 80, 128, 192):
        attention(head_size, torch.bfloat16, group=4)
    attention(256, torch.bfloat16, group=4, requests=1, max_rows=17)
    attention(128, torch.float16, group=8, requests=1)
    attention(128, torch.float16, group=1, requests=1, max_rows=17)
    for head_size in (64, 128, 256):
        attention(head_size, torch.float32, group=4, requests=1)


def compile_launch(kernel: triton.JITFunction, args: tuple, kwargs: dict) -> dict:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        aligned = isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize)
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=HOPPER, options=options)
    constexprs = {kernel.arg_names[place]: value for (place,), value in constants.items() if value is not None}
    return {
        "kernel": kernel.__name__,
        "constexprs": constexprs,
        "shared": compiled.metadata.shared,
        "stack": stack_bytes(compiled.asm["cubin"]) if CUOBJDUMP.exists() else None,
    }


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory per thread: registers that were spilled, or arrays that did not fit."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1))


def main() -> None:
    distinct = {}
    for kernel, args, kwargs in record_launches():
        dtypes = tuple(arg.dtype if isinstance(arg, torch.Tensor) else None for arg in args)
        distinct[kernel.__name__, dtypes, tuple(kwargs.items())] = kernel, args, kwargs
    print(json.dumps([compile_launch(*launch) for launch in distinct.values()]))


if __name__ == "__main__":
    main()
