"""The tree of the most probable label prefixes, from exact CTC prefix conditionals."""

from typing import NamedTuple

import numpy as np
import torch
import triton
from vllm_ctc_spec.kernels.prefix_chain_sweep import IMPOSSIBLE
from vllm_ctc_spec.kernels.prefix_search_best_first import candidates_kernel, search_kernel

from vllm_ctc_spec.draft_tree import MAX_NODES, DraftTree

_MAX_WARPS = 8


def prefix_search(
    logits: torch.Tensor,  # [B, T, V] fp16, bf16 or fp32
    log_label: torch.Tensor,  # [B, T] fp32
    log_blank: torch.Tensor,  # [B, T] fp32
    anchor: torch.Tensor,  # [B] int64
    num_nodes: int,
    width: int,
    depth: int,
    markov: tuple[torch.Tensor, torch.Tensor] | None = None,  # W_in [V, r], W_out [V, r]
    chain_only: torch.Tensor | None = None,  # [B] bool
) -> DraftTree:
    """The `N` most probable label prefixes, given that they consist of candidates: the `C` best tokens of each frame.

    With the frames' `p_t(v)`, the forward vectors `w`, `b` and the exact conditional `S(v)` of a prefix as in
    `prefix_chain`, the score of a node is the sum of `log q` along its path:

        q(v | prefix) = S(v)                                        the rest of 1 is the mass of stopping here
        q(v | prefix) = S(v) e^{bias(v)} / Z                        with a head, bias(v) = W_out[v] . W_in[last]
        Z = sum_{v in candidates} S(v) e^{bias(v)} + max(0, M - sum_{v in candidates} S(v))
        M = sum_v S(v) = sum_t P(t is no blank) w[t-1] - sum_t p_t(last) n[t-1]

    `Z` is the sum over the full vocabulary with bias 0 outside of the candidates, where `M` comes from the state, not
    from the vocabulary; it is the full definition where `C >= V`. A frame with an infinite log_label holds no label.
    A child whose `S` is not above `IMPOSSIBLE` does not exist, nor does one whose score is not a number.

    `q <= 1`, so a prefix never outranks its parent, and the best N are found without looking below any other node.
    Their order is score, then depth (shallower first), then the parent's row, then the token.

    Arguments:
        logits: [B, T, V] fp16, bf16 or fp32, contiguous in V.
        log_label, log_blank: [B, T] fp32.
        anchor: [B] int64, the token before the first label. It is under no repeat rule.
        num_nodes: N <= 64.
        width: C, clamped to V. C = N loses nothing in practice.
        depth: D, no node is deeper.
        markov: None, or the label-conditional head (W_in, W_out), each [V, r], contiguous, of one dtype.
        chain_only: None, or [B] bool: rows that get the best child of the best child and so on, one node per depth.
    Returns:
        The DraftTree [B, 1 + N]; unused rows hold the anchor's token. Nothing in it depends on N except where it is
        cut.

    Why custom: every node needs the `S` of all T * C candidates under its own state. In torch this is some thirty
    launches per depth over [B, N, T * C] for N nodes of every depth, most of which are dropped later. Here one program
    per request holds the search and expands only the nodes of the tree; four launches in all, nothing of size N * V.
    """
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"prefix_search finds 1 to {MAX_NODES} nodes, not {num_nodes}")
    run = prefix_search_triton if logits.is_cuda else prefix_search_reference
    return run(logits, log_label, log_blank, anchor, num_nodes, width, depth, markov, chain_only)


class _Frames(NamedTuple):
    """One request. U distinct candidates, ascending, so that the order of columns is the order of tokens."""

    tokens: np.ndarray  # [U] int64
    p: np.ndarray  # [T, U] fp32, p_t(candidate)
    root: np.ndarray  # [T, 1] fp32, w = b of the empty prefix
    after_blank: np.ndarray  # [T, T] fp32, b' = after_blank @ n'
    label_mass: np.ndarray  # [T] fp32, the mass of all labels of each frame
    w_out: np.ndarray | None  # [r, U] fp32
    complete: bool  # the candidates are the vocabulary


class _Frontier(NamedTuple):
    """F nodes of one depth, and their states before frames 1..T."""

    scores: np.ndarray  # [F] fp32
    columns: np.ndarray | None  # [F] int64, the last label; None at the root
    inner: np.ndarray | None  # [F, r] fp32, W_in[last label]
    w: np.ndarray  # [T, F] fp32
    b: np.ndarray  # [T, F] fp32


@torch.no_grad()
def prefix_search_reference(
    logits: torch.Tensor,
    log_label: torch.Tensor,
    log_blank: torch.Tensor,
    anchor: torch.Tensor,
    num_nodes: int,
    width: int,
    depth: int,
    markov: tuple[torch.Tensor, torch.Tensor] | None = None,
    chain_only: torch.Tensor | None = None,
) -> DraftTree:
    """For tensors of the CPU, one request after the other: there shapes may depend on values, so duplicates and dropped
    nodes are cut away, and numpy's calls cost a tenth of torch's. Depth by depth: the nodes of a depth that are among
    the best N so far are expanded together, and their children merged into the best N."""
    batch, num_frames, num_tokens = logits.shape
    width = min(width, num_tokens)
    candidates = logits.topk(width, dim=2, sorted=False).indices.flatten(1).numpy()
    shape = (batch, 1 + num_nodes)
    tree = DraftTree(
        tokens=anchor[:, None].repeat(1, 1 + num_nodes),
        parents=torch.full(shape, -1, dtype=torch.int32),
        depths=torch.zeros(shape, dtype=torch.int32),
        scores=torch.full(shape, -torch.inf),
        ancestors=torch.zeros(shape, dtype=torch.int64),
    )
    tree.scores[:, 0] = 0
    for row in range(batch):
        tokens = np.unique(candidates[row])
        frames = _frames(logits[row], log_label[row], log_blank[row], tokens, markov, width == num_tokens)
        inner = None if markov is None else markov[0][anchor[row]].float().numpy()[None]
        is_chain = chain_only is not None and bool(chain_only[row])
        with np.errstate(all="ignore"):
            found = _best_nodes(frames, inner, markov, num_nodes, min(depth, num_frames), is_chain)
            _write_row(tree, row, tokens, *found)
    return tree


def _frames(
    logits: torch.Tensor,
    log_label: torch.Tensor,
    log_blank: torch.Tensor,
    tokens: np.ndarray,
    markov: tuple[torch.Tensor, torch.Tensor] | None,
    complete: bool,
) -> _Frames:
    index = torch.from_numpy(tokens)
    logits = logits.index_select(1, index).float().numpy()
    log_label, log_blank = log_label.numpy(), log_blank.numpy()
    with np.errstate(all="ignore"):
        p = np.exp(logits + log_label[:, None])
        p[logits == -np.inf] = 0  # a frame of -inf only may come with an infinite log_label
        label_mass = np.where(log_label < np.inf, -np.expm1(log_blank), 0)
    blank = np.exp(log_blank[:-1])
    # [t, s] = prod_{s<r<=t} p_r(blank) below the diagonal, else 0. Entry r - 1 of `blank` is frame r.
    below = np.tri(len(p), k=-1, dtype=bool)
    after_blank = np.where(below, np.concatenate([blank[:1] * 0 + 1, blank])[:, None], 1).cumprod(0) * below
    root = np.concatenate([np.ones(1, np.float32), blank.cumprod()])[:, None]
    w_out = None if markov is None else markov[1].index_select(0, index).float().numpy().T
    return _Frames(tokens, p, root, after_blank.astype(np.float32), label_mass, w_out, complete)


def _best_nodes(
    frames: _Frames,
    inner: np.ndarray | None,
    markov: tuple[torch.Tensor, torch.Tensor] | None,
    num_nodes: int,
    depth: int,
    is_chain: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Column, parent (0 is the anchor, i the i-th of all nodes), score and number of the best nodes, in order."""
    num_columns = len(frames.tokens)
    frontier = _Frontier(np.zeros(1, np.float32), None, inner, frames.root, frames.root)
    numbers = np.zeros(1, np.int64)  # of the frontier's nodes
    columns, parents = [np.zeros(1, np.int64)], [np.full(1, -1)]
    count, best, best_scores = 1, numbers[:0], frontier.scores[:0]
    for level in range(min(depth, num_nodes) if is_chain else depth):
        child_scores = _child_scores(frames, frontier).ravel()
        floor = best_scores[-1] if len(best) == num_nodes else -np.inf
        places, scores = _largest(child_scores, 1 if is_chain else num_nodes, floor)
        if not len(places):
            break
        parent, column = places // num_columns, places % num_columns
        columns.append(column)
        parents.append(numbers[parent])
        numbers = np.arange(count, count + len(places))
        count += len(places)
        # A stable sort: what was there before is shallower and wins ties.
        merged_scores = np.concatenate([best_scores, scores])
        order = np.argsort(-merged_scores, kind="stable")[:num_nodes]
        kept = order[order >= len(best)] - len(best)
        best, best_scores = np.concatenate([best, numbers])[order], merged_scores[order]
        numbers = numbers[kept]
        if level + 1 < depth:
            frontier = _extend(frames, frontier, parent[kept], column[kept], scores[kept], markov)
    return np.concatenate(columns)[best], np.concatenate(parents), best_scores, best


def _child_scores(frames: _Frames, frontier: _Frontier) -> np.ndarray:
    """[F, U] fp32, the score of every child, -inf or NaN where there is none."""
    mass = frontier.w.T @ frames.p  # S(v)
    label_mass = frames.label_mass @ frontier.w
    if frontier.columns is not None:
        p_last = frames.p[:, frontier.columns]
        mass[np.arange(len(mass)), frontier.columns] = (p_last * frontier.b).sum(0)
        label_mass -= (p_last * (frontier.w - frontier.b)).sum(0)
    exists = mass > IMPOSSIBLE
    log_q = np.log(mass, out=np.full_like(mass, -np.inf), where=exists)
    if frontier.inner is not None:
        rest = np.zeros_like(label_mass) if frames.complete else np.log(np.maximum(label_mass - mass.sum(1), 0))
        log_q += frontier.inner @ frames.w_out
        largest = np.maximum(log_q.max(1), rest)
        z = np.exp(log_q - largest[:, None]).sum(1) + np.exp(rest - largest)
        log_q -= (largest + np.log(z))[:, None]
    return np.minimum(log_q, 0, out=log_q) + frontier.scores[:, None]


def _largest(values: np.ndarray, limit: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of the `limit` largest values above `floor`, largest first, ties in their order of places."""
    places = np.flatnonzero(values > floor)
    values = values[places]
    if len(places) > limit:
        enough = values >= np.partition(values, len(values) - limit)[len(values) - limit]
        places, values = places[enough], values[enough]
    order = np.argsort(-values, kind="stable")[:limit]
    return places[order], values[order]


def _extend(
    frames: _Frames,
    frontier: _Frontier,
    parent: np.ndarray,
    columns: np.ndarray,
    scores: np.ndarray,
    markov: tuple[torch.Tensor, torch.Tensor] | None,
) -> _Frontier:
    """The states behind the labels `columns`. `n'[t] = p_t(y) n'[t-1] + p_t(y) w_y[t-1]` is an affine map per frame;
    they are composed by doubling."""
    p = frames.p[:, columns]
    weight = frontier.w[:, parent]
    if frontier.columns is not None:
        weight = np.where(frontier.columns[parent] == columns, frontier.b[:, parent], weight)
    first = p * weight
    first /= first.sum(0)
    factor, n = np.zeros_like(p), np.zeros_like(p)
    factor[1:], n[1:] = p[:-1], first[:-1]
    step = 1
    while step < len(p):
        n[step:] += factor[step:] * n[:-step]
        factor[step:] *= factor[:-step]
        step *= 2
    b = frames.after_blank @ n
    inner = None if markov is None else markov[0][torch.from_numpy(frames.tokens[columns])].float().numpy()
    return _Frontier(scores, columns, inner, n + b, b)


def _write_row(
    tree: DraftTree,
    row: int,
    tokens: np.ndarray,
    columns: np.ndarray,
    parents: np.ndarray,
    scores: np.ndarray,
    best: np.ndarray,
) -> None:
    used = len(best)
    row_of = np.zeros(len(parents), np.int64)
    row_of[best] = np.arange(1, used + 1)
    parents = row_of[parents[best]]
    depths, ancestors = [0], [0]
    for node, parent in enumerate(parents.tolist()):
        depths.append(depths[parent] + 1)
        ancestors.append(ancestors[parent] | 1 << node)
    tree.tokens.numpy()[row, 1 : used + 1] = tokens[columns]
    tree.parents.numpy()[row, 0 : used + 1] = [-1, *parents]
    tree.depths.numpy()[row, : used + 1] = depths
    tree.scores.numpy()[row, 1 : used + 1] = scores
    # The word of node 64 has the sign bit.
    tree.ancestors.numpy()[row, : used + 1] = np.array(ancestors, np.uint64).view(np.int64)
