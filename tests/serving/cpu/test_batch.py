"""Block tables and input batch, against vLLM's kernels."""

import pytest
import torch

from ...releases import SINCE_33

MAX_REQS, MAX_LEN = 8, 64
PAD = -1


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def tokens(*shape, high=1000, dtype=torch.int32):
    return torch.randint(high, shape, dtype=dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_apply_write(agree, dtype):
    output = tokens(5, 20).to(dtype)
    # Row 3 is written twice, one write is empty.
    rows, starts, ends = ints([3, 0, 3, 1]), ints([2, 0, 6, 19]), ints([4, 4, 11, 12])
    contents = tokens(12).to(dtype)
    ours = agree(
        "buffer_utils._apply_write_kernel", output, 20, rows, starts, contents, ends, None,
        BLOCK_SIZE=4, MULTI_GROUP=False, grid=(4, 2),
    )  # fmt: skip
    assert (ours.args[0][3, 2:6] == contents[:4]).all()


def test_apply_write_of_several_groups(agree):
    groups = [tokens(4, 10), tokens(4, 16), tokens(4, 6)]
    ours = agree(
        "buffer_utils._apply_write_kernel", groups, ints([10, 16, 6], torch.int64), ints([1, 0, 3]), ints([2, 7, 0]),
        tokens(11), ints([3, 9, 11]), ints([0, 1, 2]), BLOCK_SIZE=4, MULTI_GROUP=True, grid=(3, 2),
    )  # fmt: skip
    assert not torch.equal(ours.args[0][1], groups[1])


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.skipif(not SINCE_33, reason="0.33"))])
def test_gather_block_tables(agree, masked):
    sources, targets = [tokens(MAX_REQS, 5), tokens(MAX_REQS, 9)], [tokens(MAX_REQS, 5), tokens(MAX_REQS, 9)]
    num_blocks = tokens(2, MAX_REQS, high=6)
    requests = ints([6, 0, 3])
    theirs_pad = MAX_REQS  # every row after the batch is zeroed
    # The second group has a window: its 20 tokens begin in block 0, in block 1 and in block 5 of 4 tokens each.
    windows = tokens(MAX_REQS, high=9), ints([0, 20]), ints([16, 4])
    windows[0][requests] = ints([19, 24, 43])
    agree(
        "block_table._gather_block_tables_kernel", requests, sources, targets, ints([5, 9], torch.int64), num_blocks,
        MAX_REQS, 3, *(windows if SINCE_33 else ()), **({"MASK_SLIDING_WINDOW": masked} if SINCE_33 else {}),
        BLOCK_SIZE=4, grid=(2, theirs_pad),
    )  # fmt: skip


def test_gather_block_tables_reads_the_table_as_it_is_now(agree):
    """The views of the tables are cached by address."""
    for _ in range(3):
        test_gather_block_tables(agree, masked=False)


def test_compute_slot_mappings(agree):
    tables = [tokens(MAX_REQS, 8), tokens(MAX_REQS, 16), tokens(MAX_REQS, 8)]
    starts = ints([0, 5, 6, 9, 9])
    positions = torch.cat([torch.arange(20, 25), ints([63]), torch.arange(3), tokens(4)]).to(torch.int64)
    slots = tokens(3, 16, dtype=torch.int64)
    ours = agree(
        "block_table._compute_slot_mappings_kernel", 16, ints([4, -1, 7, 0]), starts, positions, tables,
        ints([8, 16, 8], torch.int64), ints([8, 4, 8]), torch.tensor([True, True, False]),
        torch.tensor([True] * 3), slots, slots.stride(0), 0,
        CP_SIZE=1, CP_INTERLEAVE=1, PAD_ID=PAD, TRITON_BLOCK_SIZE=4, grid=(3, 5),
    )  # fmt: skip
    slots = ours.args[9]
    assert (slots[:, 9:] == PAD).all() and (slots[:, 5] == PAD).all() and (slots[2] == PAD).all()
    assert slots[1, 0] == tables[1][4, 5] * 4


def test_compute_slot_mappings_refuses_context_parallelism(both):
    with pytest.raises(RuntimeError, match="Context parallelism is not implemented"):
        both(
            "block_table._compute_slot_mappings_kernel", 4, ints([0]), ints([0, 1]), ints([0], torch.int64),
            [tokens(1, 4)], ints([4], torch.int64), ints([4]), torch.tensor([True]), torch.tensor([True]),
            tokens(1, 4, dtype=torch.int64), 4, 0, CP_SIZE=2, CP_INTERLEAVE=1, PAD_ID=PAD, TRITON_BLOCK_SIZE=4,
            grid=(1, 2),
        )  # fmt: skip


@pytest.mark.parametrize("lookahead", [1, 3])
def test_prepare_prefill_inputs(agree, lookahead):
    # Decoding, a first chunk, a middle chunk, a last chunk, a chunk whose lookahead passes the end.
    requests, starts = ints([2, 5, 0, 7, 1]), ints([0, 1, 6, 12, 15, 18])
    prefill_len, computed = ints([20, 19, 9, 0, 0, 12, 0, 10]), ints([4, 14, 9, 0, 0, 0, 0, 7])
    following = tokens(lookahead, MAX_REQS)
    agree(
        "input_batch.prepare_prefill_inputs", tokens(20), following, requests, starts, tokens(MAX_REQS, MAX_LEN),
        prefill_len, computed,
    )  # fmt: skip


def test_prepare_pos_seq_lens(agree):
    positions = tokens(20, dtype=torch.int64)
    agree(
        "input_batch.prepare_pos_seq_lens", ints([6, 1, 3]), ints([0, 1, 7, 11]), tokens(MAX_REQS, high=40), positions,
        tokens(MAX_REQS),
    )  # fmt: skip


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_combine_sampled_and_draft_tokens(agree, new_tokens):
    # No draft, four drafts, prefill, a step that starts on the prompt's last token, two drafts.
    counts = ints([1, 5, 1, 3, 3])
    bounds = torch.cat([ints([0]), counts.cumsum(0)]).to(torch.int32)
    starts = ints([0, 1, 6, 14, 17, 20])
    requests = ints([3, 0, 7, 2, 5])
    seq_lens, prefill_len = ints([30, 25, 8, 12, 14]), ints([20, 0, 11, 30, 0, 10, 0, 9])
    ours = agree(
        "input_batch.combine_sampled_and_draft_tokens", tokens(24), requests, tokens(MAX_REQS, 1, dtype=torch.int64),
        starts, seq_lens, prefill_len, tokens(MAX_REQS, 5, dtype=torch.int64), bounds, int(counts.sum()),
        num_new_sampled_tokens=new_tokens,
    )  # fmt: skip
    assert ours.result.tolist()[:6] == [0, 1, 2, 3, 4, 5]


def test_get_num_sampled_and_rejected(agree):
    agree(
        "input_batch.get_num_sampled_and_rejected", ints([1, 3, 1, 5]), ints([10, 20, 30, 9]), ints([0, 1, 6, 7, 12]),
        ints([4, 2, 0, 1]), ints([30, 9, 20, 0, 16, 0, 0, 0]),
    )  # fmt: skip


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("located", [True, False])
def test_post_update(agree, counted, located):
    sampled = tokens(5, 4, high=50, dtype=torch.int64)
    sampled[2, :3] = 7  # one token several times in a step
    agree(
        "input_batch.post_update", ints([3, -1, 6, 0, 2]), tokens(MAX_REQS), tokens(MAX_REQS, 1, dtype=torch.int64),
        tokens(MAX_REQS, 50) if counted else None, sampled, ints([1, 2, 3, 0, 4]), ints([0, 1, 2, 0, 0]),
        ints([0, 4, 8, 12, 19, 23]) if located else None, tokens(MAX_REQS, MAX_LEN), tokens(MAX_REQS, high=MAX_LEN - 4),
    )  # fmt: skip


def test_post_update_num_computed_tokens(agree):
    agree("input_batch.post_update_num_computed_tokens", ints([5, 0, 3]), tokens(MAX_REQS), ints([0, 2, 3, 9]))


def test_expand_idx_mapping(agree):
    ours = agree("input_batch.expand_idx_mapping", ints([5, 0, -1, 3]), 9, ints([0, 1, 5, 6, 9]), 4)
    assert ours.result[1].tolist() == [0, 0, 1, 2, 3, 0, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_prompt_embeds(agree, dtype):
    """A request without embeddings, a whole prompt, a chunk in its middle, a mixed prompt that decodes afterwards, and
    one whose prompt was computed before."""
    hidden, lengths = 6, ints([0, 5, 9, 3, 4])
    inputs = torch.randn(20, hidden + 2).to(dtype)[:, :hidden]
    embeds = [torch.randn(int(n), hidden).to(dtype) for n in lengths]
    mixed = torch.tensor([0, 1, 0], dtype=torch.uint8)
    masks = [torch.empty(0, dtype=torch.uint8)] * 3 + [mixed, torch.empty(0, dtype=torch.uint8)]
    ours = agree(
        "model_states.prompt_embeds._apply_prompt_embeds_kernel", inputs, inputs.stride(0), embeds, masks, lengths,
        ints([4, 3, 0, 2, 1]), ints([0, 1, 6, 8, 12, 17]), ints([0, 0, 4, 0, 4]),
        hidden_size=hidden, TOKEN_BLOCK=16, BLOCK_SIZE=8, grid=(5, 1),
    )  # fmt: skip
    rows = ours.args[0]
    assert torch.equal(rows[1], embeds[3][0]) and torch.equal(rows[2], inputs[2])
    assert torch.equal(rows[8:12], embeds[2][4:8]) and torch.equal(rows[12:17], embeds[1])
    assert torch.equal(rows[0], inputs[0]) and torch.equal(rows[4:8], inputs[4:8])


def test_prepare_rope_positions(agree):
    """Two prompts' chunks, one that begins and one that goes on, and two requests that decode, one of them drafts."""
    dims, requests = 3, ints([2, 0, 3, 1])
    positions = torch.zeros(dims, 21, dtype=torch.int64)
    ours = agree(
        "mm.rope._prepare_rope_positions_kernel", positions, positions.stride(0), tokens(MAX_REQS * dims, MAX_LEN),
        dims * MAX_LEN, MAX_LEN, ints([-4, -7, 0, 5, 0, 0, 0, 0]), requests, ints([0, 6, 10, 11, 16]),
        ints([20, 9, 6, 12, 0, 0, 0, 0]), ints([8, 13, 0, 12, 0, 0, 0, 0]), BLOCK_SIZE=4, NUM_DIMS=dims, grid=(4,),
    )  # fmt: skip
    written = ours.args[0]
    assert torch.equal(written[:, 11:16], torch.arange(6, 11).expand(dims, 5)) and (written[:, 16:] == 0).all()
