"""The target's caches are compacted by KV cache group, whatever their shapes."""

from types import SimpleNamespace

import pytest
import torch

from vllm_ctc_spec.serving.tree import compaction
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict

BLOCKS, BLOCK_SIZE = 2, 16
VERDICT = Verdict(torch.tensor([[0, 2, 3, 3]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
SLOTS = torch.arange(4).flip(0) + torch.tensor([[5], [9]])  # of four rows, by group


def layer(num_heads: int, head_size: int) -> SimpleNamespace:
    return SimpleNamespace(kv_cache=torch.randn(BLOCKS, num_heads, BLOCK_SIZE, 2 * head_size))


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """How many layers each launch was for."""
    seen: list[int] = []
    compact_kv = compaction.compact_kv

    def counted(caches, *step):
        seen.append(len(caches.layers()))
        compact_kv(caches, *step)

    monkeypatch.setattr(compaction, "compact_kv", counted)
    return seen


def test_layers_of_different_heads_in_one_group_are_compacted_by_a_launch_for_each_kind(launches):
    target = {"a": layer(2, 4), "b": layer(3, 4), "c": layer(2, 4), "d": layer(2, 8), "alone": layer(1, 4)}
    drafter = layer(1, 8)
    groups = [["a", "b", "drafter", "c", "d"], ["alone"]]
    before = {name: each.kv_cache.clone() for name, each in target.items()}
    drafters = drafter.kv_cache.clone()
    path = compaction.PathCompaction(target)
    path.bind(SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=names) for names in groups]))
    layout = TreeLayout.allocate(1, 8, [3], torch.device("cpu"))
    layout.slot_mappings = SLOTS
    path.run(layout, VERDICT)
    assert launches == [2, 1, 1, 1]
    for name, each in target.items():
        slots = SLOTS[int(name == "alone")].tolist()
        expected = before[name].clone()
        for k, node in ((1, 2), (2, 3)):
            expected[0, :, slots[k]] = before[name][0, :, slots[node]]
        assert torch.equal(each.kv_cache, expected) and not torch.equal(expected, before[name])
    assert torch.equal(drafter.kv_cache, drafters)
