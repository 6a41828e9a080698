"""What a CPU lacks is said in one sentence."""

from types import SimpleNamespace

import pytest

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving.cpu.support import check_engine


def configuration(**changes) -> SimpleNamespace:
    """A configuration that a CPU can serve, with one field of one part changed."""
    parts = {
        "model_config": dict(
            use_mla=False, is_hybrid=False, is_attention_free=False, uses_mrope=False, return_sampling_mask=False,
            enable_trace_replay=False,
        ),
        "parallel_config": dict(
            prefill_context_parallel_size=1, decode_context_parallel_size=1, enable_batch_sharded_sampling=None
        ),
        "speculative_config": dict(rejection_sample_method="standard"),
    }  # fmt: skip
    return SimpleNamespace(
        **{name: SimpleNamespace(**{f: changes.pop(f, v) for f, v in part.items()}) for name, part in parts.items()},
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_mla": True}, "MLA targets"),
        ({"is_hybrid": True}, "hybrid and recurrent targets"),
        ({"is_attention_free": True}, "hybrid and recurrent targets"),
        ({"uses_mrope": True}, "targets with multimodal rotary positions"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"enable_batch_sharded_sampling": True}, "batch-sharded sampling"),
        ({"return_sampling_mask": True}, "sampling masks"),
        ({"enable_trace_replay": True}, "trace replay"),
        ({"rejection_sample_method": "fly"}, "FLy's lossy verification"),
    ],
    ids=str,
)
def test_an_engine_that_a_cpu_cannot_serve(change, what):
    check_engine(configuration())
    with pytest.raises(DrafterConfigError, match=f"On a CPU, the CTC drafter does not work with {what}"):
        check_engine(configuration(**change))
