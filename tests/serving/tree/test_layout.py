"""After a verification the accepted rows come first, and no other row moves."""

import torch

from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict, in_path_order

ANCHOR_ROWS, NUM_ROWS = torch.tensor([1, 5, 9], dtype=torch.int32), 13
VERDICT = Verdict(
    path=torch.tensor([[0, 2, 3, 3], [0, 1, 2, 3], [0, 3, 2, 3]], dtype=torch.int32),
    num_sampled=torch.tensor([3, 0, 2], dtype=torch.int32),
)
IN_PATH_ORDER = [0, 1, 3, 4, 4, 5, 6, 7, 8, 9, 12, 11, 12]


def test_accepted_rows_come_first_and_no_other_row_moves():
    assert in_path_order(ANCHOR_ROWS, VERDICT, NUM_ROWS).tolist() == IN_PATH_ORDER


def test_a_drafter_reads_the_accepted_rows_first():
    layout = TreeLayout.allocate(max_num_reqs=4, max_num_tokens=20, tree_sizes=[3], device=torch.device("cpu"))
    layout.anchor_rows[:3] = ANCHOR_ROWS
    states = [torch.randn(NUM_ROWS, 2), torch.randn(NUM_ROWS + 5, 2)]  # the second with padding
    before = [rows.clone() for rows in states]
    layout.put_path_first(VERDICT, states)
    assert torch.equal(states[0], before[0][IN_PATH_ORDER])
    assert torch.equal(states[1], before[1][[*IN_PATH_ORDER, *range(NUM_ROWS, NUM_ROWS + 5)]])
