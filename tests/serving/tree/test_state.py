"""Trees between steps: a new slot is a chain, inert rows touch no slot, accepted rows come first."""

import torch

from vllm_ctc_spec.kernels.contract import DraftTree
from vllm_ctc_spec.serving.tree.state import TreeStep, TreeTable, in_path_order

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


ROOTS, NUM_ROWS = torch.tensor([1, 5, 9], dtype=torch.int32), 13
PATH = torch.tensor([[0, 2, 3, 3], [0, 1, 2, 3], [0, 3, 2, 3]], dtype=torch.int32)
NUM_SAMPLED = torch.tensor([3, 0, 2], dtype=torch.int32)
IN_PATH_ORDER = [0, 1, 3, 4, 4, 5, 6, 7, 8, 9, 12, 11, 12]


def test_accepted_rows_come_first_and_no_other_row_moves():
    assert in_path_order(ROOTS, PATH, NUM_SAMPLED, NUM_ROWS).tolist() == IN_PATH_ORDER


def test_a_drafter_reads_the_accepted_rows_first():
    step = TreeStep.allocate(max_num_reqs=4, max_num_tokens=20, num_nodes=3, device=CPU)
    step.roots[:3], step.num_reqs, step.path, step.num_sampled = ROOTS, 3, PATH, NUM_SAMPLED
    states = [torch.randn(NUM_ROWS, 2), torch.randn(NUM_ROWS + 5, 2)]  # the second with padding
    before = [rows.clone() for rows in states]
    step.put_path_first(states)
    assert torch.equal(states[0], before[0][IN_PATH_ORDER])
    assert torch.equal(states[1], before[1][[*IN_PATH_ORDER, *range(NUM_ROWS, NUM_ROWS + 5)]])
