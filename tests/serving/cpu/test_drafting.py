"""The drafter's inputs, against vLLM's kernel."""

from types import SimpleNamespace

import pytest
import torch

MAX_REQS, MAX_TOKENS, BLOCK = 6, 64, 8


@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("max_model_len", [200, 45])
def test_prepare_dflash_inputs(agree, from_anchor, max_model_len):
    torch.manual_seed(max_model_len)

    def filled(size, dtype=torch.int32):
        return torch.randint(1000, (size,), dtype=dtype)

    steps = 4
    num_query = steps if from_anchor else 1 + steps
    starts = [0, 5, 6, 14]  # two drafts rejected; nothing rejected; a prefill chunk that sampled nothing
    positions = torch.cat([torch.arange(30, 35), torch.tensor([44]), torch.arange(3, 11), torch.zeros(4)]).long()
    block_table = torch.randint(3, (MAX_REQS, 6), dtype=torch.int32)  # a third of the blocks is the null block
    ours = agree(
        "spec_decode.dflash.speculator.prepare_dflash_inputs",
        SimpleNamespace(
            input_ids=filled(MAX_TOKENS), positions=filled(MAX_TOKENS, torch.int64),
            query_start_loc=filled(MAX_REQS + 1), seq_lens=filled(MAX_REQS), is_padding=torch.rand(MAX_TOKENS) < 0.5,
        ),
        filled(MAX_TOKENS, torch.int64), filled(MAX_TOKENS, torch.int64), filled(MAX_TOKENS, torch.int64),
        filled(MAX_REQS * steps, torch.int64), filled(MAX_REQS * steps, torch.int64),
        filled(MAX_REQS * steps, torch.int64), torch.rand(MAX_REQS), filled(MAX_REQS, torch.int64),
        SimpleNamespace(
            num_reqs=3, num_scheduled_tokens=torch.tensor([5, 1, 8]), positions=positions,
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            idx_mapping=torch.tensor([4, 0, 2], dtype=torch.int32),
        ),
        torch.tensor([3, 1, 0], dtype=torch.int32), torch.tensor([2, 0, 0], dtype=torch.int32),
        filled(MAX_REQS, torch.int64)[:, None], filled(MAX_REQS)[None], torch.rand(MAX_REQS),
        filled(MAX_REQS, torch.int64), block_table, BLOCK, 0, 1, 1, 2, num_query, steps, MAX_REQS, MAX_TOKENS,
        max_model_len, sample_from_anchor=from_anchor,
    )  # fmt: skip
    buffers, slots, context_positions = ours.args[:3]
    assert context_positions[3:5].tolist() == [0, 0]  # the rejected ones
    assert buffers.seq_lens.tolist()[3:] == [0, 0, 0]
    assert (slots[3 * num_query :] == -1).all()
