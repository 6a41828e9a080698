"""Whether the installed vLLM is one that this package was written for."""

import inspect
from typing import Any

from packaging.version import InvalidVersion, Version

SUPPORTED_RELEASES = ((0, 32), (0, 33))


def unsupported_release(version: str) -> str | None:
    """One sentence where this vLLM is not supported."""
    try:
        if Version(version).release[:2] in SUPPORTED_RELEASES:
            return None
    except InvalidVersion:
        pass  # "dev": a build of vLLM that does not know its own version
    supported = " or ".join(f"{major}.{minor}.*" for major, minor in SUPPORTED_RELEASES)
    return (
        f"vllm-ctc-spec supports vLLM {supported}, but vLLM {version} is installed; "
        "install a supported vLLM or a newer vllm-ctc-spec."
    )


def changed_hooks(
    engine_args: type, vllm_config: type, spec_decode: Any, scheduler: type, sampling_params: type
) -> str | None:
    """One sentence where a function that `plugin.register` wraps is not the one it was written for."""
    expected: dict[str, tuple[Any, list[str]]] = {
        "EngineArgs.create_speculative_config": (
            getattr(engine_args, "create_speculative_config", None),
            ["self", "target_model_config", "target_parallel_config"],
        ),
        "init_speculator": (getattr(spec_decode, "init_speculator", None), ["vllm_config", "device", "req_states"]),
        "VllmConfig.num_lookahead_tokens": (
            getattr(getattr(vllm_config, "num_lookahead_tokens", None), "fget", None),
            ["self"],
        ),
        "VllmConfig._set_cudagraph_sizes": (getattr(vllm_config, "_set_cudagraph_sizes", None), ["self"]),
        "SamplingParams.verify": (
            getattr(sampling_params, "verify", None),
            ["self", "model_config", "speculative_config", "structured_outputs_config", "tokenizer"],
        ),
        "Scheduler.make_spec_decoding_stats": (
            getattr(scheduler, "make_spec_decoding_stats", None),
            [
                "self",
                "spec_decoding_stats",
                "num_draft_tokens",
                "num_accepted_tokens",
                "num_invalid_spec_tokens",
                "request_id",
            ],
        ),
    }
    for name, (function, parameters) in expected.items():
        if function is None or list(inspect.signature(function).parameters) != parameters:
            return f"vllm-ctc-spec cannot hook into this vLLM build: {name} has changed; install a released vLLM."
    return None
