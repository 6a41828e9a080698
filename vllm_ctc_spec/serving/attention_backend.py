"""The attention backend of a target that verifies trees, as far as the configuration tells."""

import logging

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_ctc_spec.serving.tree.layers import BACKENDS

logger = logging.getLogger("vllm.ctc_spec")


def named_without_trees(config: VllmConfig) -> str | None:
    """The backend that was named (`--attention-backend`, `--attention-config`) and cannot verify trees."""
    attention = config.attention_config
    named = (attention.backend, *attention.backend_per_kind.values())
    return next((backend.name for backend in named if backend is not None and backend.name not in BACKENDS), None)


def select_for_trees(config: VllmConfig) -> None:
    """FLASH_ATTN on Blackwell, where vLLM's own choice for a causal target is FLASHINFER
    (vllm/platforms/cuda.py:_get_backend_priorities). For fp32, which neither has, vLLM takes TRITON_ATTN by itself."""
    attention = config.attention_config
    if attention.backend is None and config.model_config.dtype != torch.float32 and is_blackwell():
        attention.backend = AttentionBackendEnum.FLASH_ATTN
        logger.info("CTC draft trees are verified with the attention backend FLASH_ATTN in place of FLASHINFER.")


def is_blackwell() -> bool:
    """Compute capability 10.x. The one of the first GPU; CUDA is not initialised for it."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and current_platform.is_device_capability_family(100)
