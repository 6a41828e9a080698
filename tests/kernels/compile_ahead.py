"""Compile every kernel launch for Ampere, Hopper and Blackwell, without a GPU, and list what each needs.

    python tests/kernels/compile_ahead.py            # default shapes for all of them, other shapes for Hopper
    python tests/kernels/compile_ahead.py --all      # everything for all of them
    python tests/kernels/compile_ahead.py --write    # the same, to benchmarks/results/ptx_resources.json and .md

test_compiles_ahead.py runs it, in a process without TRITON_INTERPRET, and holds the record to what it finds.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from launches import Launch, arguments_beyond_int32, launched_kernels, record_launches
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import mangle_type

# Bytes of shared memory that a block may use; too much is no error at compile time.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
HOPPER = 90
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
RECORD = Path(__file__).resolve().parents[2] / "benchmarks/results/ptx_resources"
COMMAND = "python tests/kernels/compile_ahead.py --write"


def compiled(launch: Launch, architecture: int) -> tuple[CompiledKernel, dict, dict]:
    """The kernel, its signature, and its constants by the places of its parameters."""
    kernel, values = launch.kernel, launch.values
    compiler_options = {name: values[name] for name in ("num_warps", "num_stages") if name in values}
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
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options=compiler_options), signature, constants


def compile_launch(launch: Launch, architecture: int) -> dict:
    binary, signature, constants = compiled(launch, architecture)
    registers, spilled = register_use(binary.asm["cubin"])
    constexprs = {launch.kernel.arg_names[place]: value for (place,), value in constants.items()}
    return {
        "kernel": launch.kernel.__name__,
        "architecture": architecture,
        "default": launch.is_default,
        "element": next(name for name in signature.values() if name.startswith("*")).removeprefix("*"),
        "constexprs": {name: value for name, value in constexprs.items() if value is not None},
        "without": [name.removesuffix("_ptr") for name, value in constexprs.items() if value is None],
        "num_warps": launch.options["num_warps"],
        "registers": registers,
        "shared": binary.metadata.shared,
        "spilled": spilled,
    }


def register_use(cubin: bytes) -> tuple[int, int] | tuple[None, None]:
    """Registers of a thread, and bytes of its local memory: registers that were spilled, or arrays that did not fit.
    None where the build of triton has no cuobjdump."""
    if not CUOBJDUMP.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def compile_launches(everything: bool) -> list[dict]:
    """In forked processes, because a kernel and meta tensors cannot be sent to one."""
    work = [
        (launch, architecture)
        for architecture in SHARED_MEMORY
        for launch in record_launches(architecture)
        if everything or launch.is_default or architecture == HOPPER
    ]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), _inherit, (work,)) as pool:
        return pool.map(_compile_number, range(len(work)), chunksize=1)


def _inherit(work: list[tuple[Launch, int]]) -> None:
    global _work
    _work = work


def _compile_number(number: int) -> dict:
    return compile_launch(*_work[number])


def to_markdown(record: dict) -> str:
    lines = [
        "Registers of a thread / bytes of shared memory of a block / bytes of spilled registers of a thread, of every "
        f"kernel launch, compiled ahead of time. Triton {record['triton']}; regenerate with `{record['command']}`. A "
        "launch without a number is not made on that architecture: its tiles are others there.",
    ]
    for is_default, title in ((True, "Default shapes"), (False, "Other shapes")):
        lines += ["", f"**{title}**", ""]
        lines.append("| kernel | shape | warps | " + " | ".join(f"sm_{name}" for name in SHARED_MEMORY) + " |")
        lines.append("|---|---|---|" + "---|" * len(SHARED_MEMORY))
        rows: dict[tuple, dict[int, str]] = {}
        for entry in record["launches"]:
            if entry["default"] is is_default:
                shape = ", ".join(f"{name} {value}" for name, value in entry["constexprs"].items())
                absent = f", no {', '.join(entry['without'])}" if entry["without"] else ""
                row = (f"`{entry['kernel']}`", f"{entry['element']}, {shape}{absent}", str(entry["num_warps"]))
                cell = f"{entry['registers']} / {entry['shared']} / {entry['spilled']}"
                rows.setdefault(row, {})[entry["architecture"]] = cell
        for row, cells in sorted(rows.items()):
            lines.append("| " + " | ".join([*row, *(cells.get(name, "") for name in SHARED_MEMORY)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="other shapes for all architectures, not for Hopper only")
    parser.add_argument("--write", action="store_true", help="all of it, and write the record")
    args = parser.parse_args()
    launches = compile_launches(args.all or args.write)
    record = {
        "command": COMMAND,
        "triton": triton.__version__,
        "kernels": sorted(launched_kernels()),
        "shared_memory": SHARED_MEMORY,
        "beyond_int32": arguments_beyond_int32(),
        "launches": launches,
    }
    if args.write:
        RECORD.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        RECORD.with_suffix(".md").write_text(to_markdown(record), encoding="utf-8")
    else:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
