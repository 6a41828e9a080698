"""The chain of labels drafted from exact prefix conditionals."""

from collections.abc import Callable

import torch
import triton

from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, Frames
from vllm_ctc_spec.kernels.noise import gumbel_noise_reference
from vllm_ctc_spec.kernels.prefix_chain_sweep import extend_kernel, root_kernel, score_kernel

# One program of a sweep scores a tile of tokens times (padded) frames, and with a Markov head does so for 16 rows: they
# share a tile of W_out, and 16 is the least that a tensor core multiplies. Larger tiles spill registers on sm_90.
_TILE = 4096
_MAX_TOKENS, _MAX_TOKENS_MARKOV = 256, 128
_MARKOV_ROWS = 16


def prefix_chain(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, N] int64, [B] int32
    """Draft `N` labels, each from its exact conditional given the labels before it.

    For the prefix `y_1..y_k` drafted so far, `n[t]` and `b[t]` are the masses of the alignments of frames `1..t` that
    collapse to exactly this prefix and end in `y_k`, or in blank; `w = n + b`. A new label `v` can first appear at
    frame `t` after all of `w[t-1]`, except that a repeat needs a blank between, so that only `b[t-1]` counts for
    `v = y_k`:

        S(v)   = sum_{t=1..T} p_t(v) w_v[t-1],         w_v = b if v = y_k else w
        ell(v) = log S(v) + W_out[v] . W_in[last],      last = y_k, at the root the anchor
        y      = argmax_v ell(v)                                    greedy, ties to the lowest index
        y      = argmax_v ell(v) / temperature + Gumbel(seed, position + k, k, v)        sampled

    and the drawn label extends the state:

        n'[t] = p_t(y) (n'[t-1] + w_y[t-1]),   b'[t] = p_t(blank) (b'[t-1] + n'[t-1]),   n'[0] = b'[0] = 0

    starting from `n = 0`, `b[t] = prod_{s<=t} p_s(blank)`. The anchor is not in the frames: no repeat rule at the
    root (there `w = b`, so the rule is void). Both vectors are divided by `S(y)` after each label, which makes
    `S(v) = q(v | y_1..y_k)` at every step, and only `t < T` is kept, because nothing can start after frame `T`.
    The chain ends where no `S(v)` is above `IMPOSSIBLE`; `T` frames hold at most `T - repeats` labels. The vectors are
    linear fp32: conditionals agree with fp64 to 1e-5, down to about 1e-10 in chains that use up their frames.

    With transitions `A` between frames there is no blank and no repeat rule, and both vectors of the state are `phi`,
    the mass with which the next label appears at a frame. Only the state differs:

        w[t-1] = b[t-1] = phi[t],   phi[t] = A[0, t] at the root,   phi'[t] = sum_{s<t} A[s, t] p_s(y) phi[s] / S(y)

    Arguments:
        frames: log_blank is not read with transitions.
        num_labels: N, any relation to T.
        sampling: None for greedy, or `ChainSampling` (draft_logits contiguous in V). `draft_logits[slot, k]` receives
            `ell` before the temperature, so that the law of label k is exactly
            `softmax(draft_logits[slot, k] / temperature)`; past the end it is the one-hot row of the fill token (0
            there, -inf elsewhere). Inert rows (slot -1) write nothing there and their labels are arbitrary token ids.
    Returns:
        labels [B, N] int64 and lengths [B] int32, the number of labels before the end. Past the length stands the
        last label, or if there is none the anchor, at most V - 1.

    Why custom: a label depends on the one before it, so this is N dependent sweeps over T * V logits. In torch each
    sweep is some twenty launches and materialises fp32 probabilities; here it is two launches and no scratch of size
    V. One program per request could keep the whole loop on the GPU, but would pull T * V logits per label through a
    single SM; so the host launches a static sequence of 1 + 2 N kernels (no value of a tensor is read on the host, so
    a CUDA graph can hold it) and each sweep spreads over the vocabulary.
    """
    run = prefix_chain_triton if frames.logits.is_cuda else prefix_chain_reference
    return run(frames, num_labels, sampling)


def prefix_chain_reference(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two vectors of the state, w = n + b and b, are rows 0 and 1 of [B, 2, T]."""
    logits, log_label, log_blank, anchor, markov, transitions = frames
    num_frames = logits.shape[1]
    p = torch.exp(logits.float() + log_label[..., None])
    p.masked_fill_(logits == -torch.inf, 0)  # a frame of -inf only may come with an infinite log_label
    state, extend = _ctc(log_blank) if transitions is None else _between_frames(transitions)
    if markov is not None:
        w_in, w_out = markov[0], markov[1].float().T
    if sampling is not None:
        noise, inverse_temperature = _noise(sampling, num_labels, p.shape[2])

    last, frame_p = anchor[:, None], None
    labels, alive_at, rows = [], [], []
    for k in range(num_labels):
        mass = torch.bmm(state[:, :1], p)[:, 0]  # S(v), [B, V]
        if frame_p is not None:
            mass.scatter_(1, last, torch.bmm(state[:, 1:], frame_p)[:, 0])
        mass = torch.where(mass > IMPOSSIBLE, mass, 0.0)
        ell = mass.log()
        if markov is not None:
            ell = torch.addmm(ell, w_in[last[:, 0]].float(), w_out)
        score = ell if sampling is None else torch.addcmul(noise[:, k], ell, inverse_temperature)
        label = score.max(dim=1, keepdim=True).indices
        drawn_mass = mass.gather(1, label)
        alive = drawn_mass > 0
        label = torch.where(alive, label, last.clamp_max(p.shape[2] - 1))
        if sampling is not None:
            rows.append(ell.scatter_(1, label, torch.where(alive, ell.gather(1, label), 0.0)))
        labels.append(label)
        alive_at.append(alive)

        frame_p = p.gather(2, label[:, None].expand(-1, num_frames, 1))  # p_t(y), [B, T, 1]
        weight = torch.where(label == last, state[:, 1], state[:, 0]) * (alive / drawn_mass.clamp_min(IMPOSSIBLE))
        state = extend(frame_p[..., 0], weight)
        last = label

    if sampling is not None:
        active = sampling.slots >= 0
        sampling.draft_logits[sampling.slots[active], :num_labels] = torch.stack(rows, 1)[active]
    return torch.cat(labels, 1), torch.cat(alive_at, 1).sum(1, dtype=torch.int32)


StateRecursion = tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
"""The root state [B, 2, T], and the state behind a label from p_t(y) [B, T] and the mass before it [B, T]."""


def _ctc(log_blank: torch.Tensor) -> StateRecursion:
    """Both recursions in closed form: `n' = P w_y` with `P[t, s] = prod_{s<r<=t} p_r(y)`, `s < t`, and `b' = K n'` with
    the same matrix of the blank. Products of probabilities, so zeros and ones are exact and nothing cancels."""
    num_frames = log_blank.shape[1]
    below = torch.ones(num_frames, num_frames, dtype=torch.bool, device=log_blank.device).tril(-1)
    one = log_blank.new_ones(())
    blank = torch.nn.functional.pad(log_blank[:, :-1].exp(), (1, 0), value=1.0)  # [B, T], entry t is frame t of t < T
    after_blank = _products(blank, below, one)
    advance = torch.stack([after_blank + torch.eye(num_frames, device=one.device), after_blank], 1).flatten(1, 2)

    def extend(frame_p: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        first = _products(torch.nn.functional.pad(frame_p[:, :-1], (1, 0)), below, one)
        return torch.bmm(advance, torch.bmm(first, weight[..., None])).view(-1, 2, num_frames)

    return blank.cumprod(1)[:, None].expand(-1, 2, -1), extend


def _between_frames(transitions: torch.Tensor) -> StateRecursion:
    def extend(frame_p: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        emitted = (frame_p * weight)[:, None]
        # A second division, after which a label of one frame has exactly 1 there.
        emitted = emitted / emitted.sum(2, keepdim=True).clamp_min(IMPOSSIBLE)
        return torch.bmm(emitted, transitions[:, 1:]).expand(-1, 2, -1)

    return transitions[:, :1].expand(-1, 2, -1), extend


def _products(p: torch.Tensor, below: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """`[t, s] = prod_{s<r<=t} p[r]` below the diagonal, else 0: [B, T] to [B, T, T]."""
    return torch.where(below, p[..., None], one).cumprod(1).mul_(below)


def _noise(sampling: ChainSampling, num_labels: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel noise [B, N, V], zero in greedy rows, and 1 / temperature [B, 1], one in greedy rows."""
    slots = sampling.slots.clamp_min(0)
    temperature = sampling.temperature[slots][:, None]
    sampled = (temperature > 0) & (sampling.slots >= 0)[:, None]
    labels = torch.arange(num_labels, device=slots.device)
    positions = sampling.positions[:, None] + labels
    noise = gumbel_noise_reference(sampling.seeds[slots][:, None], positions, labels, num_tokens)
    return noise * sampled[..., None], torch.where(sampled, 1 / temperature, 1.0)


def prefix_chain_triton(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    logits, log_label, log_blank, anchor, markov, transitions = frames
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
    log_label, log_blank = log_label.contiguous(), log_blank.contiguous()
    transitions = None if transitions is None else transitions.contiguous()
    log_p = (logits, logits.stride(0), logits.stride(1), log_label)
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
