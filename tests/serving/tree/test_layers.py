"""Layers that trees cannot use are named when the target is loaded, in one sentence with the way out."""

from types import SimpleNamespace

import pytest
import torch

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving.tree.layers import BACKENDS, check_layer


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_that_trees_can_use(backend):
    check_layer("model.layers.0", layer(backend))
