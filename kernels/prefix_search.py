"""The tree of the most probable label prefixes, from exact CTC prefix conditionals."""

from typing import NamedTuple

import numpy as np
import torch
from vllm_ctc_spec.kernels.prefix_chain_sweep import IMPOSSIBLE
from vllm_ctc_spec.kernels.prefix_search_best_first import prefix_search_triton

from vllm_ctc_spec.draft_tree import MAX_NODES, DraftTree


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
        The DraftTree [B, 1 + N]; unused rows hold the anchor's token.

    Why custom: every node needs the `S` of all T * C candidates under its own state. In torch this is some thirty
    launches per depth over [B, N, T * C] for N nodes of every depth, most of which are dropped later. Here one program
    per request holds the search and expands only the nodes of the tree: a topk, a sort and two kernels whatever N and
    D, and nothing of size N * V.
    """
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"prefix_search finds 1 to {MAX_NODES} nodes, not {num_nodes}")
    run = prefix_search_triton if logits.is_cuda else prefix_search_reference
    return run(logits, log_label, log_blank, anchor, num_nodes, width, depth, markov, chain_only)


class _Frames(NamedTuple):
    """One request. U distinct candidates, ascending, so that the order of columns is the order of tokens."""

    tokens: np.ndarray  # [U] int64
    p: np.ndarray  # [T, U] fp32, p_t(candidate)
    label_mass: np.ndarray  # [T] fp32, sum_v p_t(v)
    after_blank: np.ndarray  # [T, T] fp32, b' = after_blank @ n'
    w_in: torch.Tensor | None  # [V, r]
    w_out: np.ndarray | None  # [r, U] fp32
    complete: bool  # the candidates are the vocabulary


class _Frontier(NamedTuple):
    """F nodes of one depth with their states; row t of a state is what precedes frame t + 1."""

    numbers: np.ndarray  # [F] int64, the nodes' places in the order in which they were found
    scores: np.ndarray  # [F] fp32
    columns: np.ndarray  # [F] int64, the last label
    p_last: np.ndarray  # [T, F] fp32, p_t(last label)
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
    """For tensors of the CPU, request by request: there shapes may depend on values, so duplicates and dropped nodes
    are cut away, and a call of numpy costs a tenth of torch's. Depth by depth: the nodes of a depth that are among the
    best N so far are expanded together, and their children merged into the best N."""
    batch, num_frames, num_tokens = logits.shape
    width = min(width, num_tokens)
    candidates = logits.topk(width, dim=2, sorted=False).indices.flatten(1).numpy()
    chains = [False] * batch if chain_only is None else chain_only.tolist()
    tree = _empty_tree(anchor, num_nodes)
    with np.errstate(all="ignore"):
        for row, is_chain in enumerate(chains):
            tokens = np.unique(candidates[row])
            frames = _frames(logits[row], log_label[row], log_blank[row], tokens, markov, width == num_tokens)
            root = _root(frames, log_blank[row])
            inner = None if markov is None else markov[0][anchor[row : row + 1]].float().numpy()
            beam = 1 if is_chain else num_nodes
            found = _best_nodes(frames, root, inner, num_nodes, beam, min(depth, num_frames))
            _write_row(tree, row, tokens, *found)
    return tree


def _empty_tree(anchor: torch.Tensor, num_nodes: int) -> DraftTree:
    shape = (len(anchor), 1 + num_nodes)
    scores = torch.full(shape, -torch.inf)
    scores[:, 0] = 0
    return DraftTree(
        tokens=anchor[:, None].repeat(1, shape[1]),
        parents=torch.full(shape, -1, dtype=torch.int32),
        depths=torch.zeros(shape, dtype=torch.int32),
        scores=scores,
        ancestors=torch.zeros(shape, dtype=torch.int64),
    )


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
    p = np.exp(logits + log_label[:, None])
    p[logits == -np.inf] = 0  # a frame of -inf only may come with an infinite log_label
    label_mass = np.where(log_label < np.inf, -np.expm1(log_blank), 0)
    # [t, s] = prod_{s<r<=t} p_r(blank) below the diagonal, else 0; frame r of 1..T lies at r - 1.
    below = np.tri(len(p), k=-1, dtype=np.float32)
    blank = np.exp(np.roll(log_blank, 1))[:, None]
    after_blank = np.where(below, blank, 1).cumprod(0) * below
    w_in, w_out = (None, None) if markov is None else markov
    if w_out is not None:
        w_out = w_out.index_select(0, index).float().numpy().T
    return _Frames(tokens, p, label_mass, after_blank, w_in, w_out, complete)


def _root(frames: _Frames, log_blank: torch.Tensor) -> _Frontier:
    """The empty prefix. There w = b: the rule for a repeat is void, and any column will do as the last label."""
    state = np.exp(np.concatenate([[np.float32(0)], log_blank.numpy()[:-1]]).cumsum())[:, None]
    zero = np.zeros(1, np.int64)
    return _Frontier(zero, np.zeros(1, np.float32), zero, frames.p[:, :1], state, state)


def _best_nodes(
    frames: _Frames, root: _Frontier, inner: np.ndarray | None, num_nodes: int, beam: int, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Columns [K] and parents [K] of all K nodes found, number 0 the anchor; numbers and scores of the best, in order.

    inner [1, r]: W_in[anchor]. beam: how many children of a depth may stay, N in a tree, 1 in a chain.
    """
    num_columns = len(frames.tokens)
    columns, parents, count = [root.columns], [root.numbers], 1
    best, best_scores = root.numbers[:0], root.scores[:0]
    frontier = root
    for level in range(depth):
        floor = best_scores[-1] if len(best) == num_nodes else -np.inf
        places, scores = _largest(_child_scores(frames, frontier, inner).ravel(), beam, floor)
        if not len(places):
            break
        parent, column = np.divmod(places, num_columns)
        numbers = np.arange(count, count + len(places))
        columns.append(column)
        parents.append(frontier.numbers[parent])
        count += len(places)
        # The sort is stable: what was there before is shallower and wins ties.
        merged = np.concatenate([best_scores, scores])
        order = np.argsort(-merged, kind="stable")[:num_nodes]
        kept = order[order >= len(best)] - len(best)
        best, best_scores = np.concatenate([best, numbers])[order], merged[order]
        if level + 1 < depth:
            frontier = _extend(frames, frontier, numbers[kept], scores[kept], parent[kept], column[kept])
            if frames.w_in is not None:
                last = torch.from_numpy(frames.tokens[frontier.columns])
                inner = frames.w_in.index_select(0, last).float().numpy()
    return np.concatenate(columns), np.concatenate(parents), best, best_scores


def _child_scores(frames: _Frames, nodes: _Frontier, inner: np.ndarray | None) -> np.ndarray:
    """[F, U] fp32, the score of every child; -inf or NaN where there is none. inner [F, r]: W_in[last]."""
    mass = nodes.w.T @ frames.p  # S(v)
    mass[np.arange(len(mass)), nodes.columns] = (nodes.p_last * nodes.b).sum(0)
    log_q = np.log(np.where(mass > IMPOSSIBLE, mass, 0))
    if inner is not None:
        rest = np.zeros_like(nodes.scores)
        if not frames.complete:
            total = frames.label_mass @ nodes.w - (nodes.p_last * (nodes.w - nodes.b)).sum(0)
            rest = np.maximum(total - mass.sum(1), 0)
        log_q += inner @ frames.w_out
        log_rest = np.log(rest)
        largest = np.maximum(log_q.max(1), log_rest)
        z = np.exp(log_q - largest[:, None]).sum(1) + np.exp(log_rest - largest)
        log_q -= (largest + np.log(z))[:, None]
    return np.minimum(log_q, 0) + nodes.scores[:, None]


def _largest(values: np.ndarray, limit: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of the `limit` largest values above `floor`, largest first, ties in the order of places."""
    places = np.flatnonzero(values > floor)
    values = values[places]
    if len(places) > limit:
        enough = values >= np.partition(values, len(values) - limit)[len(values) - limit]
        places, values = places[enough], values[enough]
    order = np.argsort(-values, kind="stable")[:limit]
    return places[order], values[order]


def _extend(
    frames: _Frames,
    nodes: _Frontier,
    numbers: np.ndarray,
    scores: np.ndarray,
    parent: np.ndarray,
    columns: np.ndarray,
) -> _Frontier:
    """The states behind `columns`, children of `nodes[parent]`. `n'[t] = p_t(y) n'[t-1] + p_t(y) w_y[t-1]` is one
    affine map per frame; they are composed by doubling."""
    p = frames.p.take(columns, 1)
    first = p * np.where(nodes.columns[parent] == columns, nodes.b.take(parent, 1), nodes.w.take(parent, 1))
    first /= first.sum(0)
    factor, n = np.zeros_like(p), np.zeros_like(p)
    factor[1:], n[1:] = p[:-1], first[:-1]
    step = 1
    while step < len(p):
        n[step:] += factor[step:] * n[:-step]
        factor[step:] *= factor[:-step]
        step *= 2
    b = frames.after_blank @ n
    return _Frontier(numbers, scores, columns, p, n + b, b)


def _write_row(
    tree: DraftTree,
    row: int,
    tokens: np.ndarray,
    columns: np.ndarray,
    parents: np.ndarray,
    best: np.ndarray,
    scores: np.ndarray,
) -> None:
    used = slice(1, 1 + len(best))
    row_of = np.zeros(len(parents), np.int64)
    row_of[best] = np.arange(1, 1 + len(best))
    parent_rows = row_of[parents[best]]
    depths, ancestors = [0], [0]
    for bit, parent in enumerate(parent_rows.tolist()):
        depths.append(depths[parent] + 1)
        ancestors.append(ancestors[parent] | 1 << bit)
    tree.tokens.numpy()[row, used] = tokens[columns[best]]
    tree.parents.numpy()[row, used] = parent_rows
    tree.depths.numpy()[row, used] = depths[1:]
    tree.scores.numpy()[row, used] = scores
    # The word of node 64 sets the sign bit.
    tree.ancestors.numpy()[row, used] = np.array(ancestors[1:], np.uint64).view(np.int64)
