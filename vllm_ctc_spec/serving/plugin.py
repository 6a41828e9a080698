"""Every touch on vLLM, in one place: `register()`, the entry point of the group `vllm.general_plugins`.

`{"method": "ctc"}` is an alias, resolved where every form of the option passes, to vLLM's own method "dflash" with
the draft architecture `CTCDraftModel`. All of vLLM's gates for DFlash (auxiliary hidden states, lookahead slots,
hashing, async scheduling) then hold unpatched. The complete list:

1. `ModelRegistry.register_model` for `CTCDraftModel` and `CTCSpecFormerModel` (public API).
2. `register_speculator("ctc")`: vLLM reads the drafter's speculators-format `config.json` (public registry).
3. `EngineArgs.create_speculative_config`, wrapped: resolves the alias and checks it, before weights load.
4. `EngineArgs.create_engine_config`, wrapped: what can only be judged on the whole configuration; the attention backend
   of trees; where metrics go.
5. `init_speculator`, wrapped: a CTC draft architecture builds `CTCProposer`; other sources alone, `ModelFreeProposer`.
6. `VllmConfig.num_lookahead_tokens`, wrapped: the drafter writes 1 + T key/value slots, or one, not 1 + N.
7. `VllmConfig._set_cudagraph_sizes`, wrapped: sizes for drafts and their verification, before vLLM fixes its own.
8. `Scheduler.__init__`, wrapped: a plan's drafts follow what is accepted (`plan.follow`).
9. `SamplingParams.verify`, wrapped: a request's guess of its answer is judged in the API server (`guesses.py`).
10. `get_system_fingerprint`, wrapped where a lossy rule of acceptance is asked for: responses say so.
11. On a CPU without Triton: `vllm_ctc_spec.serving.cpu` (development, demo and CI only).

It runs in the API server, the engine core and every worker, and may run more than once in each.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from vllm_ctc_spec.drafter.config import ARCHITECTURE, SPECULATORS_TYPE, DrafterConfig
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import guesses, limits, metrics
from vllm_ctc_spec.serving.acceptance import lossy_mark
from vllm_ctc_spec.serving.options import Resolved, parse
from vllm_ctc_spec.serving.release import changed_hooks, unsupported_release

logger = logging.getLogger("vllm.ctc_spec")

MODELS = {
    "adm": (ARCHITECTURE, "vllm_ctc_spec.serving.model:CTCDraftModel"),
    "specformer": ("CTCSpecFormerModel", "vllm_ctc_spec.serving.specformer:SpecFormerModel"),
}
"""A drafter's architecture to the name and the class of its model in vLLM's registry."""
V2_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_registered = False


def register() -> None:
    """Make `{"method": "ctc"}` known to this process. Idempotent.

    On an unsupported vLLM nothing is touched except that `{"method": "ctc"}` ends with one sentence: an installed
    plugin must never stop a server that does not ask for it.
    """
    global _registered
    if _registered:
        return
    _registered = True
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    problem = unsupported_release(vllm.__version__)
    if problem is None:  # only then is what follows known to exist
        from vllm.config import VllmConfig
        from vllm.sampling_params import SamplingParams
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.worker.gpu import spec_decode

        problem = changed_hooks(EngineArgs, VllmConfig, spec_decode, Scheduler, SamplingParams)
    if problem:
        EngineArgs.create_speculative_config = _refusing(EngineArgs.create_speculative_config, problem)
        return
    from vllm import ModelRegistry
    from vllm.transformers_utils.configs.speculators.algos import register_speculator

    from vllm_ctc_spec.serving import cpu

    for name, served in MODELS.values():
        ModelRegistry.register_model(name, served)
    register_speculator(SPECULATORS_TYPE)(update_ctc)
    EngineArgs.create_speculative_config = _resolving(EngineArgs.create_speculative_config)
    EngineArgs.create_engine_config = _checking(EngineArgs.create_engine_config)
    VllmConfig.num_lookahead_tokens = _looking_ahead(VllmConfig.num_lookahead_tokens)
    VllmConfig._set_cudagraph_sizes = _sizing_graphs(VllmConfig._set_cudagraph_sizes)
    _replace_init_speculator(spec_decode)
    SamplingParams.verify = _checking_guess(SamplingParams.verify)
    Scheduler.__init__ = _following_plan(Scheduler.__init__)
    if cpu.is_needed() and os.environ.get(V2_VARIABLE) == "1":
        cpu.install()


def _is_ctc(speculative_config: Any) -> bool:
    draft = getattr(speculative_config, "draft_model_config", None)
    return draft is not None and any(name in (draft.architectures or []) for name, _ in MODELS.values())


def _asks_for_ctc(speculative: Any) -> bool:
    return isinstance(speculative, dict) and speculative.get("method") == SPECULATORS_TYPE


def _refusing(original: Callable, problem: str) -> Callable:
    @functools.wraps(original)
    def create_speculative_config(self, *args, **kwargs):
        if _asks_for_ctc(self.speculative_config):
            raise DrafterConfigError(problem)
        return original(self, *args, **kwargs)

    return create_speculative_config


def _resolving(original: Callable) -> Callable:
    @functools.wraps(original)
    def create_speculative_config(self, target_model_config, target_parallel_config):
        given = self.speculative_config
        if not _asks_for_ctc(given):
            config = original(self, target_model_config, target_parallel_config)
            if _is_ctc(config):
                raise DrafterConfigError(f'{config.model} is a CTC drafter: serve it with "method": "ctc".')
            return config
        speculative = {key.replace("-", "_"): value for key, value in given.items()}
        short = {"spec_model": self.spec_model, "spec_tokens": self.spec_tokens}
        for name, key in (("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
            if short[name] is not None and key not in speculative:
                speculative[key], short[name] = short[name], None
        resolved = parse(speculative, target_model_config, target_parallel_config)
        _select_v2_runner()
        with _attributes(self, speculative_config=resolved.for_vllm, **short):
            config = original(self, target_model_config, target_parallel_config)
        if resolved.drafter is None:
            config.ctc_options, config.ctc_rule = resolved.options, resolved.rule
            _report(resolved, "")
            return config
        hf_config = config.draft_model_config.hf_config
        hf_config.ctc_options, hf_config.ctc_rule = resolved.options, resolved.rule
        hf_config.ctc_plan = resolved.plan
        # The drafter's rotary table reaches as far as the served context, and takes no more memory than that.
        hf_config.max_position_embeddings = target_model_config.max_model_len
        _report(resolved, str(target_model_config.dtype).removeprefix("torch."))
        return config

    return create_speculative_config


@contextlib.contextmanager
def _attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Other values while vLLM's own code runs: the user's words come back afterwards."""
    saved = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)


def _report(resolved: Resolved, dtype: str) -> None:
    options, drafter, for_vllm, rule, _ = resolved
    if options.sources != "ctc":
        logger.info("Drafts of %d tokens come from: %s.", for_vllm["num_speculative_tokens"], options.sources)
    if not rule.exact:
        logger.warning(
            "Drafts are accepted by %s: tokens are accepted that the target would not say, and the output is NOT "
            "distributed as the target's. Responses say so in their system_fingerprint (%s), /metrics in the label "
            "acceptance.", rule, lossy_mark(rule),
        )  # fmt: skip
    if drafter is None:
        return
    logger.info(
        "CTC drafter %s (%s, served as dflash): %d frames, %s of %d speculative tokens, search %s.",
        for_vllm["model"], drafter.architecture, drafter.num_frames, options.draft, for_vllm["num_speculative_tokens"],
        options.search,
    )  # fmt: skip
    if drafter.target_dtype not in ("", dtype):
        logger.warning(
            "CTC drafter %s was trained on what the target says in %s, and the target is served in %s: it will say "
            "other words in places, and fewer drafts will be accepted than with --dtype %s.",
            for_vllm["model"], drafter.target_dtype, dtype, drafter.target_dtype,
        )  # fmt: skip


def _select_v2_runner() -> None:
    """Refuse a forced V1 runner; on a CPU without Triton select V2 and install its kernels."""
    from vllm import envs

    from vllm_ctc_spec.serving import cpu

    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        raise DrafterConfigError(
            f"CTC speculative decoding needs vLLM's Model Runner V2, but {V2_VARIABLE}=0 forces V1; unset it."
        )
    if cpu.is_needed():
        os.environ[V2_VARIABLE] = "1"  # inherited by the engine core and the workers
        cpu.install()


def _checking(original: Callable) -> Callable:
    @functools.wraps(original)
    def create_engine_config(self, *args, **kwargs):
        config = original(self, *args, **kwargs)
        options = limits.options_of(config.speculative_config)
        if options is None:
            return config
        limits.check(config)
        if options.draft == "tree":
            from vllm_ctc_spec.serving.attention_backend import select_for_trees

            select_for_trees(config)
            _report_penalties(config.model_config.get_diff_sampling_param())
        if not limits.rule_of(config.speculative_config).exact:
            _mark_responses()
        if _is_ctc(config.speculative_config):
            _fit_requests(
                config.scheduler_config, config.speculative_config.draft_model_config.hf_config.num_query_rows
            )
        if not self.disable_log_stats:
            # Workers get it with the configuration; on the drafter's it would be hashed into the compile cache's key.
            setattr(config.observability_config, metrics.FOLDER, metrics.folder())
        return config

    return create_engine_config


def _report_penalties(defaults: dict[str, Any]) -> None:
    """defaults: sampling parameters of requests that do not set them, out of the target's generation_config.json."""
    neutral = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    for name, value in neutral.items():
        if defaults.get(name, value) != value:
            logger.warning(
                "The target's generation_config.json sets %s to %s, and requests with a penalty draft chains in place "
                "of trees: --override-generation-config '{\"%s\": %s}' gives trees to those that do not set it.",
                name, defaults[name], name, value,
            )  # fmt: skip


def _fit_requests(scheduler: Any, slots: int) -> None:
    """The draft pass has max_num_batched_tokens rows. vLLM 0.33 lowers max_num_active_seqs by itself, 0.32 does not."""
    fitting = scheduler.max_num_batched_tokens // slots
    if (scheduler.max_num_active_seqs or scheduler.max_num_seqs) > fitting:
        logger.warning(
            "Lowering max_num_seqs from %d to %d: the CTC drafter uses %d slots a request and "
            "max_num_batched_tokens is %d.",
            scheduler.max_num_seqs, fitting, slots, scheduler.max_num_batched_tokens,
        )  # fmt: skip
        scheduler.max_num_seqs = fitting
        scheduler.max_num_active_seqs = None


def _looking_ahead(original: property) -> property:
    def num_lookahead_tokens(self) -> int:
        """Every reader adds it to the scheduled tokens, drafts among them. vLLM 0.33 also bounds the running requests
        by it, which 1 + N would do at 126 for trees of 64 and 8192 batched tokens."""
        if _is_ctc(self.speculative_config):
            return self.speculative_config.draft_model_config.hf_config.num_query_rows
        return original.fget(self)

    return property(num_lookahead_tokens, doc=original.__doc__)


def _sizing_graphs(original: Callable) -> Callable:
    @functools.wraps(original)
    def _set_cudagraph_sizes(self):
        """Where the configuration is made; the engine core and the workers get it with its sizes."""
        if limits.options_of(self.speculative_config) is not None:
            from vllm_ctc_spec.serving.graphs import choose_sizes

            choose_sizes(self, original)
        original(self)

    return _set_cudagraph_sizes


@functools.cache
def _mark_responses() -> None:
    """Once a process, and only for who needs it: the module takes the web framework along."""
    from vllm.entrypoints.serve.utils import fingerprint

    fingerprint.get_system_fingerprint = _marking(fingerprint.get_system_fingerprint)


def _marking(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_system_fingerprint(vllm_config):
        """Asked for once by each of the API server's endpoints, by this module's name."""
        fingerprint = original(vllm_config)
        if fingerprint is None or limits.options_of(vllm_config.speculative_config) is None:
            return fingerprint
        rule = limits.rule_of(vllm_config.speculative_config)
        return fingerprint if rule.exact else f"{fingerprint}-{lossy_mark(rule)}"

    return get_system_fingerprint


def _replace_init_speculator(spec_decode: Any) -> None:
    original = spec_decode.init_speculator

    @functools.wraps(original)
    def init_speculator(vllm_config, device, req_states):
        options = limits.options_of(vllm_config.speculative_config)
        if options is None:
            return original(vllm_config, device, req_states)
        if "ctc" not in options.source_names:
            from vllm_ctc_spec.serving.model_free import ModelFreeProposer

            return ModelFreeProposer(vllm_config, device, req_states)
        from vllm_ctc_spec.serving.proposer import CTCProposer

        return CTCProposer(vllm_config, device, req_states)

    spec_decode.init_speculator = init_speculator
    runner = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if runner is not None:  # imported before this plugin ran, with the function under its own name
        runner.init_speculator = init_speculator


def _checking_guess(original: Callable) -> Callable:
    @functools.wraps(original)
    def verify(self, model_config, speculative_config, structured_outputs_config, tokenizer):
        original(self, model_config, speculative_config, structured_outputs_config, tokenizer)
        if self.extra_args and not guesses.KEYS.isdisjoint(self.extra_args):
            guesses.check(self, model_config, limits.options_of(speculative_config), tokenizer)

    return verify


def _following_plan(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        speculative = vllm_config.speculative_config
        if _is_ctc(speculative) and (plan := speculative.draft_model_config.hf_config.ctc_plan) is not None:
            from vllm_ctc_spec.serving.plan import follow

            follow(self, plan)

    return __init__


def update_ctc(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Speculators hook: what vLLM's DFlash machinery reads from the draft's configuration.

    `mask_token_id` fills the frame slots' input ids; the model puts its frame queries there.
    """
    config = DrafterConfig.from_dict(config_dict)
    pre_trained_config.update(
        architectures=[MODELS[config.architecture][0]],
        # vLLM's layers are those with a cache, which read the context.
        num_hidden_layers=1 if config.architecture == "specformer" else config.num_layers,
        num_frame_layers=config.num_layers,
        num_query_rows=config.num_query_rows,
        frame_attention=config.frame_attention,
        positional_rank=config.positional_rank,
        draft_vocab_size=config.draft_vocab_size,
        num_markov_inputs=config.num_markov_inputs,
        target_hidden_size=config.hidden_size,
        eagle_aux_hidden_state_layer_ids=list(config.aux_hidden_state_layer_ids),
        dflash_config={"mask_token_id": 0, "causal": False},
        num_frames=config.num_frames,
        lattice=config.lattice,
        transition_rank=config.transition_rank,
        markov_rank=config.markov_rank,
    )
