"""Muon: torch's updates in bf16, and the same ones in fp32 where a CPU has no instructions for bf16."""

import pytest
import torch

from vllm_ctc_spec.training import muon

SHAPES = ((48, 16), (16, 48), (32, 32))


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in params]


def torchs() -> list[torch.Tensor]:
    params = parameters()
    return train(torch.optim.Muon(params, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"), params)


def ours(monkeypatch, **capabilities: bool) -> list[torch.Tensor]:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    params = parameters()
    return train(muon.Muon(params, lr=0.01, weight_decay=0.05), params)


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16"])
def test_in_bf16_it_is_torchs(monkeypatch, capability):
    for mine, theirs, start in zip(ours(monkeypatch, **{capability: True}), torchs(), parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)
        assert (mine - start).abs().max() > 1e-3


def test_without_bf16_instructions_it_computes_in_fp32(monkeypatch):
    def no_bf16(*args, **kwargs):
        raise AssertionError("bf16 on a CPU without it")

    monkeypatch.setattr(torch.Tensor, "bfloat16", no_bf16)
    updates = ours(monkeypatch, avx512_bf16=False)
    monkeypatch.undo()
    for mine, theirs, start in zip(updates, torchs(), parameters(), strict=True):
        change = theirs - start
        assert 0 < (mine - theirs).norm() < 0.03 * change.norm()  # rounding of bf16, and nothing else


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    result = muon.orthogonalize(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7, torch.float32)
    before, after = torch.linalg.svdvals(matrix), torch.linalg.svdvals(result)
    assert before.max() / before.min() > 2
    assert 0.5 < after.min() and after.max() < 1.5
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.trace(left.T @ result @ right.T) > 0.7 * min(shape)  # the same directions


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="no closure"):
        muon.Muon(parameters(), lr=0.1, weight_decay=0).step(lambda: 0.0)
