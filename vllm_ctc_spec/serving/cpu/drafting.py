"""The kernel that prepares a parallel drafter's forward (DFlash and drafters built on it)."""

import numpy as np

from vllm_ctc_spec.serving.cpu.arrays import arrays


def prepare_dflash_inputs(
    out_input_ids_ptr, out_query_positions_ptr, out_query_start_loc_ptr, out_seq_lens_ptr, out_query_slot_mapping_ptr,
    out_context_positions_ptr, out_context_slot_mapping_ptr, out_sample_indices_ptr, out_sample_pos_ptr,
    out_sample_idx_mapping_ptr, out_temperature_ptr, out_seeds_ptr, target_positions_ptr, target_query_start_loc_ptr,
    idx_mapping_ptr, last_sampled_ptr, next_prefill_tokens_ptr, num_sampled_ptr, num_rejected_ptr, temperature_ptr,
    seeds_ptr, block_table_ptr, block_table_stride, parallel_drafting_token_id, block_size, num_query_per_req,
    num_speculative_steps, max_num_reqs, max_num_tokens, max_model_len, cp_rank, SAMPLE_FROM_ANCHOR, PAD_SLOT_ID,
    CP_SIZE, CP_INTERLEAVE, BLOCK_SIZE, out_is_padding_ptr=None,
):  # fmt: skip
    """Per request: context positions and KV slots of the target's accepted tokens, then the anchor and the mask tokens.

    Rejected tokens get position 0 and PAD_SLOT_ID; rows after the batch are inert (sample mapping -1).
    """
    if CP_SIZE != 1:
        raise NotImplementedError("Context parallelism is not implemented on a CPU.")
    input_ids, positions, start_loc, seq_lens, slots, context_positions, context_slots = arrays(
        out_input_ids_ptr, out_query_positions_ptr, out_query_start_loc_ptr, out_seq_lens_ptr,
        out_query_slot_mapping_ptr, out_context_positions_ptr, out_context_slot_mapping_ptr,
    )  # fmt: skip
    sample_indices, sample_pos, sample_requests, temperatures_out, seeds_out = arrays(
        out_sample_indices_ptr, out_sample_pos_ptr, out_sample_idx_mapping_ptr, out_temperature_ptr, out_seeds_ptr
    )
    target_positions, block_table, temperatures, seeds, last_sampled, next_prefill = arrays(
        target_positions_ptr, block_table_ptr, temperature_ptr, seeds_ptr, last_sampled_ptr, next_prefill_tokens_ptr
    )
    starts, requests, num_sampled, num_rejected = arrays(
        target_query_start_loc_ptr, idx_mapping_ptr, num_sampled_ptr, num_rejected_ptr
    )
    num_reqs = len(requests)
    rows, starts = np.arange(num_reqs), starts[: num_reqs + 1]
    accepted_ends = starts[1:] - num_rejected[:num_reqs]

    def kv_slots(row, at):
        block, offset = np.divmod(at, block_size)
        block = block_table[row, np.minimum(block, block_table_stride - 1)].astype(np.int64)
        return np.where(block != 0, block * block_size + offset, PAD_SLOT_ID)  # block 0 is the null block

    context = slice(int(starts[0]), int(starts[-1]))
    lengths = np.diff(starts)
    is_accepted = np.arange(context.start, context.stop) < np.repeat(accepted_ends, lengths)
    context_positions[context] = np.where(is_accepted, target_positions[context], 0)
    accepted_slots = kv_slots(np.repeat(rows, lengths), target_positions[context])
    context_slots[context] = np.where(is_accepted, accepted_slots, PAD_SLOT_ID)

    anchor = target_positions[accepted_ends - 1] + 1  # [num_reqs], its position
    query_positions = anchor[:, None] + np.arange(num_query_per_req)
    num_queries = num_reqs * num_query_per_req
    input_ids[:num_queries] = parallel_drafting_token_id
    # In chunked prefill nothing was sampled: the prompt's next token is the anchor.
    input_ids[:num_queries:num_query_per_req] = np.where(
        num_sampled[:num_reqs] > 0, last_sampled.reshape(-1)[requests], next_prefill.reshape(-1)[requests]
    )
    positions[:num_queries] = np.minimum(query_positions, max_model_len - 1).reshape(-1)
    slots[:num_queries] = kv_slots(rows[:, None], query_positions).reshape(-1)
    slots[num_queries:max_num_tokens] = PAD_SLOT_ID
    if out_is_padding_ptr is not None:
        out_is_padding_ptr[:num_queries] = False
        out_is_padding_ptr[num_queries:max_num_tokens] = True
        input_ids[num_queries:max_num_tokens] = positions[num_queries:max_num_tokens] = 0
    start_loc[:num_reqs] = rows * num_query_per_req
    start_loc[num_reqs : max_num_reqs + 1] = num_queries
    seq_lens[:num_reqs] = np.minimum(anchor + num_query_per_req, max_model_len)
    seq_lens[num_reqs:max_num_reqs] = 0

    # A mask token is sampled at its own position, the anchor (where it is) at the position after it.
    sampled_queries = np.arange(num_speculative_steps) + (0 if SAMPLE_FROM_ANCHOR else 1)
    num_samples, max_samples = num_reqs * num_speculative_steps, max_num_reqs * num_speculative_steps
    sample_indices[:num_samples] = (rows[:, None] * num_query_per_req + sampled_queries).reshape(-1)
    sample_pos[:num_samples] = (anchor[:, None] + sampled_queries + int(SAMPLE_FROM_ANCHOR)).reshape(-1)
    sample_requests[:num_samples] = np.repeat(requests, num_speculative_steps)
    for buffer, unused in ((sample_indices, 0), (sample_pos, 0), (sample_requests, -1)):
        buffer[num_samples:max_samples] = unused
    temperatures_out[requests], seeds_out[requests] = temperatures[requests], seeds[requests]
