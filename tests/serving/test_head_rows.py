"""Rows of the target's head for the labels of a draft vocabulary: of shards, and of weights that only vLLM can read."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_ctc_spec.serving import model

V, H = 40, 600  # more columns than are asked for at once
TOKENS = torch.tensor([0, 3, 19, 20, 21, 39])


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(V, H, generator=torch.Generator().manual_seed(0))


def shard(head: torch.Tensor, first: int, end: int, padding: int) -> SimpleNamespace:
    """As vLLM's VocabParallelEmbedding holds it; padding rows lie behind a rank's own."""
    weight = torch.cat([head[first:end], torch.full((padding, H), torch.nan)])
    indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=end)
    return SimpleNamespace(weight=weight, shard_indices=indices, quant_method=UnquantizedEmbeddingMethod())


@pytest.mark.parametrize("bounds", [(0, V), (0, 20, V), (0, 7, 21, V)])
def test_ranks_share_what_each_has(head, bounds, monkeypatch):
    monkeypatch.setattr(model, "tensor_model_parallel_all_reduce", lambda rows: rows)
    shards = [shard(head, first, end, padding=3) for first, end in zip(bounds, bounds[1:])]
    parts = [model.head_rows(one, TOKENS, H, torch.float32) for one in shards]
    torch.testing.assert_close(sum(parts), head[TOKENS], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_head_is_asked_for_its_columns(head, dtype, monkeypatch):
    monkeypatch.setattr(model, "tensor_model_parallel_all_gather", lambda logits: logits)

    class Quantised:
        def apply(self, layer, inputs, bias):
            assert inputs.dtype is dtype and bias is None
            return F.linear(inputs, head.to(dtype))

    rows = model.head_rows(SimpleNamespace(quant_method=Quantised()), TOKENS, H, dtype)
    torch.testing.assert_close(rows, head.to(dtype)[TOKENS], rtol=0, atol=0)
