"""The greedy chain on a CPU: torch for what is as large as the vocabulary, loops that numba compiles for the rest."""

import numpy as np
import torch
from vllm_ctc_spec.kernels.prefix_chain_sweep import IMPOSSIBLE
from vllm_ctc_spec.kernels.prefix_search_loops import add_products, compiled, extend, extend_along


def greedy_chain(
    logits: torch.Tensor,  # [B, T, V]
    log_label: torch.Tensor,  # [B, T] fp32
    log_blank: torch.Tensor,  # [B, T] fp32
    anchor: torch.Tensor,  # [B] int64
    num_labels: int,
    markov: tuple[torch.Tensor, torch.Tensor] | None,
    transitions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`prefix_chain` without sampling, for tensors of the CPU, request by request. In torch alone a label takes some
    twenty operations on small tensors, which cost more than the sums over the vocabulary."""
    logits = logits.float()
    p = torch.exp(logits + log_label[..., None]).masked_fill_(logits == -torch.inf, 0)
    p_blank = log_blank.exp().numpy()
    steps = np.zeros((len(p), 0, 0), np.float32) if transitions is None else transitions.contiguous().numpy()
    labels = np.empty((len(p), num_labels), np.int64)
    lengths = np.zeros(len(p), np.int32)
    for row, frames in enumerate(p):
        lengths[row] = _chain(frames, p_blank[row], steps[row], int(anchor[row]), labels[row], markov)
    return torch.from_numpy(labels), torch.from_numpy(lengths)


def _chain(
    frames: torch.Tensor,
    p_blank: np.ndarray,
    steps: np.ndarray,
    last: int,
    labels: np.ndarray,
    markov: tuple[torch.Tensor, torch.Tensor] | None,
) -> int:
    """Writes the labels of one request, and behind its end the last one; the number of labels before the end."""
    p = frames.numpy()
    w, b, is_root = *_root(p_blank, steps), True
    mass, score = np.empty((2, p.shape[1]), np.float32)
    log_mass = torch.from_numpy(score)
    for k in range(len(labels)):
        _add_mass(p, w, b, -1 if is_root else last, mass, score)
        log_mass.log_()
        if markov is not None:
            log_mass.addmv_(markov[1].float(), markov[0][last].float())
        label = int(log_mass.argmax())
        if not mass[label] > 0:
            labels[k:] = min(last, p.shape[1] - 1)
            return k
        _extend(p, p_blank, steps, label, b if label == last and not is_root else w, w, b)
        labels[k], last, is_root = label, label, False
    return len(labels)


@compiled
def _root(p_blank, steps):
    """`w`, `b` [T] before the first label."""
    if len(steps):
        return steps[0].copy(), steps[0].copy()
    state = np.ones(len(p_blank), np.float32)
    for t in range(1, len(p_blank)):
        state[t] = state[t - 1] * p_blank[t - 1]
    return state, state.copy()


@compiled
def _add_mass(p, w, b, last, mass, score):
    """Writes S(v) [V] twice, 0 where it is not above IMPOSSIBLE. last: -1 at the root."""
    mass[:] = 0
    add_products(p, w, mass)
    if last >= 0:
        repeat = np.float32(0)
        for t in range(len(b)):
            repeat += p[t, last] * b[t]
        mass[last] = repeat
    for v in range(len(mass)):
        mass[v] = mass[v] if mass[v] > IMPOSSIBLE else np.float32(0)
        score[v] = mass[v]


@compiled
def _extend(p, p_blank, steps, label, weight, w, b):
    """Writes the state behind a label into w and b."""
    weight = weight.copy()
    if len(steps):
        extend_along(p[:, label], steps, weight, w, b)
    else:
        extend(p[:, label], p_blank, weight, w, b)
