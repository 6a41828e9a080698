"""Kernels of vLLM's rejection sampler: standard, block and FLy verification, one-hot drafts or draft logits.

`target_logits` is `[num_logits, V]`, already divided by the temperature; `draft_logits` is
`[max_num_reqs, num_speculative_steps, V]`, not yet divided. Logits row `t` of a request verifies the draft
`draft_sampled[t + 1]`; the request's last row is the bonus token's. A draft of -1 is a placeholder, always rejected.
vLLM splits the statistics of a row over vocabulary blocks; here block 0 holds those of the whole row.
"""

import numpy as np

from vllm_ctc_spec.serving.cpu.arrays import arrays, float_array
from vllm_ctc_spec.serving.cpu.noise import noised_argmax, philox_uniform, step_seed
from vllm_ctc_spec.serving.cpu.sampling import NEGATIVE_INFINITY, store_argmax

ZERO = np.float32(0)
ONE = np.float32(1)
# Impossible tokens are -inf, so log(0), exp(inf) and -inf - -inf are no errors here.
QUIET = np.errstate(divide="ignore", invalid="ignore", over="ignore")


class _DraftRatios:
    """Log probabilities of single tokens, from logits and the statistics of block 0; `draft_logits` None if one-hot."""

    def __init__(self, target_logits, target_max, target_sumexp, draft_logits, draft_max, draft_sumexp):
        self.target_logits, self.draft_logits = target_logits, draft_logits
        self.target_max, self.target_sumexp = target_max.numpy(), target_sumexp.numpy()
        self.draft_max, self.draft_sumexp = draft_max.numpy(), draft_sumexp.numpy()

    def target_logsumexp(self, row: int) -> np.float32:
        return self.target_max[row, 0] + np.log(self.target_sumexp[row, 0])

    def draft_logsumexp(self, row: int) -> np.float32:
        if self.draft_logits is None:
            return ZERO
        return self.draft_max[row, 0] + np.log(self.draft_sumexp[row, 0])

    def target_log_p(self, row: int, token: int) -> np.float32:
        return np.float32(float(self.target_logits[row, token])) - self.target_logsumexp(row)

    def log_ratio(self, row: int, request: int, step: int, temperature: np.float32, token: int) -> np.float32:
        """`log p(token) - log q(token)`."""
        log_p = self.target_log_p(row, token)
        if self.draft_logits is None:
            return log_p
        draft_logit = np.float32(float(self.draft_logits[request, step, token])) / temperature
        return log_p - (draft_logit - self.draft_logsumexp(row))


def _is_bonus(expanded_local_pos: np.ndarray) -> np.ndarray:
    """[num_logits], true in the last row of a request, which verifies no draft."""
    return np.append(expanded_local_pos[1:], 0) == 0


def _draft_row(draft_logits, request: int, step: int, temperature: np.float32, vocab_size: int) -> np.ndarray:
    """The drafter's logits `[V]` of one step at the request's temperature."""
    return float_array(draft_logits[request, step, :vocab_size]) / temperature


@QUIET
def compute_local_logits_stats(
    target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr, target_local_max_stride,
    target_local_sumexp_ptr, target_local_sumexp_stride, draft_local_max_ptr, draft_local_max_stride,
    draft_local_sumexp_ptr, draft_local_sumexp_stride, target_logits_ptr, target_logits_stride, draft_logits_ptr,
    draft_logits_stride_0, draft_logits_stride_1, expanded_idx_mapping_ptr, expanded_local_pos_ptr, temp_ptr,
    vocab_size, BLOCK_SIZE, HAS_DRAFT_LOGITS, num_speculative_steps=None, num_logits=None,
):  # fmt: skip
    """For each row that verifies a draft: the argmax (greedy), or maximum and sum of exponentials (sampled)."""
    argmax, target_max, target_sumexp, draft_max, draft_sumexp, temperatures = arrays(
        target_local_argmax_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr, temp_ptr,
    )  # fmt: skip
    logits = float_array(target_logits_ptr)
    local_pos = expanded_local_pos_ptr.numpy()
    columns = expanded_idx_mapping_ptr.tolist(), local_pos.tolist(), _is_bonus(local_pos).tolist()
    for row, (request, step, is_bonus) in enumerate(zip(*columns, strict=True)):
        if is_bonus:
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


@QUIET
def compute_cumulative_log_p(
    cumulative_log_p_ptr, target_logits_ptr, target_logits_stride, target_local_max_ptr, target_local_max_stride,
    target_local_sumexp_ptr, target_local_sumexp_stride, draft_sampled_ptr, draft_logits_ptr, draft_logits_stride_0,
    draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr,
    draft_local_sumexp_stride, cu_num_logits_ptr, idx_mapping_ptr, temp_ptr, vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS,
    HAS_DRAFT_LOGITS,
):  # fmt: skip
    """Log of the running joint ratio: `log p_i = min(log p_{i-1} + log M_b(x_i) - log M_s(x_i), 0)`."""
    cumulative, temperatures = arrays(cumulative_log_p_ptr, temp_ptr)
    ratios = _DraftRatios(
        target_logits_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_logits_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )  # fmt: skip
    bounds, drafts = cu_num_logits_ptr.tolist(), draft_sampled_ptr.tolist()
    for index, request in enumerate(idx_mapping_ptr.tolist()):
        temperature = np.float32(temperatures[request])
        if temperature == 0:
            continue
        log_p = ZERO
        for step, row in enumerate(range(bounds[index], bounds[index + 1] - 1)):
            token = drafts[row + 1]
            if token >= 0:
                # fmin drops NaN, as Triton's minimum does: the ratio is NaN if neither model can emit the token.
                log_p = np.fmin(log_p + ratios.log_ratio(row, request, step, temperature, token), ZERO)
            cumulative[row] = log_p


@QUIET
def compute_local_residual_mass(
    local_residual_mass_ptr, local_residual_mass_stride, cumulative_log_p_ptr, target_logits_ptr, target_logits_stride,
    target_local_max_ptr, target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride,
    draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride,
    draft_local_sumexp_ptr, draft_local_sumexp_stride, draft_sampled_ptr, expanded_idx_mapping_ptr,
    expanded_local_pos_ptr, temp_ptr, vocab_size, vocab_num_blocks, BLOCK_SIZE, PADDED_VOCAB_NUM_BLOCKS,
    num_speculative_steps=None, num_logits=None,
):  # fmt: skip
    """Block verification's residual mass `sum_x max(p_i M_b(x) - M_s(x), 0)` of the rows after a request's first."""
    residual, cumulative, temperatures = arrays(local_residual_mass_ptr, cumulative_log_p_ptr, temp_ptr)
    ratios = _DraftRatios(
        target_logits_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_logits_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )  # fmt: skip
    logits, drafts = float_array(target_logits_ptr), draft_sampled_ptr.tolist()
    local_pos = expanded_local_pos_ptr.numpy()
    columns = expanded_idx_mapping_ptr.tolist(), local_pos.tolist(), _is_bonus(local_pos).tolist(), drafts[1:]
    for row, (request, step, is_bonus, next_draft) in enumerate(zip(*columns, strict=False)):
        temperature = np.float32(temperatures[request])
        if step == 0 or is_bonus or next_draft < 0 or temperature == 0:
            continue
        target_p = np.exp(logits[row, :vocab_size] - ratios.target_logsumexp(row))
        draft_row = _draft_row(draft_logits_ptr, request, step, temperature, vocab_size)
        draft_p = np.exp(draft_row - ratios.draft_logsumexp(row))
        residual[row, 1:] = ZERO
        residual[row, 0] = np.maximum(np.exp(cumulative[row - 1]) * target_p - draft_p, ZERO).sum()


@QUIET
def rejection(
    sampled_ptr, sampled_stride, rejected_steps_ptr, target_rejected_logsumexp_ptr, draft_rejected_logsumexp_ptr,
    target_logits_ptr, target_logits_stride, target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr,
    target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, draft_sampled_ptr, draft_logits_ptr,
    draft_logits_stride_0, draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr,
    draft_local_sumexp_stride, cu_num_logits_ptr, idx_mapping_ptr, temp_ptr, seed_ptr, pos_ptr,
    synthetic_conditional_rates_ptr, cumulative_log_p_ptr, local_residual_mass_ptr, local_residual_mass_stride,
    vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS, HAS_DRAFT_LOGITS, SYNTHETIC_MODE, USE_BLOCK_VERIFICATION,
    fly_entropy_ptr=None, fly_entropy_threshold=0.0, FLY_WINDOW_SIZE=0,
):  # fmt: skip
    """How many drafts of each request are accepted (`rejected_steps`), its tokens so far, the rejected row's sums."""
    sampled, accepted_steps, target_sums, draft_sums, argmax, temperatures = arrays(
        sampled_ptr, rejected_steps_ptr, target_rejected_logsumexp_ptr, draft_rejected_logsumexp_ptr,
        target_local_argmax_ptr, temp_ptr,
    )  # fmt: skip
    ratios = _DraftRatios(
        target_logits_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_logits_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )  # fmt: skip
    cumulative, residual = arrays(cumulative_log_p_ptr, local_residual_mass_ptr)
    rates = synthetic_conditional_rates_ptr.tolist() if SYNTHETIC_MODE else None
    hesitates = (fly_entropy_ptr >= fly_entropy_threshold).tolist() if FLY_WINDOW_SIZE else None
    bounds, drafts, positions, seeds = (p.tolist() for p in (cu_num_logits_ptr, draft_sampled_ptr, pos_ptr, seed_ptr))
    for index, request in enumerate(idx_mapping_ptr.tolist()):
        first, end, seed = bounds[index], bounds[index + 1] - 1, seeds[request]
        temperature, tokens = np.float32(temperatures[request]), drafts[first + 1 : end + 1]
        is_greedy = temperature == 0
        if USE_BLOCK_VERIFICATION and not is_greedy:
            if -1 in tokens:
                tokens = tokens[: tokens.index(-1)]
            places = enumerate(positions[first : first + len(tokens)])
            uniforms = [philox_uniform(step_seed(seed, step), pos) for step, pos in places]
            sampled[index, : len(tokens)] = tokens
            accepted = _block_accepted(tokens, uniforms, first, cumulative, residual, ratios)
        elif FLY_WINDOW_SIZE:
            agrees, possible = [False] * len(tokens), [False] * len(tokens)
            for step, (row, token) in enumerate(enumerate(tokens, first)):
                if token < 0:
                    continue
                possible[step] = float(target_logits_ptr[row, token]) > NEGATIVE_INFINITY
                if is_greedy:
                    agrees[step] = token == argmax[row, 0]
                    continue
                if HAS_DRAFT_LOGITS:  # a draft that the drafter cannot emit is no draft of its own
                    possible[step] &= float(draft_logits_ptr[request, step, token]) > NEGATIVE_INFINITY
                log_ratio = ratios.log_ratio(row, request, step, temperature, token)
                agrees[step] = bool(log_ratio > np.log(philox_uniform(seed, positions[row])))
            accepted = _fly_accepted(agrees, possible, hesitates[first:end], FLY_WINDOW_SIZE)
            sampled[index, :accepted] = tokens[:accepted]
            if is_greedy and first + accepted < end:
                sampled[index, accepted] = argmax[first + accepted, 0]
        else:
            accepted = 0
            for row, token in enumerate(tokens, first):
                if token < 0 and not is_greedy:
                    break
                # A greedy request takes the target's argmax in place of the first rejected draft.
                best = int(argmax[row, 0]) if is_greedy else token
                if SYNTHETIC_MODE:
                    is_accepted = token >= 0 and philox_uniform(seed, positions[row]) < rates[accepted]
                elif is_greedy:
                    is_accepted = token == best
                else:
                    log_ratio = ratios.log_ratio(row, request, accepted, temperature, token)
                    is_accepted = log_ratio > np.log(philox_uniform(seed, positions[row]))
                sampled[index, accepted] = token if is_accepted else best
                if not is_accepted:
                    break
                accepted += 1
        accepted_steps[index] = accepted
        if not is_greedy and first + accepted < end:
            target_sums[index] = ratios.target_logsumexp(first + accepted)
            draft_sums[index] = ratios.draft_logsumexp(first + accepted)


def _fly_accepted(agrees: list[bool], possible: list[bool], hesitates: list[bool], window: int) -> int:
    """FLy: the first step of which the draft is neither the target's, nor possible where the target hesitates and
    followed by a whole window of drafts that are the target's."""
    accepted = 0
    while accepted < len(agrees):
        after = agrees[accepted + 1 : accepted + 1 + window]
        is_loose = possible[accepted] and hesitates[accepted] and len(after) == window and all(after)
        if not (agrees[accepted] or is_loose):
            break
        accepted += 1
    return accepted


def _block_accepted(tokens, uniforms, first: int, cumulative, residual, ratios: _DraftRatios) -> int:
    """Block verification (Sun et al., 2024): the last step whose threshold its uniform number passes, plus one.

    The threshold of the last draft is its joint ratio `p_i`; before it, the residual mass `r` of the next step over
    `r + 1 - p_i`. For a one-hot draft `r = p_i (1 - M_b(next draft))`.
    """
    accepted = 0
    for step, uniform in enumerate(uniforms):
        row = first + step
        threshold = ratio = np.exp(cumulative[row])
        if step + 1 < len(tokens):
            if residual is None:
                mass = ratio * (ONE - np.exp(ratios.target_log_p(row + 1, tokens[step + 1])))
            else:
                mass = residual[row + 1].sum()
            denominator = mass + ONE - ratio
            threshold = mass / denominator if denominator > 0 else ONE
        if uniform <= threshold:
            accepted = step + 1
    return accepted


@QUIET
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
