"""Kernels of vLLM's rejection sampler: standard and block verification, one-hot drafts or draft logits.

`target_logits` is `[num_logits, V]`, already divided by the temperature; `draft_logits` is
`[max_num_reqs, num_speculative_steps, V]`, not yet divided. Logits row `t` of a request verifies the draft
`draft_sampled[t + 1]`; the request's last row is the bonus token's. A draft of -1 is a placeholder, always rejected.
vLLM splits the statistics of a row over vocabulary blocks; here block 0 holds those of the whole row.
"""

import numpy as np

from vllm_ctc_spec.cpu.arrays import arrays, float_array
from vllm_ctc_spec.cpu.noise import noised_argmax, philox_uniform
from vllm_ctc_spec.cpu.sampling import NEGATIVE_INFINITY, store_argmax

ZERO = np.float32(0)
ONE = np.float32(1)


class _LogProbs:
    """Log probabilities of the target or of the drafter, from logits and the statistics of block 0."""

    def __init__(self, local_max_ptr, local_sumexp_ptr):
        self.max, self.sumexp = local_max_ptr.numpy(), local_sumexp_ptr.numpy()

    def logsumexp(self, row: int) -> np.float32:
        return self.max[row, 0] + np.log(self.sumexp[row, 0])


def _draft_row(draft_logits, request: int, step: int, temperature: np.float32, vocab_size: int) -> np.ndarray:
    """The drafter's logits `[V]` of one step at the request's temperature."""
    return float_array(draft_logits[request, step, :vocab_size]) / temperature


def compute_local_logits_stats(
    target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr, target_local_max_stride,
    target_local_sumexp_ptr, target_local_sumexp_stride, draft_local_max_ptr, draft_local_max_stride,
    draft_local_sumexp_ptr, draft_local_sumexp_stride, target_logits_ptr, target_logits_stride, draft_logits_ptr,
    draft_logits_stride_0, draft_logits_stride_1, expanded_idx_mapping_ptr, expanded_local_pos_ptr, temp_ptr, vocab_size,
    num_speculative_steps, BLOCK_SIZE, HAS_DRAFT_LOGITS,
):  # fmt: skip
    """Of each row that verifies a draft: the argmax (greedy), or maximum and sum of exponentials (sampled)."""
    argmax, target_max, target_sumexp, draft_max, draft_sumexp, temperatures = arrays(
        target_local_argmax_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr, temp_ptr,
    )  # fmt: skip
    logits = float_array(target_logits_ptr)
    rows = zip(expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist(), strict=True)
    for row, (request, step) in enumerate(rows):
        if step >= num_speculative_steps:
            continue
        row_logits, temperature = logits[row, :vocab_size], np.float32(temperatures[request])
        if temperature == 0:
            index = int(row_logits.argmax())
            store_argmax(argmax, target_max, row, row_logits[index], index)
            continue
        _store_stats(target_max, target_sumexp, row, row_logits)
        if HAS_DRAFT_LOGITS:
            draft_row = _draft_row(draft_logits_ptr, request, step, temperature, vocab_size)
            _store_stats(draft_max, draft_sumexp, row, draft_row)


def _store_stats(local_max: np.ndarray, local_sumexp: np.ndarray, row: int, logits: np.ndarray) -> None:
    maximum = logits.max()
    local_max[row, 1:], local_max[row, 0] = NEGATIVE_INFINITY, maximum
    local_sumexp[row, 1:] = ZERO
    local_sumexp[row, 0] = np.exp(logits - maximum).sum() if maximum > NEGATIVE_INFINITY else ZERO


def compute_cumulative_log_p(
    cumulative_log_p_ptr, target_logits_ptr, target_logits_stride, target_local_max_ptr, target_local_max_stride,
    target_local_sumexp_ptr, target_local_sumexp_stride, draft_sampled_ptr, draft_logits_ptr, draft_logits_stride_0,
    draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr,
    draft_local_sumexp_stride, cu_num_logits_ptr, idx_mapping_ptr, temp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS,
    HAS_DRAFT_LOGITS,
):  # fmt: skip
    """Log of the running joint ratio: `log p_i = min(log p_{i-1} + log M_b(x_i) - log M_s(x_i), 0)`."""
    cumulative, temperatures = arrays(cumulative_log_p_ptr, temp_ptr)
    target = _LogProbs(target_local_max_ptr, target_local_sumexp_ptr)
    draft = _LogProbs(draft_local_max_ptr, draft_local_sumexp_ptr)
    bounds, drafts = cu_num_logits_ptr.tolist(), draft_sampled_ptr.tolist()
    for index, request in enumerate(idx_mapping_ptr.tolist()):
        temperature = np.float32(temperatures[request])
        if temperature == 0:
            continue
        log_p = ZERO
        for step, row in enumerate(range(bounds[index], bounds[index + 1] - 1)):
            token = drafts[row + 1]
            if token >= 0:
                ratio = np.float32(float(target_logits_ptr[row, token])) - target.logsumexp(row)
                if HAS_DRAFT_LOGITS:
                    draft_logit = np.float32(float(draft_logits_ptr[request, step, token])) / temperature
                    ratio -= draft_logit - draft.logsumexp(row)
                log_p = min(log_p + ratio, ZERO)
            cumulative[row] = log_p


def compute_local_residual_mass(
    local_residual_mass_ptr, local_residual_mass_stride, cumulative_log_p_ptr, target_logits_ptr, target_logits_stride,
    target_local_max_ptr, target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride,
    draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride,
    draft_local_sumexp_ptr, draft_local_sumexp_stride, draft_sampled_ptr, expanded_idx_mapping_ptr,
    expanded_local_pos_ptr, temp_ptr, vocab_size, num_speculative_steps, vocab_num_blocks, BLOCK_SIZE,
    PADDED_VOCAB_NUM_BLOCKS,
):  # fmt: skip
    """Block verification's residual mass `sum_x max(p_i M_b(x) - M_s(x), 0)` of the rows after a request's first."""
    residual, cumulative, temperatures = arrays(local_residual_mass_ptr, cumulative_log_p_ptr, temp_ptr)
    target = _LogProbs(target_local_max_ptr, target_local_sumexp_ptr)
    draft = _LogProbs(draft_local_max_ptr, draft_local_sumexp_ptr)
    logits, drafts = float_array(target_logits_ptr), draft_sampled_ptr.tolist()
    rows = zip(expanded_idx_mapping_ptr.tolist(), expanded_local_pos_ptr.tolist(), drafts[1:], strict=False)
    for row, (request, step, next_draft) in enumerate(rows):
        temperature = np.float32(temperatures[request])
        if step == 0 or step >= num_speculative_steps or next_draft < 0 or temperature == 0:
            continue
        target_p = np.exp(logits[row, :vocab_size] - target.logsumexp(row))
        draft_row = _draft_row(draft_logits_ptr, request, step, temperature, vocab_size)
        draft_p = np.exp(draft_row - draft.logsumexp(row))
        residual[row, 1:] = ZERO
        residual[row, 0] = np.maximum(np.exp(cumulative[row - 1]) * target_p - draft_p, ZERO).sum()


def rejection(
    sampled_ptr, sampled_stride, rejected_steps_ptr, target_rejected_logsumexp_ptr, draft_rejected_logsumexp_ptr,
    target_logits_ptr, target_logits_stride, target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr,
    target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, draft_sampled_ptr, draft_logits_ptr,
    draft_logits_stride_0, draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr,
    draft_local_sumexp_stride, cu_num_logits_ptr, idx_mapping_ptr, temp_ptr, seed_ptr, pos_ptr,
    synthetic_conditional_rates_ptr, cumulative_log_p_ptr, local_residual_mass_ptr, local_residual_mass_stride,
    vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS, HAS_DRAFT_LOGITS, SYNTHETIC_MODE, USE_BLOCK_VERIFICATION,
):  # fmt: skip
    """How many drafts of each request are accepted (`rejected_steps`), its tokens so far, and the rejected row's sums."""
    sampled, accepted_steps, argmax, temperatures = arrays(
        sampled_ptr, rejected_steps_ptr, target_local_argmax_ptr, temp_ptr
    )
    target_sums, draft_sums = target_rejected_logsumexp_ptr.numpy(), draft_rejected_logsumexp_ptr.numpy()
    target = _LogProbs(target_local_max_ptr, target_local_sumexp_ptr)
    draft = _LogProbs(draft_local_max_ptr, draft_local_sumexp_ptr)
    rates = synthetic_conditional_rates_ptr.tolist() if SYNTHETIC_MODE else None
    cumulative, residual = arrays(cumulative_log_p_ptr, local_residual_mass_ptr)
    bounds, drafts, positions, seeds = (p.tolist() for p in (cu_num_logits_ptr, draft_sampled_ptr, pos_ptr, seed_ptr))

    def log_ratio(row, step, request, temperature, token):
        """Log of target over draft probability of the drafted token."""
        log_p = np.float32(float(target_logits_ptr[row, token])) - target.logsumexp(row)
        if not HAS_DRAFT_LOGITS:
            return log_p
        draft_logit = np.float32(float(draft_logits_ptr[request, step, token])) / temperature
        return log_p - (draft_logit - draft.logsumexp(row))

    for index, request in enumerate(idx_mapping_ptr.tolist()):
        first, num_drafts, seed = bounds[index], bounds[index + 1] - bounds[index] - 1, seeds[request]
        temperature = np.float32(temperatures[request])
        tokens = drafts[first + 1 : first + 1 + num_drafts]
        if temperature == 0:
            accepted = 0
            for step, token in enumerate(tokens):
                best = int(argmax[first + step, 0])
                if SYNTHETIC_MODE:
                    is_accepted = philox_uniform(seed, positions[first + step]) < rates[step] and token >= 0
                else:
                    is_accepted = best == token
                sampled[index, step] = token if is_accepted else best
                if not is_accepted:
                    break
                accepted += 1
        elif USE_BLOCK_VERIFICATION:
            accepted = 0
            for step, token in enumerate(tokens):
                row = first + step
                if token < 0:
                    break
                threshold = ratio = np.exp(cumulative[row])
                following = tokens[step + 1] if step + 1 < num_drafts else -1
                if following >= 0:
                    if HAS_DRAFT_LOGITS:
                        mass = residual[row + 1].sum()
                    else:
                        target_logit = np.float32(float(target_logits_ptr[row + 1, following]))
                        mass = ratio * (ONE - np.exp(target_logit - target.logsumexp(row + 1)))
                    denominator = mass + ONE - ratio
                    threshold = mass / denominator if denominator > 0 else ONE
                if philox_uniform(seed, positions[row]) <= threshold:
                    accepted = step + 1
                sampled[index, step] = token
        else:
            accepted = 0
            for step, token in enumerate(tokens):
                row = first + step
                if token < 0:
                    break
                uniform = philox_uniform(seed, positions[row])
                sampled[index, step] = token
                if SYNTHETIC_MODE:
                    is_accepted = uniform < rates[step]
                else:
                    is_accepted = log_ratio(row, step, request, temperature, token) > np.log(uniform)
                if not is_accepted:
                    break
                accepted += 1
        accepted_steps[index] = accepted
        if temperature != 0 and accepted < num_drafts:
            target_sums[index] = target.logsumexp(first + accepted)
            draft_sums[index] = draft.logsumexp(first + accepted) if HAS_DRAFT_LOGITS else ZERO


def resample(
    resampled_local_argmax_ptr, resampled_local_argmax_stride, resampled_local_max_ptr, resampled_local_max_stride,
    target_logits_ptr, target_logits_stride, target_rejected_logsumexp_ptr, draft_logits_ptr, draft_logits_stride_0,
    draft_logits_stride_1, draft_rejected_logsumexp_ptr, rejected_step_ptr, cu_num_logits_ptr, expanded_idx_mapping_ptr,
    draft_sampled_ptr, temp_ptr, seed_ptr, pos_ptr, cumulative_log_p_ptr, contexts_ptr, contexts_stride,
    watermarking_ptr, watermarking_skip_mask_ptr, watermark_key_0, watermark_key_1, vocab_size, BLOCK_SIZE,
    HAS_DRAFT_LOGITS, USE_FP64, USE_BLOCK_VERIFICATION, CONTEXT_WIDTH, WATERMARK, DEDUPLICATE_CONTEXTS,
):  # fmt: skip
    """One token per request after its accepted drafts: from the target (bonus), else from the residual distribution."""
    if WATERMARK:
        raise NotImplementedError("Watermarking is not implemented on a CPU.")
    local_argmax, local_max, temperatures, seeds, target_sums, draft_sums, cumulative = arrays(
        resampled_local_argmax_ptr, resampled_local_max_ptr, temp_ptr, seed_ptr, target_rejected_logsumexp_ptr,
        draft_rejected_logsumexp_ptr, cumulative_log_p_ptr,
    )  # fmt: skip
    logits = float_array(target_logits_ptr)
    bounds, requests, drafts = (p.tolist() for p in (cu_num_logits_ptr, expanded_idx_mapping_ptr, draft_sampled_ptr))
    for index, step in enumerate(rejected_step_ptr.tolist()):
        row = bounds[index] + step
        request, is_bonus = requests[row], row == bounds[index + 1] - 1
        temperature = np.float32(temperatures[request])
        if temperature == 0 and not is_bonus:
            continue  # the target's argmax is among the sampled tokens already
        residual = logits[row, :vocab_size]
        rejected = -1 if is_bonus else drafts[row + 1]
        if rejected >= 0 and HAS_DRAFT_LOGITS:
            target_log_p = residual - target_sums[index]
            if USE_BLOCK_VERIFICATION and step > 0:
                target_log_p += cumulative[row - 1]
            draft_row = _draft_row(draft_logits_ptr, request, step, temperature, vocab_size)
            residual = _log_difference(target_log_p, draft_row - draft_sums[index])
        elif rejected >= 0:
            residual = residual.copy()
            residual[rejected] = NEGATIVE_INFINITY
        value, token = noised_argmax(residual, int(seeds[request]), int(pos_ptr[row]), temperature, USE_FP64)
        store_argmax(local_argmax, local_max, index, value, token)


def _log_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`log(max(exp(a) - exp(b), 0))`."""
    with np.errstate(all="ignore"):  # -inf - -inf and log(0) end as -inf below
        ratio = np.exp(b - a)
        return np.where(ratio < 1, a + np.log1p(-ratio), NEGATIVE_INFINITY)


def insert_resampled(
    sampled_ptr, sampled_stride, num_sampled_ptr, resampled_local_argmax_ptr, resampled_local_argmax_stride,
    resampled_local_max_ptr, resampled_local_max_stride, resample_num_blocks, cu_num_logits_ptr,
    expanded_idx_mapping_ptr, temp_ptr, PADDED_RESAMPLE_NUM_BLOCKS,
):  # fmt: skip
    """Append the resampled token, except where a greedy request already holds the target's argmax."""
    sampled, num_sampled, resampled, requests, temperatures = arrays(
        sampled_ptr, num_sampled_ptr, resampled_local_argmax_ptr, expanded_idx_mapping_ptr, temp_ptr
    )
    bounds = cu_num_logits_ptr.tolist()
    for index, step in enumerate(num_sampled_ptr.tolist()):
        row = bounds[index] + step
        num_sampled[index] = step + 1
        if temperatures[requests[row]] != 0 or row == bounds[index + 1] - 1:
            sampled[index, step] = resampled[index, 0]


def gather_draft_sampled(
    draft_sampled_ptr, pos_ptr, input_ids_ptr, positions_ptr, logits_indices_ptr, expanded_idx_mapping_ptr,
    expanded_local_pos_ptr, prefill_len_ptr, num_logits, BLOCK_SIZE,
):  # fmt: skip
    """Input token and position of each logits row; -1 for draft slots of a step that starts within the prefill."""
    draft_sampled, pos, input_ids, positions, tokens, requests, local_pos, prefill_lens = arrays(
        draft_sampled_ptr, pos_ptr, input_ids_ptr, positions_ptr, logits_indices_ptr, expanded_idx_mapping_ptr,
        expanded_local_pos_ptr, prefill_len_ptr,
    )  # fmt: skip
    positions.take(tokens, out=pos)
    is_placeholder = (local_pos > 0) & (pos - local_pos < prefill_lens[requests])
    draft_sampled[:] = np.where(is_placeholder, -1, input_ids[tokens])


def flatten_sampled(flat_sampled_ptr, sampled_ptr, sampled_stride, num_sampled_ptr, cu_num_logits_ptr):
    """Move each request's sampled tokens to its logits rows."""
    flat, sampled, bounds = arrays(flat_sampled_ptr, sampled_ptr, cu_num_logits_ptr)
    for index, count in enumerate(num_sampled_ptr.tolist()):
        flat[bounds[index] : bounds[index] + count] = sampled[index, :count]
