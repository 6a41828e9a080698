"""What draft trees cannot do yet: one sentence each, at startup."""

from collections.abc import Callable
from typing import Any

from vllm import envs
from vllm.config import VllmConfig

from vllm_ctc_spec.errors import DrafterConfigError

# A row's condition on vLLM's configuration, and what has it. Trees need rows that are no sequence to be harmless
# between forward and sampling: recurrent state, layer-wise saves and other ranks' bookkeeping see them too early.
REFUSED: tuple[tuple[str, Callable[[VllmConfig], Any]], ...] = (
    ("context parallelism", lambda c: c.parallel_config.prefill_context_parallel_size > 1
        or c.parallel_config.decode_context_parallel_size > 1),
    ("microbatches (--enable-dbo)", lambda c: c.parallel_config.use_ubatching),
    ("batch-sharded sampling", lambda c: c.parallel_config.enable_batch_sharded_sampling),
    ("KV connectors", lambda c: c.kv_transfer_config is not None),
    ("auxiliary outputs", lambda c: c.aux_output_config.enabled),
    ("custom logits processors", lambda c: c.model_config.logits_processors),
    ("sampling masks (--return-sampling-mask)", lambda c: c.model_config.return_sampling_mask),
    ("trace replay", lambda c: c.model_config.enable_trace_replay),
    ("a quantised KV cache", lambda c: c.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32")),
    ("KV-sharing fast prefill", lambda c: c.cache_config.kv_sharing_fast_prefill),
    ("MLA targets", lambda c: c.model_config.use_mla),
    ("hybrid and recurrent targets", lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free),
    ("encoder-decoder targets", lambda c: c.model_config.is_encoder_decoder),
    ("diffusion targets", lambda c: c.model_config.is_diffusion),
    ("targets with multimodal rotary positions", lambda c: c.model_config.uses_mrope),
    ("sliding-window targets", lambda c: _has_window(c.model_config.hf_text_config)),
    ("targets with ALiBi", lambda c: c.model_config.uses_alibi),
    ("batch invariance (VLLM_BATCH_INVARIANT)", lambda c: envs.VLLM_BATCH_INVARIANT),
    ("sampled drafts (draft_sample_method 'probabilistic')",
        lambda c: c.speculative_config.draft_sample_method == "probabilistic"),
    ("rejection_sample_method other than 'standard'",
        lambda c: c.speculative_config.rejection_sample_method != "standard"),
)  # fmt: skip


def check_engine(config: VllmConfig) -> None:
    """Refuse a configuration that trees cannot serve (DrafterConfigError)."""
    for name, holds in REFUSED:
        if holds(config):
            raise refused(name)


def check_layer(name: str, layer: Any) -> None:
    """Refuse what only a loaded attention layer tells (DrafterConfigError)."""
    backend, implementation = layer.attn_backend.get_name(), layer.impl
    # A step of trees never calls the backend's own forward: keys and values must be in the cache without it.
    if backend not in BACKENDS or layer.attn_backend.forward_includes_kv_cache_update:
        raise refused(f"the attention backend {backend} (use {' or '.join(BACKENDS)})")
    if layer.kv_cache_torch_dtype != layer.dtype:
        raise refused(f"a KV cache of {layer.kv_cache_torch_dtype} under a model of {layer.dtype} (layer {name})")
    if layer.sliding_window is not None:
        raise refused(f"sliding windows (layer {name})")
    if layer.use_mm_prefix:
        raise refused(f"bidirectional prefixes (layer {name})")
    for what, attribute in (
        ("attention sinks", "sinks"),
        ("attention soft caps", "logits_soft_cap"),
        ("ALiBi", "alibi_slopes"),
    ):
        value = getattr(implementation, attribute, None)
        if value is not None and (not isinstance(value, int | float) or value):
            raise refused(f"{what} (layer {name})")


BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN")


def _has_window(text_config: Any) -> bool:
    """Any layer that sees less than its whole context."""
    kinds = getattr(text_config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds) or bool(
        getattr(text_config, "attention_chunk_size", None)
        or (getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True))
    )


def refused(what: str) -> DrafterConfigError:
    return DrafterConfigError(
        f'CTC draft trees do not work with {what}; draft chains ("ctc_draft": "chain") or change that option.'
    )
