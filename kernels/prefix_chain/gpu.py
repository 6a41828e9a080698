"""Serves a GPU, in Triton: the probabilities of the candidates, then the whole chain of each request."""

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels._recursions import (
    candidate_bias,
    candidate_masses,
    extend,
    first_largest,
    root_state,
    store_state,
)
from vllm_ctc_spec.kernels.best_tokens import candidate_probs, head_block, warps_for
from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, Frames
from vllm_ctc_spec.kernels.noise import gumbel_noise

_IMPOSSIBLE = tl.constexpr(IMPOSSIBLE)
_CLEARED_AT_ONCE = 4096


def prefix_chain_triton(
    tokens: torch.Tensor,  # [B, M] int64, ascending
    frames: Frames,
    num_labels: int,
    sampling: ChainSampling,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits, log_scale, log_blank, anchor, markov, transitions, _ = frames
    *of_rows, draft_logits = sampling
    if logits.stride(2) != 1 or draft_logits.stride(2) != 1:
        raise ValueError("prefix_chain needs logits and draft_logits that are contiguous in the vocabulary")
    if markov is not None and not (markov[0].is_contiguous() and markov[1].is_contiguous()):
        raise ValueError("prefix_chain needs contiguous Markov weights [V, r]")
    (batch, num_frames, num_tokens), num_candidates = logits.shape, tokens.shape[1]
    log_scale = log_scale.contiguous()
    temperature, seeds, positions, requests = (x.contiguous() for x in of_rows)
    draft = requests, draft_logits, draft_logits.stride(0), draft_logits.stride(1)
    w_in, w_out = (None, None) if markov is None else markov
    rank = 0 if markov is None else w_in.shape[1]
    block_m = triton.next_power_of_2(num_candidates)
    labels = torch.empty(batch, num_labels, dtype=torch.int64, device=logits.device)
    lengths = torch.empty(batch, dtype=torch.int32, device=logits.device)
    clear_kernel[(batch, num_labels, triton.cdiv(num_tokens, _CLEARED_AT_ONCE))](
        *draft, num_tokens, BLOCK=_CLEARED_AT_ONCE, num_warps=4
    )
    chain_kernel[(batch,)](
        tokens, candidate_probs(tokens, logits, log_scale), log_blank.contiguous(),
        None if transitions is None else transitions.contiguous(), anchor.contiguous(), w_in, w_out,
        temperature, seeds, positions, *draft, log_scale.new_empty(batch, 2, num_frames), labels, lengths,
        num_labels, num_candidates, num_tokens, T=num_frames, BLOCK_T=triton.next_power_of_2(num_frames),
        BLOCK_M=block_m, RANK=rank, BLOCK_R=head_block(rank, block_m), num_warps=warps_for(block_m),
    )  # fmt: skip
    return labels, lengths


@triton.jit
def clear_kernel(requests_ptr, draft_ptr, draft_stride_r, draft_stride_n, num_tokens, BLOCK: tl.constexpr):
    """-inf in all columns of the rows that the chain writes. Grid (B, N, cdiv(V, BLOCK))."""
    request = tl.load(requests_ptr + tl.program_id(0))
    if request >= 0:
        token = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        draft_ptr += request * draft_stride_r + tl.program_id(1).to(tl.int64) * draft_stride_n
        tl.store(draft_ptr + token, -float("inf"), mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_labels"])
def chain_kernel(
    tokens_ptr,  # [B, M] int64, ascending
    p_ptr,  # [B, T, BLOCK_M] fp32
    log_blank_ptr,  # [B, T] fp32
    transitions_ptr,  # [B, 1 + T, T] fp32, or None
    anchor_ptr,  # [B] int64
    w_in_ptr,  # [V or more, RANK]
    w_out_ptr,  # [V, RANK]
    temperature_ptr,  # [R] fp32
    seeds_ptr,  # [R] int64
    positions_ptr,  # [B] int64
    requests_ptr,  # [B] int64
    draft_ptr,  # [R, N, V] fp32
    draft_stride_r,
    draft_stride_n,
    state_ptr,  # [B, 2, T] fp32, scratch: w = n + b, and b
    labels_ptr,  # [B, N] int64
    lengths_ptr,  # [B] int32
    num_labels,
    num_candidates,
    num_tokens,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Label after label: `ell` of the candidates, the best with its noise, and the state behind it. Grid (B,)."""
    row = tl.program_id(0).to(tl.int64)
    tokens_ptr += row * num_candidates
    p_ptr += row * T * BLOCK_M
    state_ptr += row * 2 * T
    labels_ptr += row * num_labels
    m = tl.arange(0, BLOCK_M)
    token = tl.load(tokens_ptr + m, mask=m < num_candidates, other=0)
    request = tl.load(requests_ptr + row)
    is_active = request >= 0
    draft_ptr += request * draft_stride_r
    temperature = tl.load(temperature_ptr + request, mask=is_active, other=0.0)
    seed = tl.load(seeds_ptr + request, mask=is_active, other=0)
    position = tl.load(positions_ptr + row)

    if transitions_ptr is not None:
        transitions_ptr += row * (1 + T) * T
    blank, b = root_state(log_blank_ptr + row * T, transitions_ptr, T, BLOCK_T)
    store_state(state_ptr, b, b, T, BLOCK_T)
    last, place, repeat, length = tl.load(anchor_ptr + row), -1, 0.0, 0
    for k in range(num_labels):
        tl.debug_barrier()  # the state is written
        mass = candidate_masses(p_ptr, state_ptr, place, repeat, T, BLOCK_M)
        ell = tl.where(mass > _IMPOSSIBLE, tl.log(mass), -float("inf"))
        if RANK > 0:
            ell += candidate_bias(tokens_ptr, last, w_in_ptr, w_out_ptr, num_candidates, BLOCK_M, RANK, BLOCK_R)
        is_possible = ell > -float("inf")
        if is_active:
            tl.store(draft_ptr + token, ell, mask=is_possible)
        score = ell
        if temperature > 0:
            noise = gumbel_noise(seed, position + k, k, token.to(tl.int32))
            score = tl.where(is_possible, ell * (1.0 / temperature) + noise, -float("inf"))
        best, place = first_largest(score, m)
        alive = best > -float("inf")
        label = tl.load(tokens_ptr + place, mask=alive, other=0)
        label = tl.where(alive, label, tl.minimum(last, num_tokens - 1))
        if is_active & (best == -float("inf")):
            tl.store(draft_ptr + label, 0.0)
        tl.store(labels_ptr + k, label)
        length += alive.to(tl.int32)
        draft_ptr += draft_stride_n

        # At the root w = b: the anchor, which the frames do not hold, is under no repeat rule.
        weight_ptr = state_ptr + tl.where(label == last, T, 0)
        p, n, b = extend(
            p_ptr + tl.where(alive, place, 0), weight_ptr, blank, transitions_ptr, alive, T, BLOCK_T, BLOCK_M
        )
        repeat = tl.sum(p * b, axis=0)
        last = label
        tl.debug_barrier()  # all warps have read the old state
        store_state(state_ptr, n + b, b, T, BLOCK_T)
    tl.store(lengths_ptr + row, length)
