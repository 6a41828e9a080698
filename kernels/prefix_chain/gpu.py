"""Serves a GPU, in Triton: the root state, then per label a sweep over the vocabulary and a step of the state."""

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels._recursions import along_transitions, behind_label, frame_prob
from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, Frames
from vllm_ctc_spec.kernels.noise import gumbel_noise

_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)
# One program of a sweep scores a tile of tokens times (padded) frames. With a Markov head it does so for 16 rows: they
# share a tile of W_out, and 16 is the least that a tensor core multiplies. Larger tiles spill registers on sm_90.
_TILE = 4096
_MAX_TOKENS, _MAX_TOKENS_MARKOV = 256, 128
_MARKOV_ROWS = 16


def prefix_chain_triton(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    logits, log_scale, log_blank, anchor, markov, transitions, _ = frames
    if logits.stride(2) != 1 or (sampling is not None and sampling.draft_logits.stride(2) != 1):
        raise ValueError("prefix_chain needs logits and draft_logits that are contiguous in the vocabulary")
    if markov is not None and not (markov[0].is_contiguous() and markov[1].is_contiguous()):
        raise ValueError("prefix_chain needs contiguous Markov weights [V, r]")
    batch, num_frames, num_tokens = logits.shape
    device = logits.device
    block_t = triton.next_power_of_2(num_frames)
    block_v = min(_MAX_TOKENS if markov is None else _MAX_TOKENS_MARKOV, _TILE // block_t)
    num_blocks = triton.cdiv(num_tokens, block_v)
    rows = 1 if markov is None else _MARKOV_ROWS
    rank = 0 if markov is None else markov[0].shape[1]

    labels = torch.empty(batch, num_labels, dtype=torch.int64, device=device)
    lengths = torch.empty(batch, dtype=torch.int32, device=device)
    last = torch.empty(batch, dtype=torch.int64, device=device)
    state = torch.empty(batch, 2, num_frames, dtype=torch.float32, device=device)
    block_best = torch.empty(batch, num_blocks, dtype=torch.float32, device=device)
    block_token = torch.empty(batch, num_blocks, dtype=torch.int32, device=device)
    log_scale, log_blank = log_scale.contiguous(), log_blank.contiguous()
    transitions = None if transitions is None else transitions.contiguous()
    log_p = (logits, logits.stride(0), logits.stride(1), log_scale)
    w_in, w_out = (None, None) if markov is None else markov
    draft = (None,) * 5 + (0, 0)
    if sampling is not None:
        *of_rows, draft_logits = sampling
        draft = (*(x.contiguous() for x in of_rows), draft_logits, draft_logits.stride(0), draft_logits.stride(1))

    root_kernel[(batch,)](
        log_blank, transitions, anchor.contiguous(), state, last, lengths, T=num_frames, BLOCK_T=block_t, num_warps=1
    )
    for k in range(num_labels):
        score_kernel[(triton.cdiv(batch, rows), num_blocks)](
            *log_p, state, last, w_in, w_out, *draft, block_best, block_token, k, batch, num_tokens,
            T=num_frames, BLOCK_T=block_t, BLOCK_V=block_v, ROWS=rows,
            RANK=rank, BLOCK_R=max(16, min(32, triton.next_power_of_2(rank))), SAMPLED=sampling is not None,
            num_warps=4,
        )  # fmt: skip
        extend_kernel[(batch,)](
            *log_p, log_blank, transitions, state, last, *draft[3:], block_best, block_token, labels, lengths, k,
            num_labels, num_blocks, num_tokens, T=num_frames, BLOCK_T=block_t,
            BLOCK_N=triton.next_power_of_2(num_blocks), SAMPLED=sampling is not None, num_warps=4,
        )  # fmt: skip
    return labels, lengths


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


@triton.jit(do_not_specialize=["k", "batch"])
def score_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    log_scale_ptr,  # [B, T] fp32
    state_ptr,  # [B, 2, T] fp32: w = n + b, and b
    last_ptr,  # [B] int64
    w_in_ptr,  # [V, RANK]
    w_out_ptr,  # [V, RANK]
    temperature_ptr,  # [R] fp32
    seeds_ptr,  # [R] int64
    positions_ptr,  # [B] int64
    requests_ptr,  # [B] int64
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

    Grid (cdiv(B, ROWS), cdiv(V, BLOCK_V)). Neighbouring programs work on the same tokens, so W_out is read from memory
    once per label and not once per row.
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
            log_scale = tl.load(log_scale_ptr + row * T + t, mask=t < T, other=0.0)
            last = tl.load(last_ptr + row)
            row_logits = logits_ptr + row.to(tl.int64) * logits_stride_b
            x = tl.load(
                row_logits + t[:, None].to(tl.int64) * logits_stride_t + token[None, :],
                mask=(t[:, None] < T) & valid[None, :],
                other=-float("inf"),
            )
            # At the root w = b, so the anchor is under no repeat rule: the frames do not hold it.
            weight = tl.where((token == last)[None, :], b[:, None], w[:, None])
            mass = tl.sum(frame_prob(x, log_scale[:, None]) * weight, axis=0)
            ell = tl.where(mass > _IMPOSSIBLE, tl.log(mass), -float("inf"))
            if RANK > 0:
                ell += tl.sum(tl.where(group[:, None] == i, bias, 0.0), axis=0)
            score = ell
            if SAMPLED:
                request = tl.load(requests_ptr + row)
                if request >= 0:
                    row_draft = draft_ptr + request * draft_stride_r + k.to(tl.int64) * draft_stride_n
                    tl.store(row_draft + token, ell, mask=valid)
                    temperature = tl.load(temperature_ptr + request)
                    if temperature > 0:
                        noise = gumbel_noise(tl.load(seeds_ptr + request), tl.load(positions_ptr + row) + k, k, token)
                        score = ell * (1.0 / temperature) + noise
            best, place = tl.max(score, axis=0, return_indices=True)
            tl.store(block_best_ptr + row * tl.num_programs(1) + block, best)
            tl.store(block_token_ptr + row * tl.num_programs(1) + block, block * BLOCK_V + place)


@triton.jit
def _emission(logits_ptr, logits_stride_t, log_scale_ptr, weight_ptr, frame, T: tl.constexpr):
    """`p(y)` of a frame, and the mass of `y` first appearing there. Both are 0 outside of the frames."""
    inside = (frame >= 0) & (frame < T)
    x = tl.load(logits_ptr + frame.to(tl.int64) * logits_stride_t, mask=inside, other=-float("inf"))
    p = frame_prob(x, tl.load(log_scale_ptr + frame, mask=inside, other=0.0))
    return p, p * tl.load(weight_ptr + frame, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["k"])
def extend_kernel(
    logits_ptr,  # [B, T, V]
    logits_stride_b,
    logits_stride_t,
    log_scale_ptr,  # [B, T] fp32
    log_blank_ptr,  # [B, T] fp32
    transitions_ptr,  # [B, 1 + T, T] fp32, or None
    state_ptr,  # [B, 2, T] fp32: w = n + b, and b
    last_ptr,  # [B] int64
    requests_ptr,  # [B] int64
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
    """Take the best block's token as label `k` and move the state behind it. Grid (B,)."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCK_N)
    block_best = tl.load(block_best_ptr + row * num_blocks + block, mask=block < num_blocks, other=-float("inf"))
    best, place = tl.max(block_best, axis=0, return_indices=True)
    alive = best > -float("inf")
    last = tl.load(last_ptr + row)
    fill = tl.minimum(last, num_tokens - 1)
    label = tl.where(alive, tl.load(block_token_ptr + row * num_blocks + place).to(tl.int64), fill)

    logits_ptr += row.to(tl.int64) * logits_stride_b + label
    log_scale_ptr += row * T
    state_ptr += row * 2 * T
    weight_ptr = state_ptr + tl.where(label == last, T, 0)
    t = tl.arange(0, BLOCK_T)
    _, mass = _emission(logits_ptr, logits_stride_t, log_scale_ptr, weight_ptr, t, T)
    if transitions_ptr is None:
        p, first = _emission(logits_ptr, logits_stride_t, log_scale_ptr, weight_ptr, t - 1, T)
        p_before, first_before = _emission(logits_ptr, logits_stride_t, log_scale_ptr, weight_ptr, t - 2, T)
        behind = (t > 0) & (t < T)
        blank = tl.exp(tl.load(log_blank_ptr + row * T + t - 1, mask=behind, other=-float("inf")))
        n, b = behind_label(blank, p, first, p_before, first_before)
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
        request = tl.load(requests_ptr + row)
        if (request >= 0) & (best == -float("inf")):
            tl.store(draft_ptr + request * draft_stride_r + k.to(tl.int64) * draft_stride_n + label, 0.0)
