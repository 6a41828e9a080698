"""Which of the target's attention layers can verify trees."""

from typing import Any

from vllm_ctc_spec.serving.limits import refused_with_trees

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")


def check_layer(name: str, layer: Any) -> None:
    """Refuse what only a loaded attention layer tells (DrafterConfigError)."""
    backend, implementation = layer.attn_backend.get_name(), layer.impl
    # A step of trees never calls the backend's own forward: keys and values must be in the cache without it.
    if backend not in BACKENDS or layer.attn_backend.forward_includes_kv_cache_update:
        raise refused_with_trees(f"the attention backend {backend} (use {' or '.join(BACKENDS)})")
    if layer.kv_cache_torch_dtype != layer.dtype:
        raise refused_with_trees(
            f"a KV cache of {layer.kv_cache_torch_dtype} under a model of {layer.dtype} (layer {name})"
        )
    if layer.sliding_window is not None:
        raise refused_with_trees(f"sliding windows (layer {name})")
    if layer.use_mm_prefix:
        raise refused_with_trees(f"bidirectional prefixes (layer {name})")
    for what, attribute in (
        ("attention sinks", "sinks"),
        ("attention soft caps", "logits_soft_cap"),
        ("ALiBi", "alibi_slopes"),
    ):
        value = getattr(implementation, attribute, None)
        if value is not None and (not isinstance(value, int | float) or value):
            raise refused_with_trees(f"{what} (layer {name})")
