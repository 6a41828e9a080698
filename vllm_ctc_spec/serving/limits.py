"""Everything that is refused, in four tables. A row is a feature, or a sentence where it needs its own, and the test
that finds it. The rows are judged in their order, before any weights load.

`check_options` judges vLLM's own keys of `--speculative-config`, `check` the whole configuration. Wrong values of our
keys are found in `options.py`, layers that trees cannot use in `tree/layers.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from packaging.version import Version

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import cpu

Test = Callable[[Any], Any]
"""f(VllmConfig): true where the feature is in use. A sentence may name the result as `{found}`."""
OptionTest = Callable[[Mapping[str, Any], str | None], Any]
"""The same, f(vLLM's keys of `--speculative-config`, "chain" or "tree")."""


def check_options(speculative: Mapping[str, Any], draft: str | None) -> None:
    """Refuse options of vLLM's that a `draft`, "chain" or "tree", cannot have (DrafterConfigError).

    vLLM judges them later, and in other words: which of them it knows differs between releases.
    """
    for sentence, test in OPTIONS:
        found = test(speculative, draft)
        if found:
            raise DrafterConfigError(sentence.format(found=found))


def check(config: Any) -> None:
    """Refuse a VllmConfig that the drafter cannot serve (DrafterConfigError)."""
    options = options_of(config.speculative_config)
    has_drafter = "ctc" in options.source_names
    for sentence, test in (*ALWAYS, *(WITH_DRAFTER if has_drafter else WITHOUT_DRAFTER)):
        found = test(config)
        if found:
            raise DrafterConfigError(sentence.format(found=found, config=config))
    if options.draft == "tree":
        for feature, test in TREES:
            found = test(config)
            if found:
                raise refused_with_trees(feature.format(found=found))
    if cpu.is_needed():
        for feature, test in ON_CPU:
            found = test(config)
            if found:
                raise DrafterConfigError(
                    f"On a CPU, the CTC drafter does not work with {feature.format(found=found)}; change that option, "
                    "or serve without drafter."
                )


def refused_with_trees(feature: str) -> DrafterConfigError:
    return DrafterConfigError(
        f'CTC draft trees do not work with {feature}; draft chains ("ctc_draft": "chain") or change that option.'
    )


def options_of(speculative_config: Any) -> Any:
    """The `ServingOptions` of vLLM's SpeculativeConfig or None; None where it is not ours. They are on the drafter's
    configuration, and on vLLM's own where there is no drafter (`plugin._resolving`)."""
    own = getattr(speculative_config, "ctc_options", None)
    if own is not None:
        return own
    drafter = getattr(speculative_config, "draft_model_config", None)
    return getattr(getattr(drafter, "hf_config", None), "ctc_options", None)


def rule_of(speculative_config: Any) -> Any:
    """The rule of acceptance, where `options_of` are."""
    own = getattr(speculative_config, "ctc_rule", None)
    return speculative_config.draft_model_config.hf_config.ctc_rule if own is None else own


def _drafter(config: Any) -> Any:
    """The drafter's own configuration, as `plugin.update_ctc` and `plugin._resolving` have filled it."""
    return config.speculative_config.draft_model_config.hf_config


UNSUPPORTED = ("enable_adaptive_verification", "use_local_argmax_reduction", "use_heterogeneous_vocab")


def _block_verification_is_inexact() -> bool:
    """How far block verification accepts depends on the numbers drawn for later positions. vLLM 0.32 draws them again
    in the next step."""
    import vllm

    return Version(vllm.__version__).release[:2] < (0, 33)


OPTIONS: tuple[tuple[str, OptionTest], ...] = (
    (
        "The CTC drafter does not support {found}; remove it from --speculative-config.",
        lambda options, _: next((name for name in UNSUPPORTED if options.get(name)), None),
    ),
    (
        "rejection_sample_method 'synthetic' accepts drafts by chance, whatever the target says; remove it from "
        "--speculative-config.",
        lambda options, _: options.get("rejection_sample_method") == "synthetic",
    ),
    (
        "Block verification of vLLM 0.32 draws the same random numbers for a position again after it was rejected, so "
        'that samples leave the target\'s distribution; use "rejection_sample_method": "standard", or vLLM 0.33.',
        lambda options, draft: (
            draft == "chain" and options.get("rejection_sample_method") == "block" and _block_verification_is_inexact()
        ),
    ),
)


def _model_without_hidden_states(config: Any) -> str | None:
    """The name of vLLM's class of the target. vLLM itself asks the loaded model, and ends in a worker."""
    from vllm.model_executor.model_loader.utils import get_model_cls
    from vllm.model_executor.models.interfaces import supports_eagle3

    model = get_model_cls(config.model_config)
    return None if supports_eagle3(model) else model.__name__


def _adapts_the_head(config: Any) -> bool:
    """`LoraState.make_lora_inputs` maps one row of logits a request, not 1 + N (vLLM 0.32 and 0.33)."""
    lora = config.lora_config
    return lora is not None and (lora.target_modules is None or "lm_head" in lora.target_modules)


def _slots_beyond_a_batch(config: Any) -> int | None:
    """Draft slots of one request, where not even they fit."""
    slots = _drafter(config).num_query_rows
    return slots if slots > config.scheduler_config.max_num_batched_tokens else None


def _default_min_p(config: Any) -> float | None:
    """`min_p` of requests that do not set it (`SamplingParams._validate_spec_decode` refuses them, 0.32 and 0.33)."""
    return config.model_config.get_diff_sampling_param().get("min_p")


def _positions_of_the_rotary_table(config: Any) -> int | None:
    """Where contexts may be longer: with "dynamic" vLLM derives `factor` times the `max_position_embeddings` that its
    table of angles has (layers/rotary_embedding/dynamic_ntk_scaling_rope.py), and looks up angles behind it."""
    text_config = config.model_config.hf_text_config
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "dynamic" or "factor" not in rope:
        return None
    positions = text_config.max_position_embeddings
    return positions if config.model_config.max_model_len > positions else None


ALWAYS: tuple[tuple[str, Test], ...] = (
    (
        "CTC speculative decoding needs vLLM's Model Runner V2, but another option of this server makes vLLM fall back "
        "to V1 (see its warning above); remove that option.",
        lambda config: not config.use_v2_model_runner,
    ),
    (
        "With a drafter, vLLM would adapt the wrong rows of logits if an adapter may change the target's head; add "
        "--lora-target-modules with what your adapters change, without lm_head.",
        _adapts_the_head,
    ),
    (  # vLLM 0.33 lets it pass with "dflash", which watermarks its drafts.
        "The CTC drafter does not watermark the tokens that it drafts; remove watermark_config, or the drafter.",
        lambda config: config.watermark_config is not None,
    ),
    (
        "With batch-sharded sampling the hidden states that ctc_acceptance 'pivot' reads are on other ranks; remove "
        "--enable-batch-sharded-sampling, or ctc_acceptance.",
        lambda config: (
            rule_of(config.speculative_config).reads_hidden and config.parallel_config.enable_batch_sharded_sampling
        ),
    ),
    (
        "The target's generation_config.json sets min_p to {found}, which vLLM refuses in a request with any drafter; "
        "add --override-generation-config '{{\"min_p\": 0}}' for those that do not set it themselves.",
        _default_min_p,
    ),
    (  # Without a drafter only requests that reach it are wrong; drafted rows reach it before their request does.
        "vLLM's table of rotary angles for dynamic scaling ends at {found} positions, and drafts would reach behind; "
        "add --max-model-len {found}.",
        _positions_of_the_rotary_table,
    ),
)

WITH_DRAFTER: tuple[tuple[str, Test], ...] = (
    (
        "The CTC drafter reads hidden states of the target's layers, which vLLM's {found} does not report; serve this "
        "target without drafter, or one that vLLM supports for EAGLE-3.",
        _model_without_hidden_states,
    ),
    (  # vLLM would leave the drafter's embedding uninitialised (`maybe_share_target_embed`, 0.32 and 0.33).
        "The CTC drafter runs on a pipeline's last stage and shares the target's embedding, which is on the first; use "
        "--tensor-parallel-size in place of --pipeline-parallel-size.",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
    ),
    (
        "The CTC drafter needs {found} draft slots a request, but max_num_batched_tokens is "
        "{config.scheduler_config.max_num_batched_tokens}; raise --max-num-batched-tokens.",
        _slots_beyond_a_batch,
    ),
)

WITHOUT_DRAFTER: tuple[tuple[str, Test], ...] = (
    (  # Other stages have no drafts, whose rows their attention would have to know.
        "Draft trees are made on a pipeline's last stage; use --tensor-parallel-size in place of "
        "--pipeline-parallel-size.",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
    ),
)


def _has_context_parallelism(config: Any) -> bool:
    parallel = config.parallel_config
    return parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1


def _has_recurrent_layers(config: Any) -> bool:
    return config.model_config.is_hybrid or config.model_config.is_attention_free


def _has_window(config: Any) -> bool:
    """Any layer that sees less than its whole context."""
    text_config = config.model_config.hf_text_config
    kinds = getattr(text_config, "layer_types", None) or ()
    return any(kind != "full_attention" for kind in kinds) or bool(
        getattr(text_config, "attention_chunk_size", None)
        or (getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True))
    )


def _is_batch_invariant(_: Any) -> bool:
    from vllm import envs

    return envs.VLLM_BATCH_INVARIANT


def _named_backend(config: Any) -> str | None:
    from vllm_ctc_spec.serving.attention_backend import named_without_trees

    return named_without_trees(config)


SERVED_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")

# Between the forward and the sampling, rows of a tree are no sequence. Recurrent state, layer-wise saves and the
# bookkeeping of other ranks would take them for one.
TREES: tuple[tuple[str, Test], ...] = (
    ("context parallelism", _has_context_parallelism),
    ("microbatches (--enable-dbo)", lambda config: config.parallel_config.use_ubatching),
    ("batch-sharded sampling", lambda config: config.parallel_config.enable_batch_sharded_sampling),
    ("KV connectors", lambda config: config.kv_transfer_config is not None),
    ("auxiliary outputs", lambda config: config.aux_output_config.enabled),
    ("custom logits processors", lambda config: config.model_config.logits_processors),
    ("sampling masks (--return-sampling-mask)", lambda config: config.model_config.return_sampling_mask),
    ("trace replay", lambda config: config.model_config.enable_trace_replay),
    ("a quantised KV cache", lambda config: config.cache_config.cache_dtype not in SERVED_CACHE_DTYPES),
    ("KV-sharing fast prefill", lambda config: config.cache_config.kv_sharing_fast_prefill),
    ("MLA targets", lambda config: config.model_config.use_mla),
    ("hybrid and recurrent targets", _has_recurrent_layers),
    ("encoder-decoder targets", lambda config: config.model_config.is_encoder_decoder),
    ("diffusion targets", lambda config: config.model_config.is_diffusion),
    ("sliding-window targets", _has_window),
    ("targets with ALiBi", lambda config: config.model_config.uses_alibi),
    ("the attention backend {found} (use FLASH_ATTN or TRITON_ATTN)", _named_backend),
    ("batch invariance (VLLM_BATCH_INVARIANT)", _is_batch_invariant),
    (
        "sampled drafts (draft_sample_method 'probabilistic')",
        lambda config: config.speculative_config.draft_sample_method == "probabilistic",
    ),
    (
        "rejection_sample_method other than 'standard'",
        lambda config: config.speculative_config.rejection_sample_method != "standard",
    ),
)


def _dtype_of_trees(config: Any) -> str | None:
    """Where it is not float32, which is what `serving/cpu/tree.py` reads and computes."""
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    return dtype if options_of(config.speculative_config).draft == "tree" and dtype != "float32" else None


# Kernels of Model Runner V2 that have no counterpart in `serving/cpu`.
ON_CPU: tuple[tuple[str, Test], ...] = (
    ("draft trees in {found} (use --dtype float32, or chains)", _dtype_of_trees),
    # vLLM's attention there has blocks of 16 tokens for MLA, and of 32 for the drafter's layers.
    ("MLA targets", lambda config: config.model_config.use_mla),
    ("hybrid and recurrent targets", _has_recurrent_layers),
    ("context parallelism", _has_context_parallelism),
    ("batch-sharded sampling", lambda config: config.parallel_config.enable_batch_sharded_sampling),
    ("sampling masks (--return-sampling-mask)", lambda config: config.model_config.return_sampling_mask),
    ("trace replay", lambda config: config.model_config.enable_trace_replay),
)
