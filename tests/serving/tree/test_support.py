"""What trees cannot do is said in one sentence that names it and the way out."""

from types import SimpleNamespace

import pytest
import torch

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving.tree.support import check_engine, check_layer


def configuration(**changes) -> SimpleNamespace:
    """A configuration that trees can serve, with `part__field=value` changed."""
    parts = {
        "parallel_config": dict(
            prefill_context_parallel_size=1, decode_context_parallel_size=1, use_ubatching=False,
            enable_batch_sharded_sampling=None,
        ),
        "model_config": dict(
            logits_processors=None, return_sampling_mask=False, enable_trace_replay=False, use_mla=False,
            is_hybrid=False, is_attention_free=False, is_encoder_decoder=False, is_diffusion=False, uses_mrope=False,
            uses_alibi=False, hf_text_config=SimpleNamespace(),
        ),
        "cache_config": dict(cache_dtype="auto", kv_sharing_fast_prefill=False),
        "speculative_config": dict(draft_sample_method="greedy", rejection_sample_method="standard"),
        "aux_output_config": dict(enabled=False),
    }  # fmt: skip
    whole = {"kv_transfer_config": None}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
        else:
            whole[part] = value
    return SimpleNamespace(**{name: SimpleNamespace(**fields) for name, fields in parts.items()}, **whole)


OTHER_RANKS = "other ranks do not learn the accepted path"
NO_SEQUENCE = "a tree's rows are no sequence"
TOO_EARLY = "rows are read before the accepted path is known"
HISTORY = "rows are judged by the rows before them"
WINDOW = "windows and biases count rows, not depths"


def case(change: dict, what: str, why: str):
    return pytest.param(change, what, id=str(change), marks=pytest.mark.feature(what, tree=f"refused: {why}"))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        case({"parallel_config__decode_context_parallel_size": 2}, "context parallelism", OTHER_RANKS),
        case({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism", OTHER_RANKS),
        case({"parallel_config__use_ubatching": True}, "microbatches", "a step has one layout of trees"),
        case({"parallel_config__enable_batch_sharded_sampling": True}, "batch-sharded sampling", OTHER_RANKS),
        case({"kv_transfer_config": "some"}, "KV connectors", TOO_EARLY),
        case({"aux_output_config__enabled": True}, "auxiliary outputs", NO_SEQUENCE),
        case({"model_config__logits_processors": ["a.b"]}, "custom logits processors", HISTORY),
        case({"model_config__return_sampling_mask": True}, "sampling masks", NO_SEQUENCE),
        case({"model_config__enable_trace_replay": True}, "trace replay", NO_SEQUENCE),
        case({"cache_config__cache_dtype": "fp8"}, "quantised KV cache", "tree attention reads the model's dtype"),
        case({"cache_config__kv_sharing_fast_prefill": True}, "KV-sharing fast prefill", TOO_EARLY),
        case({"model_config__use_mla": True}, "MLA targets", "their attention has no tree kernel"),
        case({"model_config__is_hybrid": True}, "hybrid and recurrent targets", NO_SEQUENCE),
        case({"model_config__is_attention_free": True}, "hybrid and recurrent targets", NO_SEQUENCE),
        case({"model_config__is_encoder_decoder": True}, "encoder-decoder targets", NO_SEQUENCE),
        case({"model_config__is_diffusion": True}, "diffusion targets", NO_SEQUENCE),
        case({"model_config__uses_mrope": True}, "targets with multimodal rotary positions", NO_SEQUENCE),
        case({"model_config__uses_alibi": True}, "targets with ALiBi", WINDOW),
        case({"model_config__hf_text_config": SimpleNamespace(sliding_window=512)}, "sliding-window targets", WINDOW),
        case(
            {"model_config__hf_text_config": SimpleNamespace(attention_chunk_size=512)},
            "sliding-window targets",
            WINDOW,
        ),
        case(
            {"model_config__hf_text_config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"])},
            "sliding-window targets",
            WINDOW,
        ),
        ({"speculative_config__draft_sample_method": "probabilistic"}, "sampled drafts"),
        ({"speculative_config__rejection_sample_method": "block"}, "rejection_sample_method"),
    ],
    ids=str,
)
def test_an_engine_that_trees_cannot_serve(change, what):
    with pytest.raises(DrafterConfigError, match=f"trees do not work with .*{what}.*draft chains"):
        check_engine(configuration(**change))


@pytest.mark.feature("batch invariance", tree="refused: tree kernels are not batch-invariant")
def test_batch_invariance(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(DrafterConfigError, match="trees do not work with batch invariance"):
        check_engine(configuration())


def test_an_engine_that_trees_can_serve():
    check_engine(configuration())
    unused = SimpleNamespace(sliding_window=512, use_sliding_window=False, layer_types=["full_attention"] * 4)
    check_engine(configuration(model_config__hf_text_config=unused))


def layer(
    backend: str = "FLASH_ATTN", writes_in_forward: bool = False, cache: torch.dtype = torch.bfloat16,
    window: int | None = None, mm_prefix: bool = False, **implementation,
) -> SimpleNamespace:  # fmt: skip
    fields = {"sinks": None, "alibi_slopes": None, "logits_soft_cap": 0, **implementation}
    attn_backend = SimpleNamespace(get_name=lambda: backend, forward_includes_kv_cache_update=writes_in_forward)
    return SimpleNamespace(
        attn_backend=attn_backend, impl=SimpleNamespace(**fields), dtype=torch.bfloat16, kv_cache_torch_dtype=cache,
        sliding_window=window, use_mm_prefix=mm_prefix,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("unfit", "what"),
    [
        pytest.param(
            layer("FLASHINFER"),
            "the attention backend FLASHINFER",
            marks=pytest.mark.feature(
                "attention backends other than FLASH_ATTN, TRITON_ATTN and CPU_ATTN", tree="refused: no tree kernel"
            ),
        ),
        (layer(writes_in_forward=True), "the attention backend FLASH_ATTN"),
        (layer(cache=torch.uint8), "a KV cache of torch.uint8 under a model of torch.bfloat16"),
        (layer(window=512), "sliding windows"),
        (layer(mm_prefix=True), "bidirectional prefixes"),
        pytest.param(
            layer(sinks=object()),
            "attention sinks",
            marks=pytest.mark.feature("targets with attention sinks", tree="refused: the tree kernel has none"),
        ),
        pytest.param(
            layer(logits_soft_cap=30.0),
            "attention soft caps",
            marks=pytest.mark.feature("targets with attention soft caps", tree="refused: the tree kernel has none"),
        ),
        (layer(alibi_slopes=[0.5]), "ALiBi"),
    ],
    ids=["backend", "cache update", "cache dtype", "window", "prefix", "sinks", "soft cap", "ALiBi"],
)
def test_a_layer_that_trees_cannot_use(unfit, what):
    with pytest.raises(DrafterConfigError, match=f"trees do not work with {what}"):
        check_layer("model.layers.0", unfit)


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN", "CPU_ATTN"])
def test_a_layer_that_trees_can_use(backend):
    check_layer("model.layers.0", layer(backend))
