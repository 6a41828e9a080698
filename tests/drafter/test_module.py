"""The training module: save and load, what a query may see, and the start value of the blank."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from vllm_ctc_spec.drafter import layers
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.layers import WITHOUT_GROUPED_HEADS
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError

CONFIG = DrafterConfig(
    hidden_size=32, vocab_size=50, target_num_layers=4, aux_hidden_state_layer_ids=(1, 2, 3), num_frames=6,
    num_labels=4, markov_rank=8, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
)  # fmt: skip


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 32, generator=generator), torch.randn(50, 32, generator=generator)


@pytest.fixture
def drafter(weights):
    torch.manual_seed(1)
    return CTCDrafter(CONFIG, *weights)


def inputs(num_context=9):
    generator = torch.Generator().manual_seed(2)
    aux = torch.randn(2, num_context, 3 * 32, generator=generator)
    return aux, torch.tensor([[3, 4], [5, 6]]), torch.tensor([[2, 7], [4, 9]])


def test_save_and_load_give_the_same_frames(drafter, weights, tmp_path):
    drafter.save(tmp_path)
    loaded = CTCDrafter.load(tmp_path, *weights)
    a, b = drafter(*inputs()), loaded(*inputs())
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=0)
    torch.testing.assert_close(a.lattice.blank_odds, b.lattice.blank_odds, rtol=0, atol=0)
    assert not any("target" in name for name in drafter.state_dict())


def test_damaged_weights_and_another_target_are_refused(drafter, weights, tmp_path):
    drafter.save(tmp_path)
    with pytest.raises(DrafterConfigError, match="use the target that it was made for"):
        CTCDrafter.load(tmp_path, weights[0][:, :16], weights[1])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DrafterConfigError, match="are damaged"):
        CTCDrafter.load(tmp_path, *weights)


def test_weights_of_another_configuration_are_refused(drafter, weights, tmp_path):
    drafter.save(tmp_path)
    dataclasses.replace(CONFIG, markov_rank=4).save(tmp_path)
    with pytest.raises(DrafterConfigError, match=r"markov_head.embedding.weight is \[50, 8\], expected \[50, 4\]"):
        CTCDrafter.load(tmp_path, *weights)
    dataclasses.replace(CONFIG, markov_rank=0).save(tmp_path)
    with pytest.raises(DrafterConfigError, match="markov_head.embedding.weight.* is .* expected none"):
        CTCDrafter.load(tmp_path, *weights)


def test_an_anchor_sees_only_what_is_before_it_and_its_own_block(drafter):
    aux, tokens, positions = inputs()
    before = drafter(aux, tokens, positions).logits
    later = aux.clone()
    later[0, 2:] += 1.0  # the first anchor of row 0 sits at position 2
    after = drafter(later, tokens, positions).logits
    torch.testing.assert_close(after[0, 0], before[0, 0])
    assert (after[0, 1] - before[0, 1]).abs().max() > 1e-4
    other = tokens.clone()
    other[0, 1] = 9
    after = drafter(aux, other, positions).logits
    torch.testing.assert_close(after[0, 0], before[0, 0])
    assert (after[0, 1] - before[0, 1]).abs().max() > 1e-4


def test_attention_without_grouped_heads_gives_the_same_frames(drafter, monkeypatch):
    """As on CUDA, where the fused kernels take a mask or grouped heads."""
    attention, grouped = F.scaled_dot_product_attention, []

    def watched(*args, enable_gqa, **kwargs):
        grouped.append(enable_gqa)
        return attention(*args, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    expected = drafter(*inputs())
    monkeypatch.setattr(layers, "WITHOUT_GROUPED_HEADS", ("cpu",))
    torch.testing.assert_close(drafter(*inputs()).logits, expected.logits)
    assert grouped == [True] * 2 + [False] * 2  # two layers each
    assert "cuda" in WITHOUT_GROUPED_HEADS


def test_frames_see_each_other_in_both_directions(drafter):
    aux, tokens, positions = inputs()
    before = drafter(aux, tokens, positions).logits
    with torch.no_grad():
        drafter.frame_queries[3] += torch.randn(32)
    change = (drafter(aux, tokens, positions).logits - before).abs().amax(-1)
    assert (change > 1e-6).all()


def test_blank_starts_at_the_share_that_the_labels_leave(drafter):
    blank = torch.sigmoid(drafter(*inputs()).lattice.blank_odds)
    torch.testing.assert_close(blank, torch.full_like(blank, 2 / 6))
