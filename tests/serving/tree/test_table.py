"""Trees between steps: a new slot is a chain, inert rows touch no slot."""

import torch

from vllm_ctc_spec.kernels.contract import DraftTree
from vllm_ctc_spec.serving.tree.table import TreeTable

CPU = torch.device("cpu")


def tree(rows: list[list[int]]) -> DraftTree:
    parents = torch.tensor(rows, dtype=torch.int32)
    marks = torch.arange(parents.numel()).view(parents.shape)
    return DraftTree(marks, parents, parents + 100, marks.float(), marks + 7)


def test_a_new_slot_holds_a_chain_of_up_to_64_nodes():
    table = TreeTable(2, 64, CPU)
    assert table.parents[1].tolist() == list(range(-1, 64))
    assert table.depths[1].tolist() == list(range(65))
    words = [word & (2**64 - 1) for word in table.ancestors[1].tolist()]
    assert words == [(1 << node) - 1 for node in range(65)]


def test_trees_are_kept_by_slot_and_forgotten_with_the_request():
    table = TreeTable(3, 2, CPU)
    table.store(torch.tensor([2, -1, 0]), tree([[-1, 0, 0], [-1, 0, 1], [-1, -1, -1]]))
    assert table.parents[:3].tolist() == [[-1, -1, -1], [-1, 0, 1], [-1, 0, 0]]
    assert table.depths[2].tolist() == [99, 100, 100] and table.ancestors[2].tolist() == [7, 8, 9]
    table.reset(2, chain_only=True)
    assert table.parents[2].tolist() == [-1, 0, 1] and table.depths[2].tolist() == [0, 1, 2]
    assert table.chain_only.tolist() == [False, False, True, False]
