"""How many rows a GPU computes while it reads the target's weights: until then a further row of a step costs nothing.

A row takes 2 operations a weight, whatever the target's size, and a step reads each weight once: so the number follows
from the device and from how weights are stored. Small targets hide more rows behind their launches. Of a mixture of
experts a step of few rows reads only some experts, and rows cost from the first on: measure a plan for it.
"""

from collections.abc import Mapping
from typing import Any

OPERATIONS = {
    (7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 7): 1024, (8, 9): 1024, (9, 0): 4096,
    (10, 0): 8192, (10, 3): 8192, (12, 0): 1024, (12, 1): 1024,
}  # fmt: skip
"""Of 16-bit matrix products, dense, a multiprocessor and clock, by compute capability: NVIDIA's architecture white
papers, where two operations are one multiply-add."""
CORES = {(7, 0): 64, (7, 5): 64, (8, 0): 64}  # of a multiprocessor; 128 elsewhere
FLOAT32 = 1 / 16  # of those operations: float32 products without tensor cores, on devices for servers


def free_rows(target: Any) -> int | None:
    """target: vLLM's ModelConfig. None where the device cannot be asked: not NVIDIA's, or newer than OPERATIONS."""
    operations = operations_a_byte()
    if operations is None:
        return None
    quantization = getattr(target.hf_config, "quantization_config", None)
    bits = 8 * target.dtype.itemsize
    rows = operations * bits / 8 / 2 * (FLOAT32 if bits == 32 else 1)
    return max(1, int(rows * _weight_bits(quantization, bits) / bits))


def operations_a_byte() -> float | None:
    """Operations of 16-bit matrix products for each byte that the memory moves meanwhile, at the highest clocks. Asked
    of the driver by NVML: CUDA must not be initialised before vLLM starts its workers."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.utils.import_utils import import_pynvml

    nvml = import_pynvml()
    try:
        nvml.nvmlInit()
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(current_platform.device_id_to_physical_device_id(0))
            capability = tuple(nvml.nvmlDeviceGetCudaComputeCapability(device))
            multiprocessors = nvml.nvmlDeviceGetNumGpuCores(device) / CORES.get(capability, 128)
            clock = nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)
            memory_clock = nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_MEM)
            bus_bits = nvml.nvmlDeviceGetMemoryBusWidth(device)
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:  # a device without a driver that answers, such as Jetson's
        return None
    bytes_moved = 2 * memory_clock * bus_bits / 8  # on both edges of the clock
    if capability not in OPERATIONS or not bytes_moved:
        return None
    return multiprocessors * clock * OPERATIONS[capability] / bytes_moved


def _weight_bits(quantization: Any, bits: int) -> float:
    """Bits that are read of each weight, over the width by which products are slower than 16-bit ones.

    Where the activations are quantised too, products are faster by as much as weights are smaller, and nothing changes.
    """
    if not isinstance(quantization, Mapping):
        return bits
    groups = quantization.get("config_groups")  # compressed-tensors
    if isinstance(groups, Mapping) and groups:
        group = next(iter(groups.values()))
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        found = bits if activations else weights.get("num_bits")
    else:
        found = quantization.get("bits", quantization.get("w_bit"))  # GPTQ, AWQ; fp8 quantises activations too
    return found if isinstance(found, int) and 0 < found <= bits else bits
