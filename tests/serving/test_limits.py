"""What trees cannot do, and what a CPU lacks, is said in one sentence that names it and the way out. What no draft can
do is refused in tests/engine/test_bad_input.py: the sentences name what vLLM makes of real options."""

from types import SimpleNamespace

import pytest
import torch

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import limits


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """What these tests make up is judged by the tables of trees and CPUs alone."""
    monkeypatch.setattr(limits, "ALWAYS", ())
    monkeypatch.setattr(limits, "WITH_DRAFTER", ())
    monkeypatch.setattr(limits.cpu, "is_needed", lambda: False)


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(limits.cpu, "is_needed", lambda: True)


def configuration(draft: str = "tree", **changes) -> SimpleNamespace:
    """A configuration that every table lets pass, with `part__field=value` changed."""
    hf_config = SimpleNamespace(ctc_options=SimpleNamespace(draft=draft, source_names=("ctc",)))
    parts = {
        "parallel_config": dict(
            prefill_context_parallel_size=1, decode_context_parallel_size=1, use_ubatching=False,
            enable_batch_sharded_sampling=None,
        ),
        "model_config": dict(
            logits_processors=None, return_sampling_mask=False, enable_trace_replay=False, use_mla=False,
            is_hybrid=False, is_attention_free=False, is_encoder_decoder=False, is_diffusion=False, uses_mrope=False,
            uses_alibi=False, hf_text_config=SimpleNamespace(), dtype=torch.float32,
        ),
        "cache_config": dict(cache_dtype="auto", kv_sharing_fast_prefill=False),
        "speculative_config": dict(
            draft_sample_method="greedy", rejection_sample_method="standard",
            draft_model_config=SimpleNamespace(hf_config=hf_config),
        ),
        "aux_output_config": dict(enabled=False),
        "attention_config": dict(backend=None, backend_per_kind={}),
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
        limits.check(configuration(**change))
    limits.check(configuration("chain", **change))


@pytest.mark.feature("batch invariance", tree="refused: tree kernels are not batch-invariant")
def test_batch_invariance(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(DrafterConfigError, match="trees do not work with batch invariance"):
        limits.check(configuration())


def test_an_engine_that_trees_can_serve():
    limits.check(configuration())
    unused = SimpleNamespace(sliding_window=512, use_sliding_window=False, layer_types=["full_attention"] * 4)
    limits.check(configuration(model_config__hf_text_config=unused))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"model_config__use_mla": True}, "MLA targets"),
        ({"model_config__is_hybrid": True}, "hybrid and recurrent targets"),
        ({"model_config__is_attention_free": True}, "hybrid and recurrent targets"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"model_config__return_sampling_mask": True}, "sampling masks"),
        ({"model_config__enable_trace_replay": True}, "trace replay"),
    ],
    ids=str,
)
def test_an_engine_that_a_cpu_cannot_serve(change, what, on_a_cpu):
    limits.check(configuration("chain"))
    with pytest.raises(DrafterConfigError, match=f"On a CPU, the CTC drafter does not work with {what}"):
        limits.check(configuration("chain", **change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trees_of_two_bytes_on_a_cpu(dtype, on_a_cpu):
    limits.check(configuration("tree"))
    limits.check(configuration("chain", model_config__dtype=dtype))
    says = f"On a CPU, .* draft trees in {str(dtype).removeprefix('torch.')} .use --dtype float32, or chains.;"
    with pytest.raises(DrafterConfigError, match=says):
        limits.check(configuration("tree", model_config__dtype=dtype))


@pytest.mark.parametrize("draft", ["chain", "tree"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"enable_adaptive_verification": True}, "does not support enable_adaptive_verification; remove it"),
        ({"use_heterogeneous_vocab": True}, "does not support use_heterogeneous_vocab; remove it"),
        ({"rejection_sample_method": "synthetic"}, "'synthetic' accepts drafts by chance, .* remove it"),
    ],
    ids=str,
)
def test_options_of_vllm_that_no_draft_may_have(options, says, draft):
    limits.check_options({"rejection_sample_method": "standard", "use_heterogeneous_vocab": False}, draft)
    with pytest.raises(DrafterConfigError, match=says):
        limits.check_options(options, draft)


@pytest.mark.parametrize(("version", "draft", "is_refused"), [
    ("0.32.0", "chain", True), ("0.33.0", "chain", False), ("0.32.0", "tree", False),
])  # fmt: skip
def test_block_verification_of_chains_before_vllm_0_33(monkeypatch, version, draft, is_refused):
    monkeypatch.setattr("vllm.__version__", version)
    if not is_refused:
        limits.check_options({"rejection_sample_method": "block"}, draft)
        return
    with pytest.raises(DrafterConfigError, match='draws the same random numbers.*"standard", or vLLM 0.33'):
        limits.check_options({"rejection_sample_method": "block"}, draft)
