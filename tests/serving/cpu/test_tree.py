"""Tree attention over the CPU's paged cache: against the kernel's dense reference, and a chain against vLLM's own."""

import random
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_attention import tree_attention
from vllm_ctc_spec.kernels.tree_mask import tree_mask
from vllm_ctc_spec.serving.cpu.tree import CpuPathCompaction, attend_tree_rows, check_layout, views
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict

REQUESTS = [(37, 5), (0, 17), (100, 1), (200, 9), (63, 65), (128, 3)]  # positions before the anchor, tree rows
NUM_BLOCKS, MAX_ROWS = 40, 65
UNWRITTEN = 7.5


class Layer:
    """What an attention layer of vLLM's CPU backend has, as far as the cache is concerned."""

    def __init__(self, num_kv_heads: int, head_size: int, block_size: int, num_heads: int):
        self.head_size, self.isa = head_size, "vec" if head_size % 32 == 0 else "vec16"
        self.kv_cache = torch.full((NUM_BLOCKS, num_kv_heads, block_size, 2 * head_size), torch.nan)
        self.kv_sharing_target_layer_name = None
        self.impl = self
        self.num_queries_per_kv, self.scale = num_heads // num_kv_heads, head_size**-0.5

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        keys, values = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, 2)
        ops.cpu_attn_reshape_and_cache(
            key, value, keys, values, slot_mapping, self.isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )


class Batch:
    """REQUESTS with random trees (or chains), their context and rows written to the cache by vLLM's own operation."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, block_size: int, chains: bool):
        generator, rng = torch.Generator().manual_seed(head_size), random.Random(block_size)
        self.layer = Layer(num_kv_heads, head_size, block_size, num_heads)
        blocks = iter(rng.sample(range(1, NUM_BLOCKS), NUM_BLOCKS - 1))
        lengths = [before + rows for before, rows in REQUESTS]
        self.block_table = torch.zeros(len(REQUESTS), max(lengths) // block_size + 1, dtype=torch.int32)
        total = sum(rows for _, rows in REQUESTS)
        self.query = torch.randn(total, num_heads, head_size, generator=generator)
        self.layout = TreeLayout.allocate(len(REQUESTS), total, [MAX_ROWS - 1], torch.device("cpu"))
        self.dense = torch.zeros(2, NUM_BLOCKS, block_size, num_kv_heads, head_size)
        self.slots, root = [], 0
        for r, (before, rows) in enumerate(REQUESTS):
            for i in range(-(-lengths[r] // block_size)):
                self.block_table[r, i] = next(blocks)
            entries = torch.randn(2, lengths[r], num_kv_heads, head_size, generator=generator)
            at = torch.arange(lengths[r])
            slots = self.block_table[r, at // block_size] * block_size + at % block_size
            self.layer.do_kv_cache_update(self.layer, *entries, self.layer.kv_cache, slots.long())
            self.dense.flatten(1, 2)[:, slots.long()] = entries
            parents = [-1] + [node - 1 if chains else rng.randrange(node) for node in range(1, rows)]
            _, ancestors = tree_mask(torch.tensor([parents], dtype=torch.int32))
            self.layout.ancestors[root : root + rows] = ancestors[0]
            self.layout.anchor_rows[r], self.layout.num_rows[r] = root, rows
            self.slots.append(slots[before:])
            root += rows
        self.metadata = SimpleNamespace(seq_lens=torch.tensor(lengths, dtype=torch.int32), block_table=self.block_table)

    def attend(self) -> torch.Tensor:
        output = torch.full_like(self.query, UNWRITTEN)
        layer = self.layer
        attend_tree_rows(layer, self.layout, self.query, layer.kv_cache, self.metadata, output)
        return output


SHAPES = [(4, 4, 64, 128), (4, 1, 32, 32), (6, 2, 48, 128)]  # heads, KV heads, head size, block size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trees_against_the_dense_reference(shape):
    batch = Batch(*shape, chains=False)
    expected = torch.empty_like(batch.query)
    tree_attention(
        batch.query, *batch.dense, expected, batch.block_table, batch.metadata.seq_lens,
        TreeRows(batch.layout.anchor_rows, batch.layout.num_rows, batch.layout.ancestors), batch.layer.scale, MAX_ROWS,
    )  # fmt: skip
    torch.testing.assert_close(batch.attend(), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tree_that_is_a_chain_equals_vllms_attention(shape):
    num_heads, num_kv_heads, head_size, block_size = shape
    batch = Batch(*shape, chains=True)
    layer, output = batch.layer, torch.empty_like(batch.query)
    layer.kv_cache.nan_to_num_(0.0)  # vLLM multiplies what it has not written by 0
    starts = torch.tensor([0, *(rows for _, rows in REQUESTS)]).cumsum(0).int()
    scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(REQUESTS), num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_size,
        seq_lens=batch.metadata.seq_lens, dtype=torch.float32, query_start_loc=starts, causal=True,
        sliding_window_size=-1, isa=layer.isa, enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    keys, values = layer.kv_cache.view(NUM_BLOCKS, num_kv_heads, 2 * block_size, -1).chunk(2, 2)
    ops.cpu_attention_with_kv_cache(
        query=batch.query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts,
        seq_lens=batch.metadata.seq_lens, scale=layer.scale, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=batch.block_table, softcap=0, scheduler_metadata=scheduler_metadata, s_aux=None,
        dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    torch.testing.assert_close(batch.attend(), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_accepted_path_moves_to_the_front(shape):
    batch = Batch(*shape, chains=False)
    layer, layout = batch.layer, batch.layout
    keys, values = views(layer.kv_cache)
    # Emitted tokens and the accepted nodes; the last request is in the middle of its prompt.
    accepted = [(1, [0]), (4, [0, 2, 5, 16]), (1, [0]), (3, [0, 1, 8]), (5, [0, 1, 2, 3, 64]), (0, [])]

    def entries(slots):
        at = [divmod(int(slot), shape[3]) for slot in slots]
        return [(keys[block, :, :, offset], values[block, :, offset]) for block, offset in at]

    expected = [[(k.clone(), v.clone()) for k, v in entries(s[path])] for s, (_, path) in zip(batch.slots, accepted)]
    layout.slot_mappings = torch.cat(batch.slots)[None].long()
    verdict = Verdict(
        path=torch.arange(MAX_ROWS).repeat(len(REQUESTS), 1).int(),
        num_sampled=torch.tensor([count for count, _ in accepted], dtype=torch.int32),
    )
    for r, (_, path) in enumerate(accepted):
        verdict.path[r, : len(path)] = torch.tensor(path, dtype=torch.int32)
    compaction = CpuPathCompaction({"layer": layer})
    compaction.bind(SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=["layer", "drafter's"])]))
    compaction.run(layout, verdict)
    for slots, (count, _), wanted in zip(batch.slots, accepted, expected):
        for given, right in zip(entries(slots[:count]), wanted, strict=True):
            assert torch.equal(given[0], right[0]) and torch.equal(given[1], right[1])


def test_another_layout_of_keys_is_refused():
    layer = Layer(2, 64, 128, 2)
    check_layout(layer)

    def in_rows(_, key, value, kv_cache, slot_mapping):
        halves = kv_cache.view(*kv_cache.shape[:2], -1, key.shape[2])
        halves[0, :, : len(key)], halves[0, :, len(key) :] = key.transpose(0, 1), value.transpose(0, 1)

    layer.do_kv_cache_update = in_rows
    with pytest.raises(DrafterConfigError, match="trees do not work with the instruction set 'vec'"):
        check_layout(layer)
