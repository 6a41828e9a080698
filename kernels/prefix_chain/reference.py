"""Reference of `prefix_chain` in torch. It serves a CPU too; the oracle in fp64 is `drafter/oracle.py`."""

from collections.abc import Callable

import torch

from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, Frames
from vllm_ctc_spec.kernels.noise import gumbel_noise_reference


def prefix_chain_reference(
    tokens: torch.Tensor,  # [B, M] int64, ascending
    frames: Frames,
    num_labels: int,
    sampling: ChainSampling,
) -> tuple[torch.Tensor, torch.Tensor]:
    noise, inverse_temperature = _noise(sampling, num_labels, tokens)

    def best(k: int, ell: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(noise[:, k], ell, inverse_temperature).max(dim=1, keepdim=True).indices

    labels, alive, ells = _walk(tokens, frames, num_labels, best)
    batch, num_tokens = len(tokens), frames.logits.shape[2]
    rows = frames.log_scale.new_full((batch, num_labels, num_tokens), -torch.inf)
    rows.scatter_reduce_(2, tokens[:, None].expand(-1, num_labels, -1), ells, "amax")  # of duplicates one is there
    fill = labels[..., None]
    rows.scatter_(2, fill, torch.where(alive[..., None], rows.gather(2, fill), 0.0))
    active = sampling.requests >= 0
    sampling.draft_logits[sampling.requests[active], :num_labels] = rows[active]
    return labels, alive.sum(1, dtype=torch.int32)


def log_q_of(tokens: torch.Tensor, frames: Frames, labels: torch.Tensor) -> torch.Tensor:
    """log q of given labels [B, N], each given those before it, at temperature 1: [B, N] fp32, -inf where a chain
    cannot have it. tokens: [B, M] int64, the candidates, ascending."""
    found = tokens[:, None] == labels[..., None]  # [B, N, M]
    place = found.to(torch.uint8).argmax(2)
    _, alive, ells = _walk(tokens, frames, labels.shape[1], lambda k, ell: place[:, k, None])
    log_q = (ells - ells.logsumexp(2, keepdim=True)).gather(2, place[..., None])[..., 0]
    possible = (found.any(2) & alive).cumprod(1).bool()
    return log_q.masked_fill(~possible, -torch.inf)


def _walk(
    tokens: torch.Tensor, frames: Frames, num_labels: int, choose: Callable[[int, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels [B, N], whether the chain has them [B, N], and `ell` of the candidates before each [B, N, M].

    choose: f(k, ell) is the place of label k among the candidates, [B, 1]. The two vectors of the state, w = n + b and
    b, are rows 0 and 1 of [B, 2, T].
    """
    logits, log_scale, log_blank, anchor, markov, transitions, _ = frames
    num_frames, num_tokens = logits.shape[1:]
    x = logits.gather(2, tokens[:, None].expand(-1, num_frames, -1)).float()
    p = torch.exp(x + log_scale[..., None])
    is_copy = torch.nn.functional.pad(tokens[:, 1:] == tokens[:, :-1], (1, 0))
    # A frame of -inf only may have an infinite log_scale.
    p.masked_fill_((x == -torch.inf) | is_copy[:, None], 0)
    state, extend = _ctc(log_blank) if transitions is None else _between_frames(transitions)
    outer = None if markov is None else markov[1][tokens].float()  # [B, M, r]

    last, place, frame_p = anchor[:, None], None, None
    labels, alive_at, ells = [], [], []
    for k in range(num_labels):
        mass = torch.bmm(state[:, :1], p)[:, 0]  # S(v), [B, M]
        if frame_p is not None:
            mass.scatter_(1, place, torch.bmm(state[:, 1:], frame_p)[:, 0])
        mass = torch.where(mass > IMPOSSIBLE, mass, 0.0)
        ell = mass.log()
        if outer is not None:
            ell = torch.baddbmm(ell[..., None], outer, markov[0][last[:, 0]].float()[..., None])[..., 0]
        place = choose(k, ell)
        drawn_mass = mass.gather(1, place)
        alive = drawn_mass > 0
        label = torch.where(alive, tokens.gather(1, place), last.clamp_max(num_tokens - 1))
        labels.append(label)
        alive_at.append(alive)
        ells.append(ell)

        frame_p = p.gather(2, place[:, None].expand(-1, num_frames, 1))  # p_t(y), [B, T, 1]
        weight = torch.where(label == last, state[:, 1], state[:, 0]) * (alive / drawn_mass.clamp_min(IMPOSSIBLE))
        state = extend(frame_p[..., 0], weight)
        last = label
    return torch.cat(labels, 1), torch.cat(alive_at, 1), torch.stack(ells, 1)


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


def _noise(sampling: ChainSampling, num_labels: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gumbel noise [B, N, M], zero in greedy rows, and 1 / temperature [B, 1], one in greedy rows."""
    requests = sampling.requests.clamp_min(0)
    temperature = sampling.temperature[requests][:, None]
    sampled = (temperature > 0) & (sampling.requests >= 0)[:, None]
    labels = torch.arange(num_labels, device=requests.device)
    positions = sampling.positions[:, None] + labels
    noise = gumbel_noise_reference(sampling.seeds[requests][:, None], positions, labels, tokens[:, None])
    return noise * sampled[..., None], torch.where(sampled, 1 / temperature, 1.0)
