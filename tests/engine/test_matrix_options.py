"""Options of vLLM that a drafter does not go with: vLLM's own sentence, or ours where a CPU lacks the kernels."""

import pytest
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_ctc_spec.serving import cpu, plugin

from .conftest import DRAFTS
from .test_bad_input import is_one_sentence, startup_error
from .test_matrix_targets import ON_A_CPU, REFUSED_BY_VLLM, drafting

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
SAMPLED = {"draft_sample_method": "probabilistic"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The plugin selects the V2 runner by this variable; whatever a test makes of it ends with the test."""
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")


def row(name: str, options: dict, *rest, **outcome):
    return pytest.param(options, *rest, id=name, marks=pytest.mark.feature(name, **outcome))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    ("options", "says"),
    [
        row(
            "microbatches", {"ubatch_size": 2}, "does not yet support: dual batch overlap with speculative decoding",
            chain="refused: by vLLM with any drafter",
        ),
        row(
            "KV-sharing fast prefill", {"kv_sharing_fast_prefill": True},
            "Fast prefill optimization for KV sharing is not compatible with EAGLE",
            chain="refused: by vLLM with any drafter that reads hidden states",
        ),
    ],
)  # fmt: skip
def test_vllm_refuses_it_with_a_drafter(tiny_pair, options, says, draft):
    assert says in startup_error(tiny_pair.target, drafting(tiny_pair, draft), **options)


UNMARKED = "refused: drafted tokens carry none"


@pytest.mark.feature("watermarks", chain=UNMARKED, tree=UNMARKED)
@pytest.mark.parametrize(("draft", "sampling"), [("chain", SAMPLED), ("chain", {}), ("tree", {})])
def test_watermarks(tiny_pair, monkeypatch, draft, sampling):
    """Which of them vLLM itself refuses differs: 0.33 takes "dflash" with two keys."""
    watermark = {"watermark_config": {"algorithm": "dual_key_gumbel", "key": 1}}
    theirs = startup_error(tiny_pair.target, {**drafting(tiny_pair, draft)}, **watermark)
    assert "watermarking requires draft_sample_method='probabilistic'" in theirs
    monkeypatch.setattr(VllmConfig, "_check_supports_watermarking", lambda self, *args, **options: True)
    text = startup_error(tiny_pair.target, {**drafting(tiny_pair, draft), **sampling}, **watermark)
    assert "does not watermark the tokens that it drafts" in text and "remove watermark_config" in text
    assert is_one_sentence(text)


@pytest.mark.skipif(not cpu.is_needed(), reason="what a CPU lacks")
@pytest.mark.parametrize(("draft", "says"), [("chain", "On a CPU"), ("tree", "draft trees do not work")])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        *(
            row(name, options, name, chain=ON_A_CPU)
            for name, options in (
                ("context parallelism", {**TWO_RANKS, "decode_context_parallel_size": 2}),
                ("batch-sharded sampling", {**TWO_RANKS, "enable_batch_sharded_sampling": True}),
                ("sampling masks", {"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"}),
            )
        ),
        pytest.param({"enable_trace_replay": True}, "trace replay", id="trace replay"),
    ],
)
def test_options_without_kernels_on_a_cpu(tiny_pair, options, what, draft, says):
    text = startup_error(tiny_pair.target, drafting(tiny_pair, draft), **options)
    assert says in text and what in text
    assert is_one_sentence(text)


@pytest.mark.feature("bfloat16 on a CPU", tree="refused: tree attention there is of float32")
@pytest.mark.skipif(not cpu.is_needed(), reason="what a CPU lacks")
def test_trees_of_two_bytes_on_a_cpu(tiny_pair):
    text = startup_error(tiny_pair.target, drafting(tiny_pair, "tree"), dtype="bfloat16")
    assert "draft trees in bfloat16 (use --dtype float32, or chains)" in text
    assert is_one_sentence(text)


@pytest.mark.feature("batch invariance", chain=REFUSED_BY_VLLM)
@pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM has it on GPUs")
@pytest.mark.parametrize("draft", [None, "chain"])
def test_batch_invariance_is_refused_on_a_cpu(engine, tiny_pair, monkeypatch, draft):
    """With a drafter as without. Should this fail, it can be tested. The variable is set where vLLM reads it: what
    else it changes in a process, before this refusal, would last."""
    monkeypatch.setattr("vllm.model_executor.determinism.batch_invariant.init_batch_invariance", lambda: None)
    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
    with pytest.raises(RuntimeError, match="batch_invariant mode is not supported for CPU_ATTN"):
        engine(tiny_pair.target, draft and drafting(tiny_pair, draft))
