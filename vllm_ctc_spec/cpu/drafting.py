"""The kernel that prepares a parallel drafter's forward (DFlash and drafters built on it)."""

import numpy as np

from vllm_ctc_spec.cpu.arrays import arrays


def prepare_dflash_inputs(
    out_input_ids_ptr, out_query_positions_ptr, out_query_start_loc_ptr, out_seq_lens_ptr, out_query_slot_mapping_ptr,
    out_context_positions_ptr, out_context_slot_mapping_ptr, out_sample_indices_ptr, out_sample_pos_ptr,
    out_sample_idx_mapping_ptr, out_temperature_ptr, out_seeds_ptr, target_positions_ptr, target_query_start_loc_ptr,
    idx_mapping_ptr, last_sampled_ptr, next_prefill_tokens_ptr, num_sampled_ptr, num_rejected_ptr, temperature_ptr,
    seeds_ptr, block_table_ptr, block_table_stride, parallel_drafting_token_id, block_size, num_query_per_req,
    num_speculative_steps, max_num_reqs, max_num_tokens, max_model_len, cp_rank, SAMPLE_FROM_ANCHOR, PAD_SLOT_ID,
    CP_SIZE, CP_INTERLEAVE, BLOCK_SIZE,
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
    last_sampled, next_prefill = last_sampled.reshape(-1), next_prefill.reshape(-1)
    starts, num_sampled, num_rejected = (
        p.tolist() for p in (target_query_start_loc_ptr, num_sampled_ptr, num_rejected_ptr)
    )
    queries = np.arange(1, 1 + num_query_per_req)
    skipped = 0 if SAMPLE_FROM_ANCHOR else 1
    samples = np.arange(skipped, skipped + num_speculative_steps)

    def kv_slots(row, at):
        block, offset = np.divmod(at, block_size)
        block = block_table[row, np.minimum(block, block_table_stride - 1)].astype(np.int64)
        return np.where(block != 0, block * block_size + offset, PAD_SLOT_ID)  # block 0 is the null block

    requests = idx_mapping_ptr.tolist()
    for row, request in enumerate(requests):
        start, end = starts[row], starts[row + 1]
        accepted_end = end - num_rejected[row]
        context = target_positions[start:accepted_end]
        context_positions[start:accepted_end] = context
        context_positions[accepted_end:end] = 0
        context_slots[start:accepted_end] = kv_slots(row, context)
        context_slots[accepted_end:end] = PAD_SLOT_ID

        last = int(target_positions[accepted_end - 1])
        query_positions = last + queries
        query = slice(row * num_query_per_req, (row + 1) * num_query_per_req)
        input_ids[query] = parallel_drafting_token_id
        # In chunked prefill nothing was sampled: the prompt's next token is the anchor.
        input_ids[query.start] = last_sampled[request] if num_sampled[row] > 0 else next_prefill[request]
        np.minimum(query_positions, max_model_len - 1, out=positions[query])
        slots[query] = kv_slots(row, query_positions)
        start_loc[row] = query.start
        seq_lens[row] = min(last + 1 + num_query_per_req, max_model_len)

        sample = slice(row * num_speculative_steps, (row + 1) * num_speculative_steps)
        sample_indices[sample] = query.start + samples
        # A frame is sampled at its own position, the anchor at the position it predicts.
        sample_pos[sample] = last + 1 + samples + (1 - skipped)
        sample_requests[sample] = request
        temperatures_out[request] = temperatures[request]
        seeds_out[request] = seeds[request]

    num_reqs = len(requests)
    start_loc[num_reqs : max_num_reqs + 1] = num_reqs * num_query_per_req
    seq_lens[num_reqs:max_num_reqs] = 0
    unused = slice(num_reqs * num_speculative_steps, max_num_reqs * num_speculative_steps)
    sample_indices[unused], sample_pos[unused], sample_requests[unused] = 0, 0, -1
    slots[num_reqs * num_query_per_req : max_num_tokens] = PAD_SLOT_ID
