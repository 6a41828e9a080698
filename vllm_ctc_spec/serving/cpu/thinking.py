"""Kernels of a request's thinking budget: reasoning that has used it up is ended by force."""

import numpy as np

from vllm_ctc_spec.serving.cpu.arrays import arrays

FORCED = np.float32(1e9)


def _last(tokens: np.ndarray, marker: np.ndarray, first: int, end: int) -> int:
    """Where `marker` begins in `tokens` for the last time, at `first` or later and before `end`; -1 if nowhere."""
    begins = range(min(end, len(tokens) - len(marker) + 1) - 1, first - 1, -1)
    return next((begin for begin in begins if np.array_equal(tokens[begin : begin + len(marker)], marker)), -1)


def update_committed_marker_cache(
    req_ids_ptr, thinking_token_budget_ptr, all_token_ids_ptr, all_token_ids_stride, total_len_ptr,
    cached_last_start_ptr, cached_last_end_ptr, cached_scan_pos_ptr, reasoning_start_token_ids_ptr,
    natural_reasoning_end_token_ids_ptr, START_LEN, NATURAL_END_LEN, MAX_LEN, BLOCK,
):  # fmt: skip
    """Where reasoning last began and ended among a request's tokens. The first look goes backwards, by blocks, and only
    as far as the first block with a marker: which came last is all that counts. Later looks read new tokens only."""
    budgets, all_token_ids, total_lens, starts, ends, scanned, start, natural_end = arrays(
        thinking_token_budget_ptr, all_token_ids_ptr, total_len_ptr, cached_last_start_ptr, cached_last_end_ptr,
        cached_scan_pos_ptr, reasoning_start_token_ids_ptr, natural_reasoning_end_token_ids_ptr,
    )  # fmt: skip
    for request in req_ids_ptr.tolist():
        if budgets[request] < 0:
            continue
        total = int(total_lens[request])
        tokens = all_token_ids[request, :total]
        if scanned[request] > total:
            scanned[request], starts[request], ends[request] = 0, -1, -1
        if scanned[request] == 0 and starts[request] < 0 and ends[request] < 0:
            for high in range(total, 0, -BLOCK):
                block = max(high - BLOCK, 0), high
                starts[request], ends[request] = _last(tokens, start, *block), _last(tokens, natural_end, *block)
                if starts[request] >= 0 or ends[request] >= 0:
                    break
        else:
            new = int(scanned[request]), total
            starts[request] = max(starts[request], _last(tokens, start, *new))
            ends[request] = max(ends[request], _last(tokens, natural_end, *new))
        scanned[request] = max(total - (MAX_LEN - 1), 0)


def thinking_budget(
    logits_ptr, logits_stride, expanded_idx_mapping_ptr, thinking_token_budget_ptr, all_token_ids_ptr,
    all_token_ids_stride, total_len_ptr, input_ids_ptr, expanded_local_pos_ptr, cached_last_start_ptr,
    cached_last_end_ptr, reasoning_start_token_ids_ptr, natural_reasoning_end_token_ids_ptr,
    reasoning_end_token_ids_ptr, START_LEN, NATURAL_END_LEN, END_LEN,
):  # fmt: skip
    """Where a row's context is reasoning that has used up the budget, raise the next token of the forced end above all
    others. A row's context is the request's tokens and the drafts before the row."""
    logits, budgets, all_token_ids, total_lens, input_ids, starts, ends, start, natural_end, forced = arrays(
        logits_ptr, thinking_token_budget_ptr, all_token_ids_ptr, total_len_ptr, input_ids_ptr, cached_last_start_ptr,
        cached_last_end_ptr, reasoning_start_token_ids_ptr, natural_reasoning_end_token_ids_ptr,
        reasoning_end_token_ids_ptr,
    )  # fmt: skip
    rows = zip(expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist(), strict=True)
    for row, (request, local_pos) in enumerate(rows):
        budget, total = int(budgets[request]), int(total_lens[request])
        if budget < 0:
            continue
        drafts = input_ids[row - local_pos + 1 : row + 1]
        context = np.concatenate([all_token_ids[request, :total], drafts])
        end = len(context)
        last_start = max(starts[request], _last(context, start, max(total - START_LEN + 1, 0), end))
        last_end = max(ends[request], _last(context, natural_end, max(total - NATURAL_END_LEN + 1, 0), end))
        if last_start <= last_end or end - (last_start + START_LEN) < budget:
            continue
        begun = (length for length in range(END_LEN - 1, 0, -1) if np.array_equal(context[-length:], forced[:length]))
        logits[row, forced[next(begun, 0)]] = FORCED
