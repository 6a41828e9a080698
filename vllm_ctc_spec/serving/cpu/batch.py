"""Kernels of the block tables and the input batch: writes of new requests, slots, positions, bookkeeping of a step.

Batch rows are few, so most of these loop over the rows in Python and copy whole slices.
"""

import ctypes

import numpy as np

from vllm_ctc_spec.serving.cpu.arrays import arrays, int32_table


def apply_write(
    output_ptr, output_stride, write_indices_ptr, write_starts_ptr, write_contents_ptr, write_cu_lens_ptr,
    write_group_ids_ptr, BLOCK_SIZE, MULTI_GROUP,
):  # fmt: skip
    """Copy piece `i` of the flat contents to row `indices[i]`, column `starts[i]` of the output (of its group)."""
    contents = write_contents_ptr.numpy()
    writes = zip(write_indices_ptr.tolist(), write_starts_ptr.tolist(), write_cu_lens_ptr.tolist(), strict=True)
    begin = 0
    if MULTI_GROUP:
        addresses, strides, groups = output_ptr.tolist(), output_stride.tolist(), write_group_ids_ptr.tolist()
        for group, (row, start, end) in zip(groups, writes, strict=True):
            target = addresses[group] + contents.itemsize * (row * strides[group] + start)
            source = contents.ctypes.data + contents.itemsize * begin
            ctypes.memmove(target, source, contents.itemsize * (end - begin))
            begin = end
        return
    output = output_ptr.numpy().reshape(-1)
    for row, start, end in writes:
        offset = row * output_stride + start
        output[offset : offset + end - begin] = contents[begin:end]
        begin = end


def gather_block_tables(
    batch_idx_to_req_idx, src_block_table_ptrs, dst_block_table_ptrs, block_table_strides, num_blocks_ptr,
    num_blocks_stride, num_reqs, BLOCK_SIZE, num_computed_tokens_ptr=None, sliding_window_reach_ptr=None,
    block_sizes_ptr=None, MASK_SLIDING_WINDOW=False,
):  # fmt: skip
    """Copy each request's used blocks to its batch row, for every KV cache group; zero the rows after the batch, and
    the blocks that lie before every window of the step."""
    num_blocks = num_blocks_ptr.numpy()
    rows = num_blocks.shape[1]
    requests = batch_idx_to_req_idx.tolist()[:num_reqs]
    sources, targets, strides = (p.tolist() for p in (src_block_table_ptrs, dst_block_table_ptrs, block_table_strides))
    for group, columns in enumerate(strides):
        source = int32_table(sources[group], rows, columns)
        target = int32_table(targets[group], rows, columns)
        for row, request in enumerate(requests):
            used = num_blocks[group, request]
            target[row, :used] = source[request, :used]
            if MASK_SLIDING_WINDOW and sliding_window_reach_ptr[group] > 0:
                first_seen = int(num_computed_tokens_ptr[request]) - int(sliding_window_reach_ptr[group])
                target[row, : min(max(first_seen, 0) // int(block_sizes_ptr[group]), used)] = 0
        target[num_reqs:] = 0


def compute_slot_mappings(
    max_num_tokens, idx_mapping, query_start_loc, pos, block_table_ptrs, block_table_strides, block_sizes,
    slot_mapping_enabled, dcp_sharded, slot_mappings_ptr, slot_mappings_stride, cp_rank, CP_SIZE, CP_INTERLEAVE, PAD_ID,
    TRITON_BLOCK_SIZE,
):  # fmt: skip
    """The KV slot of each token, per group: `table[request, pos // size] * size + pos % size`; PAD_ID elsewhere."""
    if CP_SIZE != 1:
        raise NotImplementedError("Context parallelism is not implemented on a CPU.")
    requests, starts, positions, slot_mappings = arrays(idx_mapping, query_start_loc, pos, slot_mappings_ptr)
    starts = starts[: len(requests) + 1]
    first, last = int(starts[0]), int(starts[-1])
    request = np.repeat(requests, np.diff(starts))
    is_real = request >= 0  # -1 marks a dummy request, which owns no blocks
    request = np.maximum(request, 0)
    positions = positions[first:last]
    rows = int(requests.max(initial=0)) + 1
    groups = zip(
        block_table_ptrs.tolist(), block_table_strides.tolist(), block_sizes.tolist(), slot_mapping_enabled.tolist(),
        slot_mappings, strict=True,
    )  # fmt: skip
    for address, columns, block_size, enabled, slots in groups:
        slots[last:max_num_tokens] = PAD_ID
        if not enabled:
            slots[first:last] = PAD_ID
            continue
        block, offset = np.divmod(positions, block_size)
        # A dummy request may stand at any position, also behind the end of the table.
        block = int32_table(address, rows, columns)[request, np.minimum(block, columns - 1)].astype(np.int64)
        slots[first:last] = np.where(is_real, block * block_size + offset, PAD_ID)


def prepare_prefill_inputs(
    input_ids_ptr, next_prefill_tokens_ptr, next_prefill_tokens_stride, num_lookahead, idx_mapping_ptr,
    query_start_loc_ptr, all_token_ids_ptr, all_token_ids_stride, prefill_lens_ptr, num_computed_tokens_ptr, BLOCK_SIZE,
    LOOKAHEAD_BLOCK,
):  # fmt: skip
    """For requests in prefill: write the scheduled tokens, and the `num_lookahead` after them (0 past the end)."""
    input_ids, following, starts, all_token_ids, prefill_lens, num_computed = arrays(
        input_ids_ptr, next_prefill_tokens_ptr, query_start_loc_ptr, all_token_ids_ptr, prefill_lens_ptr,
        num_computed_tokens_ptr,
    )  # fmt: skip
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        computed, prefill_len = num_computed[request], prefill_lens[request]
        if computed >= prefill_len:
            continue
        start, end = starts[row], starts[row + 1]
        scheduled = computed + end - start
        input_ids[start:end] = all_token_ids[request, computed:scheduled]
        ahead = all_token_ids[request, scheduled : min(scheduled + num_lookahead, prefill_len)]
        following[:num_lookahead, request] = 0
        following[: len(ahead), request] = ahead


def prepare_pos_seq_lens(
    pos_ptr, seq_lens_ptr, idx_mapping_ptr, query_start_loc_ptr, num_computed_tokens_ptr, max_num_reqs, BLOCK_SIZE
):
    """The position of every scheduled token, and each request's length after this step (0 in the padding rows)."""
    positions, seq_lens, requests, starts, num_computed = arrays(
        pos_ptr, seq_lens_ptr, idx_mapping_ptr, query_start_loc_ptr, num_computed_tokens_ptr
    )
    num_reqs = len(requests)
    starts = starts[: num_reqs + 1]
    computed, query_lens = num_computed[requests], np.diff(starts)
    np.add(computed, query_lens, out=seq_lens[:num_reqs])
    seq_lens[num_reqs:max_num_reqs] = 0
    first, last = int(starts[0]), int(starts[-1])
    positions[first:last] = np.arange(first, last) + np.repeat(computed - starts[:-1], query_lens)


def combine_sampled_and_draft_tokens(
    input_ids_ptr, idx_mapping_ptr, last_sampled_tokens_ptr, query_start_loc_ptr, seq_lens_ptr, prefill_len_ptr,
    draft_tokens_ptr, draft_tokens_stride, cu_num_logits_ptr, logits_indices_ptr, BLOCK_SIZE, NUM_NEW_SAMPLED_TOKENS=1,
):  # fmt: skip
    """Write the last sampled token and the drafts to the input's end; list the input rows that need logits."""
    input_ids, last_sampled, seq_lens, prefill_lens, drafts, logits_indices = arrays(
        input_ids_ptr, last_sampled_tokens_ptr, seq_lens_ptr, prefill_len_ptr, draft_tokens_ptr, logits_indices_ptr
    )
    last_sampled = last_sampled.reshape(-1)
    ends, bounds = query_start_loc_ptr.tolist(), cu_num_logits_ptr.tolist()
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        num_logits = bounds[row + 1] - bounds[row]
        num_drafts = num_logits - NUM_NEW_SAMPLED_TOKENS
        end, seq_len, prefill_len = ends[row + 1], seq_lens[row], prefill_lens[request]
        logits_indices[bounds[row] : bounds[row + 1]] = np.arange(end - num_logits, end)
        if seq_len <= prefill_len:
            continue
        if NUM_NEW_SAMPLED_TOKENS > 0 and seq_len - num_logits >= prefill_len:  # else it is a token of the prompt
            input_ids[end - num_logits] = last_sampled[request]
        if num_drafts > 0:
            input_ids[end - num_drafts : end] = drafts[request, :num_drafts]


def get_num_sampled_and_rejected(
    num_sampled_ptr, num_rejected_ptr, seq_lens_ptr, cu_num_logits_ptr, idx_mapping_ptr, prefill_len_ptr
):
    """`rejected = logits - sampled`; both are 0 for a request whose prefill is not complete."""
    num_sampled, num_rejected, seq_lens, bounds, requests, prefill_lens = arrays(
        num_sampled_ptr, num_rejected_ptr, seq_lens_ptr, cu_num_logits_ptr, idx_mapping_ptr, prefill_len_ptr
    )
    num_reqs = len(requests)
    is_complete = seq_lens[:num_reqs] >= prefill_lens[requests]
    num_sampled[:num_reqs] *= is_complete
    num_rejected[:num_reqs] = (np.diff(bounds[: num_reqs + 1]) - num_sampled[:num_reqs]) * is_complete


def post_update(
    idx_mapping_ptr, num_computed_tokens_ptr, last_sampled_tokens_ptr, output_bin_counts_ptr, output_bin_counts_stride,
    sampled_tokens_ptr, sampled_tokens_stride, num_sampled_ptr, num_rejected_ptr, query_start_loc_ptr,
    all_token_ids_ptr, all_token_ids_stride, total_len_ptr, draft_tokens_ptr=None, draft_tokens_out_ptr=None,
    num_draft_tokens=0,
):  # fmt: skip
    """Append the sampled tokens to their requests and advance `num_computed_tokens` by the tokens that were not
    rejected; with pipeline parallelism, keep the drafts that another stage made."""
    num_computed, last_sampled, counts, sampled, all_token_ids, total_lens = arrays(
        num_computed_tokens_ptr, last_sampled_tokens_ptr, output_bin_counts_ptr, sampled_tokens_ptr,
        all_token_ids_ptr, total_len_ptr,
    )  # fmt: skip
    last_sampled = last_sampled.reshape(-1)
    num_sampled, num_rejected = num_sampled_ptr.tolist(), num_rejected_ptr.tolist()
    starts = None if query_start_loc_ptr is None else query_start_loc_ptr.tolist()
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        if request < 0:
            continue
        if draft_tokens_ptr is not None:
            draft_tokens_out_ptr[request] = draft_tokens_ptr[row]
        num_new = num_sampled[row]
        if num_new > 0:
            tokens, total_len = sampled[row, :num_new], total_lens[request]
            last_sampled[request] = tokens[-1]
            all_token_ids[request, total_len : total_len + num_new] = tokens
            total_lens[request] = total_len + num_new
            if counts is not None:
                np.add.at(counts[request], tokens, 1)
        query_len = 0 if starts is None else starts[row + 1] - starts[row]
        num_computed[request] += query_len - num_rejected[row]


def post_update_num_computed_tokens(idx_mapping_ptr, num_computed_tokens_ptr, query_start_loc_ptr):
    """Advance `num_computed_tokens` by each request's query length."""
    requests, num_computed, starts = arrays(idx_mapping_ptr, num_computed_tokens_ptr, query_start_loc_ptr)
    num_computed[requests] += np.diff(starts[: len(requests) + 1])


def expand_idx_mapping(
    idx_mapping_ptr, expanded_idx_mapping_ptr, expanded_local_pos_ptr, cu_num_logits_ptr, BLOCK_SIZE
):
    """For every logits row: its request, and its place (0, 1, ...) among that request's rows."""
    requests, expanded, local_pos, bounds = arrays(
        idx_mapping_ptr, expanded_idx_mapping_ptr, expanded_local_pos_ptr, cu_num_logits_ptr
    )
    bounds = bounds[: len(requests) + 1]
    counts = np.diff(bounds)
    first, last = int(bounds[0]), int(bounds[-1])
    expanded[first:last] = np.repeat(requests, counts)
    local_pos[first:last] = np.arange(first, last) - np.repeat(bounds[:-1], counts)


def apply_prompt_embeds(
    inputs_embeds_ptr, inputs_embeds_stride, embeds_ptrs_ptr, mask_ptrs_ptr, embeds_lens_ptr, idx_mapping_ptr,
    query_start_loc_ptr, num_computed_tokens_ptr, hidden_size, TOKEN_BLOCK, BLOCK_SIZE,
):  # fmt: skip
    """Write the embeddings that a user gave as a prompt, at raw addresses, over those of its token ids. A mask, where
    there is one, marks rows that stay as they are."""
    row_bytes = hidden_size * inputs_embeds_ptr.itemsize
    starts, lengths, computed = arrays(query_start_loc_ptr, embeds_lens_ptr, num_computed_tokens_ptr)
    sources, masks = embeds_ptrs_ptr.tolist(), mask_ptrs_ptr.tolist()
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        first = int(computed[request])
        target = inputs_embeds_ptr.data_ptr() + int(starts[row]) * inputs_embeds_stride * inputs_embeds_ptr.itemsize
        for k in range(min(int(starts[row + 1] - starts[row]), int(lengths[request]) - first)):
            if masks[request] and ctypes.c_int8.from_address(masks[request] + first + k).value:
                continue
            offset = k * inputs_embeds_stride * inputs_embeds_ptr.itemsize
            ctypes.memmove(target + offset, sources[request] + (first + k) * row_bytes, row_bytes)


def prepare_rope_positions(
    positions_ptr, positions_stride, prefill_positions_ptr, prefill_positions_stride0, prefill_positions_stride1,
    prefill_delta_ptr, idx_mapping_ptr, query_start_loc_ptr, prefill_lens_ptr, num_computed_tokens_ptr, BLOCK_SIZE,
    NUM_DIMS,
):  # fmt: skip
    """Positions in each dimension of a multimodal rotary embedding: a prompt's own, and behind it, counted up."""
    positions, prefill_positions, deltas, starts, prefill_lens, computed = arrays(
        positions_ptr, prefill_positions_ptr, prefill_delta_ptr, query_start_loc_ptr, prefill_lens_ptr,
        num_computed_tokens_ptr,
    )  # fmt: skip
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        start, end, first = int(starts[row]), int(starts[row + 1]), int(computed[request])
        if first < prefill_lens[request]:
            mine = prefill_positions[NUM_DIMS * request : NUM_DIMS * (request + 1)]
            positions[:NUM_DIMS, start:end] = mine[:, first : first + end - start]
        else:
            positions[:NUM_DIMS, start:end] = np.arange(first, first + end - start) + deltas[request]
