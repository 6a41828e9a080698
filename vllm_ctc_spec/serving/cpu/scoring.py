"""Kernels of the log probabilities that a request asks for: of sampled, top and chosen tokens, and of the prompt."""

import torch

from vllm_ctc_spec.serving.cpu.arrays import arrays


def topk_log_softmax(
    output_ptr, logits_ptr, logits_stride, topk_ids_ptr, topk_ids_stride, topk, vocab_size, BLOCK_SIZE, TOPK_BLOCK_SIZE
):
    """Log probabilities `[rows, topk]` of the given token ids."""
    logits = logits_ptr[:, :vocab_size].float()
    torch.sub(logits.gather(1, topk_ids_ptr[:, :topk]), logits.logsumexp(1, keepdim=True), out=output_ptr)


def ranks(output_ptr, logits_ptr, logits_stride, token_ids_ptr, vocab_size, BLOCK_SIZE):
    """How many tokens of a row are at least as probable as its token, itself included."""
    logits = logits_ptr[:, :vocab_size]
    torch.sum(logits >= logits.gather(1, token_ids_ptr.view(-1, 1)), 1, out=output_ptr)


def fill_logprob_token_ids(
    out_token_ids_ptr, out_token_ids_stride, out_valid_mask_ptr, out_valid_mask_stride, sampled_token_ids_ptr,
    topk_indices_ptr, topk_indices_stride, expanded_idx_mapping_ptr, num_per_req_token_ids_ptr, per_req_token_ids_ptr,
    per_req_token_ids_stride, NUM_TOPK, PADDED_COLS,
):  # fmt: skip
    """Column 0 the sampled token, then the request's chosen tokens or, without any, the row's top tokens."""
    token_ids, is_valid, sampled, top, counts, chosen = arrays(
        out_token_ids_ptr, out_valid_mask_ptr, sampled_token_ids_ptr, topk_indices_ptr, num_per_req_token_ids_ptr,
        per_req_token_ids_ptr,
    )  # fmt: skip
    token_ids[:, 0] = sampled
    is_valid[:, 0] = True
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = counts[request]
        if count == 0 and NUM_TOPK == 0:  # `top` is then any tensor, and may have fewer rows
            continue
        source = chosen[request, :count] if count > 0 else top[row, :NUM_TOPK]
        token_ids[row, 1 : 1 + len(source)] = source
        is_valid[row, 1 : 1 + len(source)] = True


def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids_ptr, query_start_loc_ptr, idx_mapping_ptr, num_computed_tokens_ptr, all_token_ids_ptr,
    all_token_ids_stride, BLOCK_SIZE,
):  # fmt: skip
    """For every scheduled token the token after it, whose log probability its logits give."""
    output, starts, num_computed, all_token_ids = arrays(
        prompt_logprobs_token_ids_ptr, query_start_loc_ptr, num_computed_tokens_ptr, all_token_ids_ptr
    )
    for row, request in enumerate(idx_mapping_ptr.tolist()):
        start, end = starts[row], starts[row + 1]
        following = num_computed[request] + 1
        # Behind the last position that a request can hold there is no token; that row's score is not used.
        tokens = all_token_ids[request, following : following + end - start]
        output[start : start + len(tokens)] = tokens
