"""The Triton kernels of `prefix_chain`: the root state, then per label a sweep over the vocabulary and a state step.

The mathematics and the reference are in `prefix_chain.py`.
"""

import triton
import triton.language as tl

from vllm_ctc_spec.kernels.contract import IMPOSSIBLE
from vllm_ctc_spec.kernels.noise import gumbel_noise

_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)


@triton.jit
def root_kernel(
    log_blank_ptr,  # [B, T] fp32
    transitions_ptr,  # [B, 1 + T, T] fp32, or None
    anchor_ptr,  # [B] int64
    state_ptr,  # [B, 2, T] fp32
    last_ptr,  # [B] int64
    lengths_ptr,  # [B] int32
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The state before the first label, `w[t] = b[t] = prod_{s<=t} p_s(blank)`, or `A[0, t + 1]`. Grid (B,)."""
    row = tl.program_id(0)
    t = tl.arange(0, BLOCK_T)
    if transitions_ptr is None:
        # Frame t of 1..T lies at t - 1; the empty product at t = 0 is 1.
        log_blank = tl.load(log_blank_ptr + row * T + t - 1, mask=(t > 0) & (t < T), other=0.0)
        b = tl.cumprod(tl.exp(log_blank), axis=0)
    else:
        b = tl.load(transitions_ptr + row.to(tl.int64) * (1 + T) * T + t, mask=t < T, other=0.0)
    tl.store(state_ptr + row * 2 * T + t, b, mask=t < T)
    tl.store(state_ptr + row * 2 * T + T + t, b, mask=t < T)
    tl.store(last_ptr + row, tl.load(anchor_ptr + row))
    tl.store(lengths_ptr + row, 0)


@triton.jit
def _frame_prob(logits, log_label):
    """`p_t(v)`. A frame of -inf only may come with an infinite log_label, and -inf + inf is NaN."""
    return tl.where(logits == -float("inf"), 0.0, tl.exp(logits.to(tl.float32) + log_label))


@triton.jit(do_not_specialize=["k", "batch"])
def score_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    log_label_ptr,  # [B, T] fp32
    state_ptr,  # [B, 2, T] fp32: w = n + b, and b
    last_ptr,  # [B] int64
    w_in_ptr,  # [V, RANK]
    w_out_ptr,  # [V, RANK]
    temperature_ptr,  # [R] fp32
    seeds_ptr,  # [R] int64
    positions_ptr,  # [B] int64
    slots_ptr,  # [B] int64
    draft_ptr,  # [R, N, V] fp32
    draft_stride_r,
    draft_stride_n,
    block_best_ptr,  # [B, cdiv(V, BLOCK_V)] fp32, the best (noised) score of each block
    block_token_ptr,  # [B, cdiv(V, BLOCK_V)] int32, where it is
    k,
    batch,
    num_tokens,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """`ell(v) = log sum_t p_t(v) w_v[t-1] + W_out[v] . W_in[last]` of a block of tokens, for ROWS rows.

    Grid (cdiv(B, ROWS), cdiv(V, BLOCK_V)). Neighbouring programs work on the same tokens, so that W_out is read from
    memory once per label and not once per row.
    """
    first_row, block = tl.program_id(0) * ROWS, tl.program_id(1)
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    valid = token < num_tokens
    t = tl.arange(0, BLOCK_T)

    if RANK > 0:
        group = tl.arange(0, ROWS)
        row_last = tl.load(last_ptr + first_row + group, mask=first_row + group < batch, other=0)
        bias = tl.zeros((ROWS, BLOCK_V), tl.float32)
        for start in range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            inner = tl.load(w_in_ptr + row_last[:, None] * RANK + r[None, :], mask=r[None, :] < RANK, other=0.0)
            outer_mask = valid[None, :] & (r[:, None] < RANK)
            outer = tl.load(w_out_ptr + token[None, :].to(tl.int64) * RANK + r[:, None], mask=outer_mask, other=0.0)
            bias = tl.dot(inner, outer, bias, input_precision="ieee")

    for i in range(ROWS):
        row = first_row + i
        if row < batch:
            w = tl.load(state_ptr + row * 2 * T + t, mask=t < T, other=0.0)
            b = tl.load(state_ptr + row * 2 * T + T + t, mask=t < T, other=0.0)
            log_label = tl.load(log_label_ptr + row * T + t, mask=t < T, other=0.0)
            last = tl.load(last_ptr + row)
            row_logits = logits_ptr + row.to(tl.int64) * logits_stride_b
            x = tl.load(
                row_logits + t[:, None].to(tl.int64) * logits_stride_t + token[None, :],
                mask=(t[:, None] < T) & valid[None, :],
                other=-float("inf"),
            )
            # At the root w = b, so that the anchor, which is not in the frames, is under no repeat rule.
            weight = tl.where((token == last)[None, :], b[:, None], w[:, None])
            mass = tl.sum(_frame_prob(x, log_label[:, None]) * weight, axis=0)
            ell = tl.where(mass > _IMPOSSIBLE, tl.log(mass), -float("inf"))
            if RANK > 0:
                ell += tl.sum(tl.where(group[:, None] == i, bias, 0.0), axis=0)
            score = ell
            if SAMPLED:
                slot = tl.load(slots_ptr + row)
                if slot >= 0:
                    row_draft = draft_ptr + slot * draft_stride_r + k.to(tl.int64) * draft_stride_n
                    tl.store(row_draft + token, ell, mask=valid)
                    temperature = tl.load(temperature_ptr + slot)
                    if temperature > 0:
                        noise = gumbel_noise(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row) + k, k, token)
                        score = ell * (1.0 / temperature) + noise
            best, place = tl.max(score, axis=0, return_indices=True)
            tl.store(block_best_ptr + row * tl.num_programs(1) + block, best)
            tl.store(block_token_ptr + row * tl.num_programs(1) + block, block * BLOCK_V + place)


@triton.jit
def then(a, c, a_next, c_next):
    """The affine map `x -> a x + c`, and then the next one."""
    return a * a_next, c * a_next + c_next


@triton.jit
def along_transitions(mass, transitions_ptr, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """`phi'[t] = sum_s mass[s] A[s, t] / sum_s mass[s]`, 0 if there is no mass. transitions_ptr: A [1 + T, T]."""
    total = tl.sum(mass, axis=0)
    # Rounded to nearest, so that all mass at one frame is exactly 1.
    emitted = tl.where(total > 0, tl.div_rn(mass, total), 0.0)
    s, t = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    tile = tl.load(transitions_ptr + (1 + s) * T + t, mask=(s < T) & (t < T), other=0.0)
    return tl.sum(emitted[:, None] * tile, axis=0)


@triton.jit
def _emission(logits_ptr, logits_stride_t, log_label_ptr, weight_ptr, frame, T: tl.constexpr):
    """`p(y)` of a frame, and the mass of `y` first appearing there. Both 0 outside of the frames."""
    inside = (frame >= 0) & (frame < T)
    x = tl.load(logits_ptr + frame.to(tl.int64) * logits_stride_t, mask=inside, other=-float("inf"))
    p = _frame_prob(x, tl.load(log_label_ptr + frame, mask=inside, other=0.0))
    return p, p * tl.load(weight_ptr + frame, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["k"])
def extend_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    log_label_ptr,  # [B, T] fp32
    log_blank_ptr,  # [B, T] fp32
    transitions_ptr,  # [B, 1 + T, T] fp32, or None
    state_ptr,  # [B, 2, T] fp32: w = n + b, and b
    last_ptr,  # [B] int64
    slots_ptr,  # [B] int64
    draft_ptr,  # [R, N, V] fp32
    draft_stride_r,
    draft_stride_n,
    block_best_ptr,  # [B, num_blocks] fp32
    block_token_ptr,  # [B, num_blocks] int32
    labels_ptr,  # [B, N] int64
    lengths_ptr,  # [B] int32
    k,
    num_labels,
    num_blocks,
    num_tokens,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """Take the best block's token as label `k` and move the state behind it. Grid (B,).

    Both recursions of CTC are affine in their state, so each is a scan over frames: with `state[t]` for `t = 0..T-1` in
    lane `t` and frame `t` of `1..T` at `t - 1`, `n` composes the maps of the frames up to `t - 1`; `b` needs `n[t-1]`,
    which is the same scan one frame later, cheaper than a turn through shared memory.
    """
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK_N)
    block_best = tl.load(block_best_ptr + row * num_blocks + block, mask=block < num_blocks, other=-float("inf"))
    best, place = tl.max(block_best, axis=0, return_indices=True)
    alive = best > -float("inf")
    last = tl.load(last_ptr + row)
    fill = tl.minimum(last, num_tokens - 1)
    label = tl.where(alive, tl.load(block_token_ptr + row * num_blocks + place).to(tl.int64), fill)

    logits_ptr += row.to(tl.int64) * logits_stride_b + label
    log_label_ptr += row * T
    state_ptr += row * 2 * T
    weight_ptr = state_ptr + tl.where(label == last, T, 0)
    t = tl.arange(0, BLOCK_T)
    _, mass = _emission(logits_ptr, logits_stride_t, log_label_ptr, weight_ptr, t, T)
    if transitions_ptr is None:
        p, first = _emission(logits_ptr, logits_stride_t, log_label_ptr, weight_ptr, t - 1, T)
        p_before, first_before = _emission(logits_ptr, logits_stride_t, log_label_ptr, weight_ptr, t - 2, T)
        _, n = tl.associative_scan((p, first), 0, then)
        _, n_before = tl.associative_scan((p_before, first_before), 0, then)
        behind = (t > 0) & (t < T)
        blank = tl.exp(tl.load(log_blank_ptr + row * T + t - 1, mask=behind, other=-float("inf")))
        _, b = tl.associative_scan((blank, blank * n_before), 0, then)
        scale = tl.where(alive, 1.0 / tl.sum(mass, axis=0), 0.0)
        w, b = (n + b) * scale, b * scale
    else:
        row_transitions = transitions_ptr + row.to(tl.int64) * (1 + T) * T
        b = along_transitions(tl.where(alive, mass, 0.0), row_transitions, T, BLOCK_T)
        w = b

    # All warps must have read the old state.
    tl.debug_barrier()
    tl.store(state_ptr + t, w, mask=t < T)
    tl.store(state_ptr + T + t, b, mask=t < T)
    tl.store(last_ptr + row, label)
    tl.store(labels_ptr + row * num_labels + k, label)
    tl.store(lengths_ptr + row, tl.load(lengths_ptr + row) + alive.to(tl.int32))
    if SAMPLED:
        slot = tl.load(slots_ptr + row)
        if (slot >= 0) & (best == -float("inf")):
            tl.store(draft_ptr + slot * draft_stride_r + k.to(tl.int64) * draft_stride_n + label, 0.0)
