"""What `touches.py` cannot find in our source, and in what vLLM's versions differ."""

GPU = "vllm.v1.worker.gpu"
BACKENDS = "vllm.v1.attention.backends"
# What a variable holds where no annotation says it: function and name, then the class; `type:` where it is one itself.
VARIABLES = {
    "serving.release.changed_hooks.spec_decode": f"type:{GPU}.spec_decode",
    "serving.release.changed_hooks.engine_args": "type:vllm.engine.arg_utils.EngineArgs",
    "serving.release.changed_hooks.vllm_config": "type:vllm.config.VllmConfig",
    "serving.release.changed_hooks.scheduler": "type:vllm.v1.core.sched.scheduler.Scheduler",
    "serving.release.changed_hooks.sampling_params": "type:vllm.sampling_params.SamplingParams",
    "serving.drafts._make_meter.config": "vllm.config.VllmConfig",
    "serving.guesses.check.params": "vllm.sampling_params.SamplingParams",
    "serving.guesses.check.model_config": "vllm.config.ModelConfig",
    "serving.options._for_vllm.target": "vllm.config.ModelConfig",
    "serving.plugin._is_ctc.speculative_config": "vllm.config.SpeculativeConfig",
    "serving.plugin._replace_init_speculator.spec_decode": f"type:{GPU}.spec_decode",
    "serving.plugin._replace_init_speculator.runner": f"type:{GPU}.model_runner",
    "serving.plugin.init_speculator.vllm_config": "vllm.config.VllmConfig",
    "serving.plugin.create_speculative_config.self": "vllm.engine.arg_utils.EngineArgs",
    "serving.plugin.create_speculative_config.target_model_config": "vllm.config.ModelConfig",
    "serving.plugin.create_speculative_config.target_parallel_config": "vllm.config.ParallelConfig",
    "serving.plugin.create_speculative_config.config": "vllm.config.SpeculativeConfig",
    "serving.options.parse.target": "vllm.config.ModelConfig",
    "serving.plugin._fit_requests.scheduler": "vllm.config.SchedulerConfig",
    "serving.plugin.create_engine_config.self": "vllm.engine.arg_utils.EngineArgs",
    "serving.plugin.create_engine_config.config": "vllm.config.VllmConfig",
    "serving.plugin.num_lookahead_tokens.self": "vllm.config.VllmConfig",
    "serving.plugin._set_cudagraph_sizes.self": "vllm.config.VllmConfig",
    "serving.cpu.install.platform": "type:vllm.platforms.cpu.CpuPlatform",
    "serving.cpu.tree.attend_tree_rows.implementation": f"{BACKENDS}.cpu_attn.CPUAttentionBackendImpl",
    "serving.cpu.tree.attend_tree_rows.attn_metadata": f"{BACKENDS}.cpu_attn.CPUAttentionMetadata",
    "serving.cpu.tree._tree_rows.attn_metadata": f"{BACKENDS}.cpu_attn.CPUAttentionMetadata",
    "serving.cpu.tree.check_layout.layer": "vllm.model_executor.layers.attention.Attention",
    "serving.limits.config": "vllm.config.VllmConfig",
    "serving.model.__init__.cache_config": "vllm.config.CacheConfig",
    "serving.tree.attention.use_tree_attention.layer": "vllm.model_executor.layers.attention.Attention",
    "serving.tree.attention._with_trees.stock": "type:vllm.v1.attention.backend.AttentionImpl",
    "serving.tree.attention.attend_tree_rows.implementation": f"{BACKENDS}.flash_attn.FlashAttentionImpl",
    "serving.tree.attention.attend_tree_rows.attn_metadata": f"{BACKENDS}.flash_attn.FlashAttentionMetadata",
    "serving.tree.compaction.caches_by_group.group": "vllm.v1.kv_cache_interface.KVCacheGroupSpec",
    "serving.tree.layers.check_layer.layer": "vllm.model_executor.layers.attention.Attention",
    "serving.tree.verification.__init__.state": f"{GPU}.model_states.default.DefaultModelState",
    "training.engine._report_death.client": "vllm.v1.engine.core_client.SyncMPClient",
    "training.engine.output": "vllm.RequestOutput",
}
# Names that are reached through a loop over strings, an object whose class vLLM chooses, or a dictionary of options.
NAMES = (
    "vllm.engine.arg_utils.EngineArgs.spec_model",
    "vllm.engine.arg_utils.EngineArgs.spec_tokens",
    "vllm.config.SpeculativeConfig.disable_eagle_block_drop",
    "vllm.config.SpeculativeConfig.enable_adaptive_verification",
    "vllm.config.SpeculativeConfig.fly_entropy_threshold",
    "vllm.config.SpeculativeConfig.fly_entropy_top_k",
    "vllm.config.SpeculativeConfig.fly_window_size",
    "vllm.config.SpeculativeConfig.method",
    "vllm.config.SpeculativeConfig.num_speculative_tokens_per_batch_size",
    "vllm.config.SpeculativeConfig.revision",
    "vllm.config.SpeculativeConfig.use_heterogeneous_vocab",
    "vllm.config.SpeculativeConfig.use_local_argmax_reduction",
    "vllm.v1.attention.backend.AttentionBackend.forward_includes_kv_cache_update",
    "vllm.v1.attention.backend.AttentionBackend.get_name",
    f"{BACKENDS}.cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update",
    f"{BACKENDS}.cpu_attn.CPUAttentionBackendImpl.forward",
    f"{BACKENDS}.cpu_attn.CPUAttentionBackendImpl.isa",
    f"{BACKENDS}.flash_attn.FlashAttentionImpl.alibi_slopes",
    f"{BACKENDS}.flash_attn.FlashAttentionImpl.forward",
    f"{BACKENDS}.flash_attn.FlashAttentionImpl.logits_soft_cap",
    f"{BACKENDS}.flash_attn.FlashAttentionImpl.sinks",
    f"{BACKENDS}.triton_attn.TritonAttentionImpl.alibi_slopes",
    f"{BACKENDS}.triton_attn.TritonAttentionImpl.forward",
    f"{BACKENDS}.triton_attn.TritonAttentionImpl.head_size",
    f"{BACKENDS}.triton_attn.TritonAttentionImpl.logits_soft_cap",
    f"{BACKENDS}.triton_attn.TritonAttentionImpl.scale",
    f"{BACKENDS}.triton_attn.TritonAttentionImpl.sinks",
    f"{BACKENDS}.triton_attn.TritonAttentionMetadata.block_table",
    f"{BACKENDS}.triton_attn.TritonAttentionMetadata.seq_lens",
    f"{GPU}.spec_decode.speculator.DraftModelSpeculator.observe_verification",
    "vllm.LLM.generate",
    "vllm.LLM.llm_engine",
    "vllm.v1.engine.llm_engine.LLMEngine.engine_core",
    "vllm.v1.engine.core_client.EngineCoreClient.shutdown",
    "vllm.outputs.CompletionOutput.token_ids",
)
# Attributes that we add to what is vLLM's: they must not be there already.
ADDED = {
    "CPUAttentionMetadata.ctc_rows", "RejectionSampler._num_named", "SpeculativeConfig.ctc_options",
    "SpeculativeConfig.ctc_rule", "TritonPlaceholder.next_power_of_2",
}  # fmt: skip
# What a release has not yet: setting it there is of no consequence, or we ask whether it is there.
FLY = {f"SpeculativeConfig.fly_{name}" for name in ("window_size", "entropy_threshold", "entropy_top_k")}
MISSING = {"0.32": {"vllm.v1.worker.gpu_worker.HAS_TRITON", *FLY}}
# Strings of the source of a function, class or module, in this order, on which we rely without touching them.
RELIED_ON = {
    f"{GPU}.model_runner.GPUModelRunner.load_model": (
        "self.speculator.load_model(self.model)", "init_model_state(", "model_state.custom_sampler(",
    ),
    f"{GPU}.model_states.resolve_model_state_cls": ('hasattr(model, "get_model_state_cls")', "get_model_state_cls()"),
    f"{GPU}.model_runner.GPUModelRunner": ("self.speculator.observe_verification(", "self.speculator.propose("),
    f"{GPU}.model_runner.GPUModelRunner.sample": (
        "sample_hidden_states = hidden_states[input_batch.logits_indices]",
        "self.model.compute_logits(sample_hidden_states)", "self.rejection_sampler(",
    ),
    "vllm.config.vllm": ("HAS_TRITON", "Model Runner V2 requires Triton"),
    "vllm.model_executor.models.qwen3_dflash": (
        "target_hidden_size", "dflash_config", "mask_token_id", "draft_vocab_size",
    ),
    f"{GPU}.spec_decode.eagle.eagle3_utils": ("eagle_aux_hidden_state_layer_ids",),
    "vllm.platforms.cuda._get_backend_priorities": (
        "device_capability.major == 10 and not use_non_causal", "AttentionBackendEnum.FLASHINFER,",
        "AttentionBackendEnum.FLASH_ATTN,",
    ),
    "vllm.config.VllmConfig._maybe_disable_dynamic_sd_for_data_parallel": (
        "self.parallel_config.data_parallel_size <= 1", "speculative_config.num_speculative_tokens_per_batch_size = None",
    ),
    "vllm.engine.arg_utils.EngineArgs.create_engine_config": ("self.create_speculative_config(",),
    "vllm.entrypoints.generate.base.serving": (
        "from vllm.entrypoints.serve.utils.fingerprint import get_system_fingerprint", "= get_system_fingerprint(",
    ),
    "vllm.config.speculative.SpeculativeConfig": ("extract_hidden_states",),
    "vllm.config.SpeculativeConfig.use_eagle_block_drop": ("not self.disable_eagle_block_drop",),
    "vllm.config.kv_transfer.KVTransferConfig": ("kv_connector_module_path", "kv_connector_extra_config"),
    f"{BACKENDS}.flash_attn.FlashAttentionImpl.forward": ("kv_cache.transpose(1, 2).split(",),
    "vllm.v1.engine.core_client.SyncMPClient.get_output": ("self.outputs_queue.get()", "raise self._format_exception("),
    f"{BACKENDS}.triton_attn": ("kv_cache.transpose(1, 2).split(self.head_size, dim=-1)",),
}  # fmt: skip
# A constructor of ours that takes other arguments than the one it overrides, because we call it ourselves.
OWN_CONSTRUCTORS = {"DFlashSpeculator.__init__", "DraftModelSpeculator.__init__", "RejectionSampler.__init__"}
KERNELS = "a CPU's counterparts take the arguments of both"
# What is not the same in every supported version, and why that is no matter. Digests stand for bodies.
DIFFERENCES = {
    "CacheConfig.cache_dtype": "any string; limits takes four and refuses the rest",
    "DFlashQwen3Model.__init__": "maps names in a draft's quantisation; ours has none",
    "DFlashSpeculator.__init__": "stages hidden states for the graph, by _num_graph_context_tokens, which we override",
    "DFlashSpeculator._generate_draft": "passes the number of steps to the sampling that we replace",
    "DFlashSpeculator.propose": "stages hidden states for the graph; skips the forward itself where nothing is drafted",
    "DefaultModelState.prepare_attn": "multimodal prefixes and context parallelism, which trees refuse",
    "DraftModelSpeculator.__init__": "max_model_len is a property that may shrink; our buffers keep the first one",
    "EngineArgs.create_engine_config": "more options; what we wrap it for is done with its result",
    "RejectionSampler.__init__": "FLy, which our own samplers apply by our own rule",
    "RejectionSampler._verify": "FLy, which our own samplers apply by our own rule",
    **dict.fromkeys(FLY, "0.32 does not know FLy: our own sampler applies it to chains there"),
    "Scheduler.__init__": "more options; the table of drafts, which a plan replaces, is the same",
    "vllm.v1.worker.gpu.model_runner.init_speculator": "one more drafter",
    "vllm.v1.worker.gpu.spec_decode.init_speculator": "one more drafter",
    "vllm.v1.worker.gpu_worker.HAS_TRITON": "one more place that asks for Triton",
    f"{GPU}.block_table._gather_block_tables_kernel": KERNELS,
    f"{GPU}.input_batch._post_update_kernel": KERNELS,
    f"{GPU}.spec_decode.dflash.speculator._prepare_dflash_inputs_kernel": KERNELS,
    f"{GPU}.spec_decode.rejection_sampler_utils._compute_local_logits_stats_kernel": KERNELS,
    f"{GPU}.spec_decode.rejection_sampler_utils._compute_local_residual_mass_kernel": KERNELS,
    f"{GPU}.spec_decode.rejection_sampler_utils._rejection_kernel": KERNELS,
}
