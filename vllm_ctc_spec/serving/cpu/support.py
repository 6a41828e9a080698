"""What does not work on a CPU: kernels of Model Runner V2 without a counterpart here, refused at startup."""

from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig

from vllm_ctc_spec.errors import DrafterConfigError

# A row's condition on vLLM's configuration, and what has it.
REFUSED: tuple[tuple[str, Callable[[VllmConfig], Any]], ...] = (
    # vLLM's attention: blocks of 16 tokens for MLA, of 32 for the drafter's layers.
    ("MLA targets", lambda c: c.model_config.use_mla),
    ("hybrid and recurrent targets", lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free),
    ("targets with multimodal rotary positions", lambda c: c.model_config.uses_mrope),
    ("context parallelism", lambda c: c.parallel_config.prefill_context_parallel_size > 1
        or c.parallel_config.decode_context_parallel_size > 1),
    ("batch-sharded sampling", lambda c: c.parallel_config.enable_batch_sharded_sampling),
    ("sampling masks (--return-sampling-mask)", lambda c: c.model_config.return_sampling_mask),
    ("trace replay", lambda c: c.model_config.enable_trace_replay),
    ("FLy's lossy verification (rejection_sample_method 'fly')",
        lambda c: c.speculative_config.rejection_sample_method == "fly"),
)  # fmt: skip


def check_engine(config: VllmConfig) -> None:
    """Refuse a configuration whose kernels a CPU does not have (DrafterConfigError)."""
    for name, holds in REFUSED:
        if holds(config):
            raise DrafterConfigError(
                f"On a CPU, the CTC drafter does not work with {name}; change that option, or serve without drafter."
            )
