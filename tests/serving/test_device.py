"""Rows that cost nothing, from what the driver says of a device; NVML's answers are those of real devices."""

from types import SimpleNamespace

import pytest
import torch
from vllm import platforms

from vllm_ctc_spec.serving import device
from vllm_ctc_spec.serving.options import TREE_ROWS, default_tree_rows

# Cores, clocks in MHz, bus in bits, as NVML gives them; then 16-bit TFLOPS and TB/s of the data sheets.
DEVICES = {
    "H200 SXM": ((9, 0), 16896, 1980, 3201, 6144, 989, 4.8),
    "H100 SXM": ((9, 0), 16896, 1980, 2619, 5120, 989, 3.35),
    "A100 80 GB": ((8, 0), 6912, 1410, 1593, 5120, 312, 2.04),
    "L40S": ((8, 9), 18176, 2520, 9001, 384, 362, 0.864),
    "L4": ((8, 9), 7424, 2040, 6251, 192, 121, 0.3),
}


class NVMLError(Exception):
    pass


@pytest.fixture
def on(monkeypatch):
    """on(name): a machine with that device."""

    def install(name: str, fails: bool = False) -> None:
        capability, cores, clock, memory_clock, bus, *_ = DEVICES.get(name, DEVICES["L4"])

        def init() -> None:
            if fails:
                raise NVMLError

        nvml = SimpleNamespace(
            NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, nvmlInit=init,
            nvmlShutdown=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: {3: "device"}[index],
            nvmlDeviceGetCudaComputeCapability=lambda _: capability if name in DEVICES else (99, 0),
            nvmlDeviceGetNumGpuCores=lambda _: cores, nvmlDeviceGetMemoryBusWidth=lambda _: bus,
            nvmlDeviceGetMaxClockInfo=lambda _, kind: {1: clock, 2: memory_clock}[kind],
        )  # fmt: skip
        platform = SimpleNamespace(
            is_cuda=lambda: True, is_cpu=lambda: False, device_id_to_physical_device_id=lambda index: {0: 3}[index]
        )
        monkeypatch.setattr(platforms, "_current_platform", platform)
        monkeypatch.setattr("vllm.utils.import_utils.import_pynvml", lambda: nvml)

    return install


def target(dtype: torch.dtype = torch.bfloat16, **quantization) -> SimpleNamespace:
    config = SimpleNamespace(quantization_config=quantization) if quantization else SimpleNamespace()
    return SimpleNamespace(dtype=dtype, hf_config=config, model="a/name")


@pytest.mark.parametrize("name", DEVICES)
def test_the_rows_are_those_of_the_data_sheet(name, on):
    on(name)
    *_, tflops, terabytes = DEVICES[name]
    assert device.free_rows(target()) == pytest.approx(tflops / terabytes, rel=0.1)
    assert default_tree_rows(target()) == (device.free_rows(target()), TREE_ROWS["cuda"][1])


@pytest.mark.parametrize(
    ("quantization", "share"),
    [
        ({"quant_method": "fp8"}, 1),
        ({"quant_method": "gptq", "bits": 4}, 1 / 4),
        ({"quant_method": "awq", "w_bit": 4}, 1 / 4),
        ({"quant_method": "gptq", "bits": 8}, 1 / 2),
        ({"config_groups": {"g": {"weights": {"num_bits": 4}, "input_activations": None}}}, 1 / 4),
        ({"config_groups": {"g": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, 1),
        ({"quant_method": "of tomorrow", "bits": "few"}, 1),
        ({"config_groups": {}}, 1),
    ],
)
def test_a_target_with_smaller_weights_and_16_bit_products_has_fewer(quantization, share, on):
    on("H100 SXM")
    assert device.free_rows(target(**quantization)) == pytest.approx(share * device.free_rows(target()), abs=1)


def test_float32_has_fewer(on):
    on("A100 80 GB")
    assert device.free_rows(target(torch.float32)) == pytest.approx(device.free_rows(target()) / 8, abs=1)


@pytest.mark.parametrize(("name", "fails"), [("a device of tomorrow", False), ("L4", True)])
def test_a_device_that_does_not_say_gets_the_default(name, fails, on):
    on(name, fails)
    assert device.free_rows(target()) is None
    assert default_tree_rows(target()) == TREE_ROWS["cuda"]
