"""Kernels that change logits or sample from them: penalties, masks, temperature, min-p, Gumbel-max.

Every function walks the logits rows; `idx_mapping` gives a row's request, `local_pos` its place among that request's
rows: row 0 is the request's last token, the rows after it are its drafts.
"""

import itertools

import numpy as np
import torch

from vllm_ctc_spec.serving.cpu.arrays import arrays, float_array
from vllm_ctc_spec.serving.cpu.noise import DRAFT_NOISE_SALT, noised_argmax, step_seed

NEGATIVE_INFINITY = np.float32(-np.inf)


def store_argmax(local_argmax: np.ndarray, local_max: np.ndarray, row: int, value: float, index: int) -> None:
    """Leave a whole row's maximum in its first vocabulary block; vLLM then takes the best block."""
    local_max[row, 1:] = NEGATIVE_INFINITY
    local_max[row, 0] = value
    local_argmax[row, 0] = index


def gumbel_sample(
    local_argmax_ptr, local_argmax_stride, local_max_ptr, local_max_stride, logits_cache_ptr, logits_cache_stride_0,
    logits_cache_stride_1, logits_cache_col_ptr, logits_cache_source_ptr, logits_cache_source_stride, logits_ptr,
    logits_stride, expanded_idx_mapping_ptr, seeds_ptr, pos_ptr, temp_ptr, vocab_size, BLOCK_SIZE, IS_DRAFTING,
    APPLY_TEMPERATURE, USE_FP64, PER_TOKEN_COL,
):  # fmt: skip
    """One token per row by Gumbel-max (argmax at temperature 0); keep the row in `cache[request, col]` if given."""
    local_argmax, local_max, seeds, temperatures = arrays(local_argmax_ptr, local_max_ptr, seeds_ptr, temp_ptr)
    logits = float_array(logits_ptr)
    salt = DRAFT_NOISE_SALT if IS_DRAFTING else 0
    requests = expanded_idx_mapping_ptr.numpy()
    if logits_cache_ptr is None and not (temperatures[requests] * (requests >= 0)).any():  # all at once
        best = logits[:, :vocab_size].argmax(1)
        local_max[:, 1:] = NEGATIVE_INFINITY
        local_max[:, 0] = np.take_along_axis(logits, best[:, None], 1)[:, 0]
        local_argmax[:, 0] = best
        return
    rows = zip(expanded_idx_mapping_ptr.tolist(), pos_ptr.tolist(), strict=True)
    for row, (request, pos) in enumerate(rows):
        row_logits = logits[row, :vocab_size]
        seed, temperature = 0, np.float32(0)
        if request >= 0:
            seed, temperature = int(seeds[request]), np.float32(temperatures[request])
            if logits_cache_ptr is not None:
                column = int(logits_cache_col_ptr[row] if PER_TOKEN_COL else logits_cache_col_ptr)
                logits_cache_ptr[request, column, :vocab_size] = logits_cache_source_ptr[row, :vocab_size]
                seed = step_seed(seed, column)
        if temperature != 0 and APPLY_TEMPERATURE:
            row_logits = row_logits / temperature
        value, index = noised_argmax(row_logits, seed, pos + salt, temperature, USE_FP64)
        store_argmax(local_argmax, local_max, row, value, index)


def temperature(logits_ptr, logits_stride, expanded_idx_mapping_ptr, temperature_ptr, vocab_size, BLOCK_SIZE):
    """Divide each row by its request's temperature, unless that is 0 or 1."""
    logits, temperatures = arrays(logits_ptr, temperature_ptr)
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        divisor = temperatures[request]
        if divisor != 0 and divisor != 1:
            logits[row, :vocab_size] /= divisor


def min_p(logits_ptr, logits_stride, expanded_idx_mapping_ptr, min_p_ptr, vocab_size, BLOCK_SIZE):
    """Mask the tokens whose probability is below `min_p` times the row's largest."""
    logits, thresholds = arrays(logits_ptr, min_p_ptr)
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()):
        if thresholds[request] != 0:
            row_logits = logits[row, :vocab_size]
            row_logits[row_logits < row_logits.max() + np.log(thresholds[request])] = NEGATIVE_INFINITY


def penalties(
    logits_ptr, logits_stride, expanded_idx_mapping_ptr, token_ids_ptr, expanded_local_pos_ptr, repetition_penalty_ptr,
    frequency_penalty_ptr, presence_penalty_ptr, prompt_bin_mask_ptr, prompt_bin_mask_stride, output_bin_counts_ptr,
    output_bin_counts_stride, vocab_size, BLOCK_SIZE,
):  # fmt: skip
    """Repetition, frequency and presence penalties; the drafts before a row count as its output."""
    logits, token_ids, repetitions, frequencies, presences, prompt_bits, output_counts = arrays(
        logits_ptr, token_ids_ptr, repetition_penalty_ptr, frequency_penalty_ptr, presence_penalty_ptr,
        prompt_bin_mask_ptr, output_bin_counts_ptr,
    )  # fmt: skip
    rows = zip(expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist(), strict=True)
    for row, (request, local_pos) in enumerate(rows):
        repetition, frequency, presence = repetitions[request], frequencies[request], presences[request]
        if repetition == 1 and frequency == 0 and presence == 0:
            continue
        row_logits, counts = logits[row, :vocab_size], output_counts[request, :vocab_size]
        if local_pos:
            counts = counts.copy()
            drafts = token_ids[row - local_pos + 1 : row + 1]
            np.add.at(counts, drafts[drafts >= 0], 1)
        is_in_output = counts > 0
        if repetition != 1:
            is_seen = _unpack_bits(prompt_bits[request], vocab_size).view(bool) | is_in_output
            factor = np.where(row_logits > 0, np.float32(1) / repetition, repetition)
            np.multiply(row_logits, factor, out=row_logits, where=is_seen)
        if frequency != 0:
            row_logits -= frequency * counts
        if presence != 0:
            row_logits -= presence * is_in_output


def _unpack_bits(words: np.ndarray, count: int) -> np.ndarray:
    """The first `count` bits of int32 words, lowest bit first, one uint8 each."""
    return np.unpackbits(words.view(np.uint8), count=count, bitorder="little")


def bincount(
    expanded_idx_mapping_ptr, all_token_ids_ptr, all_token_ids_stride, prompt_len_ptr, prefill_len_ptr,
    prompt_bin_mask_ptr, prompt_bin_mask_stride, output_bin_counts_ptr, output_bin_counts_stride, BLOCK_SIZE,
):  # fmt: skip
    """Of each new request: one bit per token id in its prompt, and the counts of the output it already has."""
    all_token_ids, prompt_bits, output_counts = arrays(all_token_ids_ptr, prompt_bin_mask_ptr, output_bin_counts_ptr)
    prompt_lens, prefill_lens = prompt_len_ptr.tolist(), prefill_len_ptr.tolist()
    for request in expanded_idx_mapping_ptr.tolist():
        prompt = all_token_ids[request, : prompt_lens[request]]
        output = all_token_ids[request, prompt_lens[request] : prefill_lens[request]]
        bits = np.uint32(1) << (prompt % 32).astype(np.uint32)
        np.bitwise_or.at(prompt_bits[request].view(np.uint32), prompt // 32, bits)
        np.add.at(output_counts[request], output, 1)


def bias(
    logits_ptr, logits_stride, vocab_size, expanded_idx_mapping_ptr, num_allowed_token_ids_ptr, allowed_token_ids_ptr,
    allowed_token_ids_stride, num_logit_bias_ptr, bias_token_ids_ptr, bias_token_ids_stride, bias_ptr, bias_stride,
    pos_ptr, min_lens_ptr, num_stop_token_ids_ptr, restore_when_all_masked_ptr, stop_token_ids_ptr,
    stop_token_ids_stride, BLOCK_SIZE, LOGITS_BLOCK_SIZE, CHECK_ALL_MASKED_ROWS,
):  # fmt: skip
    """Allowed token ids, logit bias, and no stop token before `min_len` (unless that would leave no token at all)."""
    logits, allowed_ids, bias_ids, biases, stop_ids = arrays(
        logits_ptr, allowed_token_ids_ptr, bias_token_ids_ptr, bias_ptr, stop_token_ids_ptr
    )
    num_allowed, num_bias, num_stop, min_lens, restore = arrays(
        num_allowed_token_ids_ptr, num_logit_bias_ptr, num_stop_token_ids_ptr, min_lens_ptr, restore_when_all_masked_ptr
    )
    rows = zip(expanded_idx_mapping_ptr.tolist(), pos_ptr.tolist(), strict=True)
    for row, (request, pos) in enumerate(rows):
        row_logits = logits[row, :vocab_size]
        if num_allowed[request] > 0:
            allowed = allowed_ids[request, : num_allowed[request]]
            kept = row_logits[allowed]
            row_logits[:] = NEGATIVE_INFINITY
            row_logits[allowed] = kept
        if num_bias[request] > 0:
            biased = slice(num_bias[request])
            row_logits[bias_ids[request, biased]] += biases[request, biased]
        if num_stop[request] > 0 and pos + 1 < min_lens[request]:
            stop = stop_ids[request, : num_stop[request]]
            kept = row_logits[stop]
            row_logits[stop] = NEGATIVE_INFINITY
            if CHECK_ALL_MASKED_ROWS and restore[request] and row_logits.max() == NEGATIVE_INFINITY:
                row_logits[stop] = np.where(np.isfinite(kept), kept, NEGATIVE_INFINITY)


def bad_words(
    logits_ptr, logits_stride, expanded_idx_mapping_ptr, bad_word_token_ids_ptr, bad_word_token_ids_stride,
    bad_word_offsets_ptr, bad_word_offsets_stride, num_bad_words_ptr, all_token_ids_ptr, all_token_ids_stride,
    prompt_len_ptr, total_len_ptr, input_ids_ptr, expanded_local_pos_ptr,
):  # fmt: skip
    """Mask the last token of a bad word where the output and the drafts before the row end in the tokens before it."""
    logits, word_ids, offsets, num_words, all_token_ids, prompt_lens, total_lens, input_ids = arrays(
        logits_ptr, bad_word_token_ids_ptr, bad_word_offsets_ptr, num_bad_words_ptr, all_token_ids_ptr, prompt_len_ptr,
        total_len_ptr, input_ids_ptr,
    )  # fmt: skip
    rows = zip(expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist(), strict=True)
    for row, (request, local_pos) in enumerate(rows):
        if num_words[request] == 0:
            continue
        output = all_token_ids[request, prompt_lens[request] : total_lens[request]]
        context = np.concatenate([output, input_ids[row - local_pos + 1 : row + 1]])
        for start, end in itertools.pairwise(offsets[request, : num_words[request] + 1].tolist()):
            *prefix, last = word_ids[request, start:end].tolist()
            if len(prefix) <= len(context) and context[len(context) - len(prefix) :].tolist() == prefix:
                logits[row, last] = NEGATIVE_INFINITY


def apply_grammar_bitmask(
    logits_ptr, logits_stride, logits_indices_ptr, cu_num_logits_ptr, bitmask_ptr, bitmask_stride, vocab_size,
    MASK_STRIDE, BLOCK_SIZE,
):  # fmt: skip
    """Mask the tokens whose grammar bit is 0. Mask `i` belongs to row `indices[i] % STRIDE` of request `// STRIDE`."""
    bitmask, bounds = bitmask_ptr.numpy(), cu_num_logits_ptr.tolist()
    for mask, index in enumerate(logits_indices_ptr.tolist()):
        request, local_pos = divmod(index, MASK_STRIDE)
        row = bounds[request] + local_pos
        if row < bounds[request + 1]:
            is_forbidden = torch.from_numpy(_unpack_bits(bitmask[mask], vocab_size) == 0)
            logits_ptr[row, :vocab_size].masked_fill_(is_forbidden, float("-inf"))


def num_nans(logits_ptr, logits_stride, num_nans_ptr, vocab_size, BLOCK_SIZE):
    """The number of NaN logits in each row."""
    torch.sum(logits_ptr[:, :vocab_size].isnan(), 1, dtype=num_nans_ptr.dtype, out=num_nans_ptr)
