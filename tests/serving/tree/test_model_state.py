"""Which attention a step takes, for how many rows: decided on the host, and for a CUDA graph when it is captured."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_ctc_spec.serving.tree import attention
from vllm_ctc_spec.serving.tree.layout import Attend, TreeLayout
from vllm_ctc_spec.serving.tree.model_state import TreeModelState
from vllm_ctc_spec.serving.tree.table import TreeTable

NODES, SMALLER, CPU = 4, 2, torch.device("cpu")


@pytest.fixture
def state(monkeypatch) -> TreeModelState:
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda self, *args, **kwargs: {})
    kind = type("State", (TreeModelState,), {
        "trees": TreeTable(8, NODES, CPU), "layout": TreeLayout.allocate(8, 64, [NODES, SMALLER, 0], CPU),
        "compaction": None, "proposer": None,
    })  # fmt: skip
    return object.__new__(kind)


def batch(rows: list[int], tree_rows: list[int]) -> SimpleNamespace:
    """Requests with that many rows, the last of which are tree rows."""
    starts, logits = np.cumsum([0, *rows]).astype(np.int32), np.cumsum([0, *tree_rows]).astype(np.int32)
    return SimpleNamespace(
        num_reqs=len(rows), num_tokens=sum(rows), num_draft_tokens=sum(tree_rows) - len(rows),
        positions=torch.arange(sum(rows)), query_start_loc=torch.from_numpy(starts), query_start_loc_np=starts,
        cu_num_logits=torch.from_numpy(logits), cu_num_logits_np=logits, idx_mapping=torch.arange(len(rows)),
    )  # fmt: skip


def prepare(state: TreeModelState, input_batch, mode=CUDAGraphMode.NONE, **kwargs) -> Attend:
    state.prepare_attn(input_batch, mode, (), torch.zeros(1, 64, dtype=torch.int64), [], None, **kwargs)
    return state.layout.attend


def test_a_step_takes_what_its_rows_need(state):
    assert prepare(state, batch([5, 5, 2], [5, 5, 2])) is Attend.ALL_ROWS
    assert prepare(state, batch([5, 1], [5, 1])) is Attend.ALL_ROWS
    assert prepare(state, batch([5, 30], [5, 1])) is Attend.TREE_ROWS
    assert prepare(state, batch([30, 1], [1, 1])) is Attend.NO_ROWS


@pytest.mark.parametrize(
    ("tree_rows", "max_rows"),
    [([5, 5, 2], 5), ([3, 3], 3), ([3, 1], 3), ([2, 2], 3), ([4, 1], 5), ([1, 5], 5), ([2, 1], 3)],
)
@pytest.mark.parametrize("prompt", [0, 30])
def test_attention_is_launched_for_the_rows_of_a_scheduled_tree_that_hold_all_of_the_batch(
    state, tree_rows, max_rows, prompt
):
    prepare(state, batch([prompt + tree_rows[0], *tree_rows[1:]], tree_rows))
    assert state.layout.max_rows == max_rows >= state.layout.num_rows.max()


def test_attention_is_launched_for_what_a_request_has_and_not_for_1_plus_n(state, monkeypatch):
    """Through the attention layer's own way, with vLLM's metadata."""
    launched = []
    monkeypatch.setattr(attention, "tree_attention", lambda *args: launched.append(args[-1]))
    layer, query, cache = SimpleNamespace(head_size=8, scale=1.0), torch.zeros(10, 1, 8), torch.zeros(1, 1, 16, 16)
    metadata = SimpleNamespace(seq_lens=torch.zeros(2, dtype=torch.int32), block_table=None)
    for tree_rows in ([5, 5], [3, 3], [2, 1]):
        prepare(state, batch(tree_rows, tree_rows))
        attention.attend_tree_rows(layer, state.layout, query, cache, metadata, query)
    assert launched == [5, 3, 3]


@pytest.mark.parametrize(("rows", "attend"), [(1 + NODES, Attend.ALL_ROWS), (3, Attend.ALL_ROWS), (1, Attend.NO_ROWS)])
def test_a_graph_of_verifications_captures_our_attention(state, rows, attend):
    """vLLM captures full graphs with a dummy batch that has no drafts, and says that no graph runs
    (`prepare_inputs_to_capture` in vllm/v1/worker/gpu/cudagraph_utils.py)."""
    buffers = InputBuffers(8, 64, CPU)
    dummy = InputBatch.make_dummy(4, 4 * rows, buffers)
    assert dummy.num_draft_tokens == 0
    assert prepare(state, dummy, for_capture=True) is attend
    assert state.layout.max_rows == rows
    address = state.layout.positions.data_ptr()
    prepare(state, batch([5, 5], [5, 5]), CUDAGraphMode.FULL)
    assert state.layout.positions.data_ptr() == address
    assert state.layout.num_rows.tolist() == [5, 5, 0, 0, 0, 0, 0, 0]


def test_multimodal_rotary_positions_follow_the_depths_in_every_dimension(state, monkeypatch):
    """A verification behind a prompt: both nodes of the second request are children of its anchor."""
    rows = batch([3, 3], [1, 3])
    state.layout.positions[:6] = torch.tensor([0, 1, 2, 3, 4, 4])
    rope = SimpleNamespace(positions=torch.tensor([[7, 7, 7, 9, 10, 11], [7, 8, 9, 12, 13, 14]]))
    monkeypatch.setattr(
        DefaultModelState, "prepare_inputs", lambda self, batch, requests: {"positions": self.rope_state.positions}
    )
    state.rope_state, buffer = rope, rope.positions
    positions = state.prepare_inputs(rows, None)["positions"]
    assert positions is buffer  # CUDA graphs keep its address
    assert positions.tolist() == [[7, 7, 7, 9, 10, 10], [7, 8, 9, 12, 13, 13]]
