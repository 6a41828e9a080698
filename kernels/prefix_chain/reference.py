"""Reference of `prefix_chain` in torch. It serves a CPU too; the oracle in fp64 is `drafter/oracle.py`."""

from collections.abc import Callable

import torch

from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, Frames
from vllm_ctc_spec.kernels.noise import gumbel_noise_reference


def prefix_chain_reference(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two vectors of the state, w = n + b and b, are rows 0 and 1 of [B, 2, T]."""
    logits, log_scale, log_blank, anchor, markov, transitions, _ = frames
    num_frames = logits.shape[1]
    p = torch.exp(logits.float() + log_scale[..., None])
    p.masked_fill_(logits == -torch.inf, 0)  # a frame of -inf only may have an infinite log_scale
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
        active = sampling.requests >= 0
        sampling.draft_logits[sampling.requests[active], :num_labels] = torch.stack(rows, 1)[active]
    return torch.cat(labels, 1), torch.cat(alive_at, 1).sum(1, dtype=torch.int32)


StateRecursion = tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
"""The root state [B, 2, T], and the state behind a label from p_t(y) [B, T] and the mass before it [B, T]."""


def _ctc(log_blank: torch.Tensor) -> StateRecursion:
    """Both recursions in closed form: `n' = P w_y` with `P[t, s] = prod_{s<r<=t} p_r(y)`, `s < t`, and `b' = K n'` with
    the same matrix of the blank. All are products of probabilities: zeros and ones are exact and nothing cancels."""
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
        # Divided once more: a label that only one frame holds then has exactly 1 there.
        emitted = emitted / emitted.sum(2, keepdim=True).clamp_min(IMPOSSIBLE)
        return torch.bmm(emitted, transitions[:, 1:]).expand(-1, 2, -1)

    return transitions[:, :1].expand(-1, 2, -1), extend


def _products(p: torch.Tensor, below: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """`[t, s] = prod_{s<r<=t} p[r]` below the diagonal, else 0: [B, T] to [B, T, T]."""
    return torch.where(below, p[..., None], one).cumprod(1).mul_(below)


def _noise(sampling: ChainSampling, num_labels: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel noise [B, N, V], zero in greedy rows, and 1 / temperature [B, 1], one in greedy rows."""
    requests = sampling.requests.clamp_min(0)
    temperature = sampling.temperature[requests][:, None]
    sampled = (temperature > 0) & (sampling.requests >= 0)[:, None]
    labels = torch.arange(num_labels, device=requests.device)
    positions = sampling.positions[:, None] + labels
    noise = gumbel_noise_reference(sampling.seeds[requests][:, None], positions, labels, num_tokens)
    return noise * sampled[..., None], torch.where(sampled, 1 / temperature, 1.0)
