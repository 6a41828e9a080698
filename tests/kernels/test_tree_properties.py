"""Properties of what happens to trees, with hypothesis: mask, layout, walk and compaction of whatever tree comes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv
from vllm_ctc_spec.kernels.tree_layout import tree_layout
from vllm_ctc_spec.kernels.tree_mask import tree_mask
from vllm_ctc_spec.kernels.tree_walk import tree_walk

from ..oracle.trees import starts, tree_tables

NUM_SLOTS = 48


@st.composite
def trees(draw, max_nodes=64) -> list[int]:
    """Parents, the anchor's first: any tree of up to that many nodes."""
    reach = draw(st.sampled_from([1, 2, 64]))  # a chain, nearly a chain, anything
    num_nodes = draw(st.integers(0, max_nodes))
    return [-1] + [draw(st.integers(max(0, node - reach), node - 1)) for node in range(1, num_nodes + 1)]


def test_the_mask_is_the_transitive_closure(examples):
    @examples(60)
    @given(trees())
    def holds(parents):
        size = len(parents)
        reaches = torch.eye(size)
        reaches[range(1, size), parents[1:]] = 1
        for _ in range(6):  # paths of up to 64 steps
            reaches = (reaches @ reaches > 0).float()
        depths, ancestors = tree_mask(torch.tensor([parents], dtype=torch.int32))
        for row in range(1, size):
            bits = int(ancestors[0, row]) & (2**64 - 1)
            assert [bits >> (column - 1) & 1 for column in range(1, size)] == reaches[row, 1:].tolist()
            assert bits.bit_count() == depths[0, row]
        assert (depths[0, 0], ancestors[0, 0]) == (0, 0)

    holds()


@st.composite
def steps(draw) -> tuple[list[list[int]], list[int], torch.Tensor, torch.Tensor]:
    """Trees of one to three requests, rows of each that are verified, and tokens of the draft and of the target. Few
    tokens, siblings that may be equal, targets that often hit."""
    forest = draw(st.lists(trees(12), min_size=1, max_size=3))
    rows = [draw(st.integers(0, len(tree))) for tree in forest]
    tokens = [torch.tensor(draw(st.lists(st.integers(-1, 2), min_size=sum(rows), max_size=sum(rows)))) for _ in "dt"]
    return forest, rows, tokens[0].long(), tokens[1].long()


def test_the_walk_is_a_path_from_the_root_that_the_target_spells(examples):
    @examples(100)
    @given(steps())
    def holds(step):
        forest, rows, draft, target = step
        parents, _, _ = tree_tables(forest, 13)
        requests = torch.arange(len(forest), dtype=torch.int32)
        sampled, num_sampled, path = tree_walk(target, draft, parents, requests, starts(rows))
        for request, (tree, count, first) in enumerate(zip(forest, rows, starts(rows).tolist())):
            length = int(num_sampled[request])
            nodes, tokens = path[request, :length].tolist(), sampled[request, :length].tolist()
            assert (length == 0) == (count == 0) and nodes[:1] == [0] * min(length, 1)
            assert path[request, length:].tolist() == list(range(length, 13))
            assert tokens == [int(target[first + node]) for node in nodes]
            for above, node, token in zip(nodes, nodes[1:], tokens):
                assert tree[node] == above and draft[first + node] == token >= 0
            if nodes:  # it ends only where no child, behind the last node, has the target's token
                last, token = nodes[-1], tokens[-1]
                assert not any(tree[node] == last and draft[first + node] == token >= 0 for node in range(1, count))

    holds()


def test_layout_gives_a_path_the_positions_of_a_sequence(examples):
    @examples(60)
    @given(st.lists(trees(12), min_size=1, max_size=3), st.data())
    def holds(forest, data):
        prompts = [data.draw(st.integers(0, 3)) for _ in forest]
        rows = [data.draw(st.integers(1, len(tree))) for tree in forest]
        _, depths, ancestors = tree_tables(forest, 13)
        counted = torch.cat([torch.arange(prompt + count) + 5 for prompt, count in zip(prompts, rows)])
        total = len(counted)
        out = [
            torch.full((total + 2,), -7, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int32, torch.int64)
        ]
        requests = torch.arange(len(forest), dtype=torch.int32)
        boundaries = starts([prompt + count for prompt, count in zip(prompts, rows)])
        tree_layout(counted, boundaries, starts(rows), requests, depths, ancestors, out[0], TreeRows(*out[1:]))
        positions, anchor_rows, num_rows, bits = (values.tolist() for values in out)
        for request, (tree, prompt, count) in enumerate(zip(forest, prompts, rows)):
            root = int(boundaries[request]) + prompt
            assert (anchor_rows[request], num_rows[request]) == (root, count)
            assert positions[root - prompt : root + 1] == list(range(5, 6 + prompt)) and not any(
                bits[root - prompt : root + 1]
            )
            for node in range(1, count):
                assert positions[root + node] == positions[root + tree[node]] + 1
        assert positions[total:] == bits[total:] == [0, 0]

    holds()


def test_compaction_moves_accepted_entries_and_nothing_else(examples):
    """After it, the slots of the first rows hold the accepted nodes in order; every other slot keeps its entry."""

    @examples(100)
    @given(st.data())
    def holds(data):
        block_size = data.draw(st.sampled_from([1, 2, 4]))
        forest = data.draw(st.lists(trees(12), min_size=1, max_size=3))
        width, rows = 13, [len(tree) for tree in forest]
        paths = []
        for tree in forest:
            nodes = [0]
            while children := [node for node, parent in enumerate(tree) if parent == nodes[-1]]:
                if not data.draw(st.booleans()):
                    break
                nodes.append(data.draw(st.sampled_from(children)))
            paths.append(nodes)
        slot_mapping = torch.tensor(data.draw(st.permutations(range(NUM_SLOTS)))[: sum(rows)])
        accepted = [
            root + node for root, nodes in zip(starts(rows).tolist(), paths) for node in (*nodes, *range(len(nodes)))
        ]
        gone = data.draw(st.lists(st.sampled_from(accepted), max_size=3))
        slot_mapping[gone] = -1  # a row without a slot
        entries = torch.arange(2.0 * NUM_SLOTS * 8)  # two layers, two heads, four numbers
        caches = [layer.clone() for layer in entries.view(2, NUM_SLOTS // block_size, 2, block_size, 4)]
        before = [cache.clone() for cache in caches]
        padded = [nodes + list(range(len(nodes), width)) for nodes in paths]
        compact_kv(
            CachePointers(caches), slot_mapping, starts(rows)[:-1], torch.tensor(padded, dtype=torch.int32),
            torch.tensor([len(nodes) for nodes in paths], dtype=torch.int32),
        )  # fmt: skip
        content = {slot: slot for slot in range(NUM_SLOTS)}  # which entry each slot must hold now
        for root, nodes in zip(starts(rows).tolist(), paths):
            for k, node in enumerate(nodes):
                source, target = int(slot_mapping[root + node]), int(slot_mapping[root + k])
                if source >= 0 and target >= 0:
                    content[target] = source
        for cache, old in zip(caches, before):
            for slot, source in content.items():
                now = cache[slot // block_size, :, slot % block_size]
                assert torch.equal(now, old[source // block_size, :, source % block_size])

    holds()
