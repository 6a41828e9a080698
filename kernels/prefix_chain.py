"""The chain of labels drafted from exact CTC prefix conditionals."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels.noise import gumbel_noise, gumbel_noise_reference

# A label whose conditional probability is not above this counts as impossible, and a chain without a possible label
# has ended. It keeps every division and every forward vector far from the subnormal numbers that GPUs flush to zero.
IMPOSSIBLE = 1e-30


class ChainSampling(NamedTuple):
    """How the labels of a chain are sampled. `R` request slots, `B` rows of this step."""

    temperature: torch.Tensor  # [R] fp32; 0 is greedy
    seeds: torch.Tensor  # [R] int64
    positions: torch.Tensor  # [B] int64, the position of the first label: label k uses the noise of positions + k
    slots: torch.Tensor  # [B] int64, the request slot of each row; -1 is an inert row
    draft_logits: torch.Tensor  # [R, N, V] fp32, written: log q(v | prefix) up to a constant, -inf where impossible


def prefix_chain(
    logits: torch.Tensor,  # [B, T, V] fp16, bf16 or fp32
    log_label: torch.Tensor,  # [B, T] fp32
    log_blank: torch.Tensor,  # [B, T] fp32
    anchor: torch.Tensor,  # [B] int64
    num_labels: int,
    markov: tuple[torch.Tensor, torch.Tensor] | None = None,  # W_in [V, r], W_out [V, r]
    sampling: ChainSampling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, N] int64, [B] int32
    """Draft `N` labels, each from its exact conditional given the labels before it.

    Frames give `p_t(v) = exp(logits[b, t, v] + log_label[b, t])` and `p_t(blank) = exp(log_blank[b, t])`. For the
    prefix `y_1..y_k` drafted so far, `n[t]` and `b[t]` are the masses of the alignments of frames `1..t` that collapse
    to exactly this prefix and end in `y_k`, or in blank; `w = n + b`. A new label `v` can first appear at frame `t`
    after all of `w[t-1]`, except that a repeat needs a blank between, so that only `b[t-1]` counts for `v = y_k`:

        S(v)   = sum_{t=1..T} p_t(v) w_v[t-1],         w_v = b if v = y_k else w
        ell(v) = log S(v) + W_out[v] . W_in[last],      last = y_k, at the root the anchor
        y      = argmax_v ell(v)                                    greedy, ties to the lowest index
        y      = argmax_v ell(v) / temperature + Gumbel(seed, position + k, v)           sampled

    and the drawn label extends the state:

        n'[t] = p_t(y) (n'[t-1] + w_y[t-1]),   b'[t] = p_t(blank) (b'[t-1] + n'[t-1]),   n'[0] = b'[0] = 0

    starting from `n = 0`, `b[t] = prod_{s<=t} p_s(blank)`. The anchor is not in the frames: no repeat rule at the
    root (there `w = b`, so the rule is void). Both vectors are divided by `S(y)` after each label, which makes
    `S(v) = q(v | y_1..y_k)` at every step, and only `t < T` is kept, because nothing can start after frame `T`.
    The chain ends where no `S(v)` is above `IMPOSSIBLE`; `T` frames hold at most `T - repeats` labels.

    Arguments:
        logits: [B, T, V] fp16, bf16 or fp32, contiguous in V.
        log_label, log_blank: [B, T] fp32.
        anchor: [B] int64, the token before the first label.
        num_labels: N, any relation to T.
        markov: None, or the label-conditional head (W_in, W_out), each [V, r], of one dtype.
        sampling: None for greedy, or `ChainSampling`. `draft_logits[slot, k]` receives `ell` before the temperature,
            so that the law of label k is exactly `softmax(draft_logits[slot, k] / temperature)`; past the end it is
            the one-hot row of the fill token (0 there, -inf elsewhere). Inert rows (slot -1) write nothing there and
            their labels are arbitrary token ids.
    Returns:
        labels [B, N] int64 and lengths [B] int32, the number of labels before the end. Past the length stands the
        last label, or the anchor if there is none.

    Why custom: a label depends on the one before it, so this is N dependent sweeps over T * V logits. In torch each
    sweep is some twenty launches and materialises fp32 probabilities; here it is two launches and no scratch of size
    V. One program per request could keep the whole loop on the GPU, but would pull T * V logits per label through a
    single SM; so the host launches a static sequence of 1 + 2 N kernels (no value of a tensor is read on the host, so
    a CUDA graph can hold it) and each sweep spreads over the vocabulary.
    """
    run = prefix_chain_triton if logits.is_cuda else prefix_chain_reference
    return run(logits, log_label, log_blank, anchor, num_labels, markov, sampling)


def prefix_chain_reference(
    logits: torch.Tensor,
    log_label: torch.Tensor,
    log_blank: torch.Tensor,
    anchor: torch.Tensor,
    num_labels: int,
    markov: tuple[torch.Tensor, torch.Tensor] | None = None,
    sampling: ChainSampling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both recursions in closed form: `n' = A w_y` with `A[t, s] = prod_{s<r<=t} p_r(y)`, `s < t`, and `b' = K n'` with
    the same matrix of the blank. Products of probabilities, so zeros and ones are exact and nothing cancels."""
    num_frames = logits.shape[1]
    p = torch.exp(logits.float() + log_label[..., None])
    p.masked_fill_(logits == -torch.inf, 0)  # a frame of -inf only may come with an infinite log_label
    below = torch.ones(num_frames, num_frames, dtype=torch.bool, device=p.device).tril(-1)
    one = p.new_ones(())
    blank = torch.nn.functional.pad(log_blank[:, :-1].exp(), (1, 0), value=1.0)  # [B, T], entry t is frame t of t < T
    after_blank = _products(blank, below, one)
    # The two vectors of the state are w = n + b and b: rows 0 and 1 of [B, 2, T].
    advance = torch.stack([after_blank + torch.eye(num_frames, device=p.device), after_blank], 1).flatten(1, 2)
    state = blank.cumprod(1)[:, None].expand(-1, 2, -1)
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
        mass = torch.nn.functional.threshold(mass, IMPOSSIBLE, 0.0)
        ell = mass.log()
        if markov is not None:
            ell = torch.addmm(ell, w_in[last[:, 0]].float(), w_out)
        score = ell if sampling is None else torch.addcmul(noise[:, k], ell, inverse_temperature)
        label = score.max(dim=1, keepdim=True).indices
        drawn_mass = mass.gather(1, label)
        alive = drawn_mass > 0
        label = torch.where(alive, label, last)
        if sampling is not None:
            rows.append(ell.scatter_(1, label, torch.where(alive, ell.gather(1, label), 0.0)))
        labels.append(label)
        alive_at.append(alive)

        frame_p = p.gather(2, label[:, None].expand(-1, num_frames, 1))  # p_t(y), [B, T, 1]
        weight = torch.where(label == last, state[:, 1], state[:, 0]) * (alive / drawn_mass.clamp_min(IMPOSSIBLE))
        first = _products(torch.nn.functional.pad(frame_p[:, :-1, 0], (1, 0)), below, one)
        state = torch.bmm(advance, torch.bmm(first, weight[..., None])).view(-1, 2, num_frames)
        last = label

    if sampling is not None:
        active = sampling.slots >= 0
        sampling.draft_logits[sampling.slots[active], :num_labels] = torch.stack(rows, 1)[active]
    return torch.cat(labels, 1), torch.cat(alive_at, 1).sum(1, dtype=torch.int32)


def _products(p: torch.Tensor, below: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """`[t, s] = prod_{s<r<=t} p[r]` below the diagonal, else 0: [B, T] to [B, T, T]."""
    return torch.where(below, p[..., None], one).cumprod(1).mul_(below)


def _noise(sampling: ChainSampling, num_labels: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel noise [B, N, V], zero in greedy rows, and 1 / temperature [B, 1], one in greedy rows."""
    slots = sampling.slots.clamp_min(0)
    temperature = sampling.temperature[slots][:, None]
    sampled = (temperature > 0) & (sampling.slots >= 0)[:, None]
    positions = sampling.positions[:, None] + torch.arange(num_labels, device=slots.device)
    noise = gumbel_noise_reference(sampling.seeds[slots][:, None], positions, num_tokens)
    return noise * sampled[..., None], torch.where(sampled, 1 / temperature, 1.0)
