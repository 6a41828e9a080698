"""Trees get an attention backend that can verify them, or one sentence before weights load."""

from pathlib import Path

import pytest
from vllm import platforms
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import attention_backend, limits

ASSETS = Path(__file__).parents[2] / "assets"


def configure(draft: str, dtype: str = "bfloat16", **options) -> VllmConfig:
    speculative = {"method": "ctc", "model": str(ASSETS / "drafter"), "ctc_draft": draft}
    return EngineArgs(
        str(ASSETS / "target"), dtype=dtype, max_model_len=512, speculative_config=speculative, **options
    ).create_engine_config()


def backend(config: VllmConfig) -> str | None:
    selected = config.attention_config.backend
    return None if selected is None else selected.name


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What a CPU alone refuses, such as trees in 16 bits, is not in the way."""
    monkeypatch.setattr(limits, "ON_CPU", ())


@pytest.fixture
def on_blackwell(monkeypatch):
    monkeypatch.setattr(attention_backend, "is_blackwell", lambda: True)


@pytest.mark.parametrize(
    ("draft", "dtype", "options", "selected"),
    [
        ("tree", "bfloat16", {}, "FLASH_ATTN"),
        ("tree", "float16", {"attention_backend": "auto"}, "FLASH_ATTN"),
        ("tree", "float32", {}, None),
        ("tree", "bfloat16", {"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN"),
        ("tree", "bfloat16", {"attention_config": {"backend": "TRITON_ATTN"}}, "TRITON_ATTN"),
        ("chain", "bfloat16", {}, None),
        ("chain", "bfloat16", {"attention_backend": "FLASHINFER"}, "FLASHINFER"),
    ],
    ids=str,
)
def test_trees_on_blackwell_select_flash_attention_where_no_backend_was_named(
    on_blackwell, draft, dtype, options, selected
):
    assert backend(configure(draft, dtype, **options)) == selected


def test_elsewhere_vllm_chooses():
    assert backend(configure("tree")) is None


def test_the_arguments_stay_as_they_were(on_blackwell):
    speculative = {"method": "ctc", "model": str(ASSETS / "drafter"), "ctc_draft": "tree"}
    arguments = EngineArgs(str(ASSETS / "target"), max_model_len=512, speculative_config=speculative)
    assert backend(arguments.create_engine_config()) == "FLASH_ATTN"
    assert arguments.attention_backend is None and arguments.attention_config.backend is None


@pytest.mark.parametrize(
    "named",
    [
        {"attention_backend": "FLASHINFER"},
        {"attention_config": {"backend": "FLASHINFER"}},
        {"attention_config": {"backend_per_kind": {"full_attention": "FLASHINFER"}}},
    ],
    ids=str,
)
def test_a_backend_that_trees_cannot_use_is_refused_before_weights_load(named):
    with pytest.raises(DrafterConfigError) as caught:
        configure("tree", **named)
    assert str(caught.value) == (
        "CTC draft trees do not work with the attention backend FLASHINFER (use FLASH_ATTN or TRITON_ATTN); "
        'draft chains ("ctc_draft": "chain") or change that option.'
    )


@pytest.mark.parametrize(
    ("vendor", "capability", "blackwell"),
    [
        (PlatformEnum.CUDA, (9, 0), False),
        (PlatformEnum.CUDA, (10, 0), True),
        (PlatformEnum.CUDA, (10, 3), True),
        (PlatformEnum.CUDA, (12, 0), False),
        (PlatformEnum.ROCM, (10, 3), False),
    ],
)
def test_blackwell(monkeypatch, vendor, capability, blackwell):
    class Gpu(Platform):
        _enum = vendor

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

    monkeypatch.setattr(platforms, "_current_platform", Gpu())
    assert attention_backend.is_blackwell() == blackwell
