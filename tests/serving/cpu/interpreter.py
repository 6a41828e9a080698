"""A process that runs functions of vLLM twice: with its Triton kernels under Triton's interpreter, and with ours.

The interpreter has to be chosen before `triton` is imported, and importing vLLM imports it; so this runs beside pytest
and answers calls over a pipe. vLLM binds placeholders for `triton` and `tl` on a CPU, and its decorators leave plain
functions: `interpreted` rebuilds each kernel with the real modules in its globals.
"""

import copy
import os
import pickle
import sys
import traceback
from types import FunctionType, SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
import vllm.v1.worker.cpu.shm  # noqa: F401  (must precede vllm.v1.worker.gpu)
from triton.runtime.interpreter import InterpreterBuilder
from vllm.triton_utils.dispatcher import KernelOverride

from vllm_ctc_spec.serving.cpu import table

# libdevice has no CPU version.
DEVICE = SimpleNamespace(isnan=lambda x: x != x, log1p=lambda x: tl.log(1.0 + x))
REAL_MODULES = {"triton": triton, "tl": tl, "tldevice": DEVICE, "libdevice": DEVICE}


for name in ("create_masked_load", "create_masked_store"):
    original = getattr(InterpreterBuilder, name)

    def with_bool_mask(self, *args, _original=original, _mask=1 if "load" in name else 2):
        """The interpreter refuses the integer masks that `mask & (index >= 0)` of a scalar gives; a GPU takes them."""
        args[_mask].data = args[_mask].data.astype(bool)
        return _original(self, *args)

    setattr(InterpreterBuilder, name, with_bool_mask)


def functions_called(function):
    called = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {n: f for n, f in called.items() if isinstance(f, FunctionType) and f.__module__.startswith(table.PACKAGE)}


def rebound(function, replaced):
    """A copy of `function` that sees `replaced` among its globals."""
    copied = FunctionType(function.__code__, {**function.__globals__, **replaced}, function.__name__)
    copied.__defaults__, copied.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    copied.__annotations__, copied.__module__ = function.__annotations__, function.__module__
    return copied


def interpreted(kernel):
    helpers = {name: interpreted(helper) for name, helper in functions_called(kernel).items()}
    return triton.jit(rebound(kernel, REAL_MODULES | helpers))


def overridden(kernel):
    function, _ = table.by_kernel_name()[f"{kernel.__module__}.{kernel.__name__}"]
    return KernelOverride(kernel, table.launcher(kernel, function))


def with_kernels(function, replace):
    """`function`, a kernel or a host function of vLLM, with `replace(kernel)` for every kernel that it launches."""
    if function.__name__.endswith("_kernel"):
        return replace(function)
    called = functions_called(function)
    replaced = {name: with_kernels(called_function, replace) for name, called_function in called.items()}
    return rebound(function, {"triton": triton} | replaced)


def addresses(argument):
    """A list of tensors stands for the table of their addresses."""
    if isinstance(argument, list):
        return torch.tensor([tensor.data_ptr() for tensor in argument], dtype=torch.uint64)
    return argument


def run(name, replace, grid, args, kwargs):
    """Result of the call, and its arguments after it."""
    module, _, attribute = f"{table.PACKAGE}.{name}".rpartition(".")
    function = with_kernels(getattr(sys.modules.get(module) or __import__(module, fromlist=["_"]), attribute), replace)
    args, kwargs = copy.deepcopy((args, kwargs))
    call = function if grid is None else function[grid]
    result = call(*map(addresses, args), **{key: addresses(value) for key, value in kwargs.items()})
    # Named tuples of vLLM would need vLLM on the other side to unpickle.
    return list(result) if isinstance(result, tuple) else result, args, kwargs


def main() -> None:
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # vLLM prints; the pipe is for answers
    while True:
        try:
            name, grid, args, kwargs = pickle.load(requests)
        except EOFError:
            os._exit(0)  # vLLM's exit handlers take seconds and have nothing to clean up
        try:
            answer = [run(name, replace, grid, args, kwargs) for replace in (interpreted, overridden)]
        except Exception as error:  # any failure of either side is the caller's to see
            answer = RuntimeError(f"{name}: {error!r}\n{traceback.format_exc()}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
