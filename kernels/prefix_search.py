"""The tree of the most probable label prefixes, from exact CTC prefix conditionals."""

import numba
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
    """For tensors of the CPU, request by request, in loops that numba compiles: a search of a few hundred microseconds
    in torch or numpy is mostly the overhead of calls."""
    batch, num_frames, num_tokens = logits.shape
    width = min(width, num_tokens)
    candidates = logits.topk(width, dim=2, sorted=False).indices.flatten(1).numpy()
    chains = [False] * batch if chain_only is None else chain_only.tolist()
    tree = {
        "tokens": np.repeat(anchor.numpy()[:, None], 1 + num_nodes, 1),
        "parents": np.full((batch, 1 + num_nodes), -1, np.int32),
        "depths": np.zeros((batch, 1 + num_nodes), np.int32),
        "scores": np.full((batch, 1 + num_nodes), -np.inf, np.float32),
        "ancestors": np.zeros((batch, 1 + num_nodes), np.int64),
    }
    p_blank = np.exp(log_blank.numpy())
    label_mass = np.where(log_label.numpy() < np.inf, -np.expm1(log_blank.numpy()), np.float32(0))
    for row, is_chain in enumerate(chains):
        tokens = np.unique(candidates[row])  # ascending: the order of columns is the order of tokens
        index = torch.from_numpy(tokens)
        x = logits[row].index_select(1, index).float()
        p = torch.exp(x + log_label[row, :, None]).masked_fill_(x == -torch.inf, 0)  # log_label may be infinite there
        if markov is None:
            inner, outer = np.zeros((1 + len(tokens), 0), np.float32), np.zeros((0, len(tokens)), np.float32)
        else:
            inner = markov[0].index_select(0, torch.cat([index, anchor[row : row + 1]])).float().numpy()
            outer = markov[1].index_select(0, index).float().T.contiguous().numpy()
        columns = _best_first(
            p.numpy(), label_mass[row], p_blank[row], inner, outer, min(depth, num_frames), is_chain,
            markov is not None, width == num_tokens, *(tree[name][row] for name in list(tree)[1:]),
        )  # fmt: skip
        tree["tokens"][row, 1 : 1 + len(columns)] = tokens[columns]
    return DraftTree(**{name: torch.from_numpy(values) for name, values in tree.items()})


@numba.njit(cache=True)
def _best_first(
    p,  # [T, U] fp32, p_t(candidate)
    label_mass,  # [T] fp32, sum_v p_t(v)
    p_blank,  # [T] fp32
    inner,  # [U + 1, r] fp32, W_in of the candidates and of the anchor
    outer,  # [r, U] fp32, W_out of the candidates
    depth,
    is_chain,
    has_head,
    is_complete,  # the candidates are the vocabulary
    parents,  # [1 + N] int32, and so on as in DraftTree: written
    depths,
    scores,
    ancestors,
):  # the columns of the nodes, [K] int64
    """Every node of the tree keeps the scores of its children that are not in the tree; the best of all is next."""
    num_rows, num_frames, num_columns = len(parents), *p.shape
    w, b = np.zeros((num_rows, num_frames), np.float32), np.zeros((num_rows, num_frames), np.float32)
    children = np.empty((num_rows, num_columns), np.float32)
    best = np.full(num_rows, np.float32(-np.inf))  # the best child of each row, and where it is
    best_column, columns = np.zeros(num_rows, np.int64), np.full(num_rows, -1, np.int64)
    scores[0] = 0
    state = np.float32(1)
    for t in range(num_frames):
        w[0, t] = b[0, t] = state
        state *= p_blank[t]
    node = 0
    while True:
        if depths[node] < depth:
            last = columns[node]
            _score_children(
                p, label_mass, w[node], b[node], inner[last], outer, last, has_head, is_complete, scores[node],
                children[node],
            )  # fmt: skip
            best_column[node], best[node] = _largest(children[node])
        parent = node
        if not is_chain:
            for row in range(node + 1):  # ties: shallower, then the earlier row; _largest takes the lower token
                above = best[row] > best[parent]
                if above or (best[row] == best[parent] and (depths[row], row) < (depths[parent], parent)):
                    parent = row
        if best[parent] == -np.inf or node + 1 == num_rows:
            return columns[1 : node + 1]
        node += 1
        column = best_column[parent]
        columns[node], parents[node], depths[node], scores[node] = column, parent, depths[parent] + 1, best[parent]
        ancestors[node] = ancestors[parent] | (np.int64(1) << (node - 1))
        weight = b[parent] if column == columns[parent] else w[parent]
        _extend(p[:, column], p_blank, weight, w[node], b[node])
        children[parent, column] = -np.inf
        best_column[parent], best[parent] = _largest(children[parent])


@numba.njit(cache=True)
def _score_children(p, label_mass, w, b, inner, outer, last, has_head, is_complete, score, out):
    """Writes `score + log q` of every candidate [U]; -inf or NaN where there is no child."""
    out[:] = 0
    _add_products(p, w, out)
    if last >= 0:
        repeat = np.float32(0)
        for t in range(len(w)):
            repeat += p[t, last] * b[t]
        out[last] = repeat
    total = mass = np.float32(0)
    if not is_complete:
        for t in range(len(w)):
            total += label_mass[t] * w[t]
            if last >= 0:
                total -= p[t, last] * (w[t] - b[t])
    for u in range(len(out)):
        mass += out[u]
        out[u] = np.log(out[u]) if out[u] > IMPOSSIBLE else -np.inf
    normaliser = np.float32(0)
    if has_head:
        _add_products(outer, inner, out)
        rest = total - mass
        largest = np.max(out)
        if not is_complete and not rest <= 0:  # what is not a number makes all scores so
            largest = max(largest, np.log(rest))
            normaliser += np.exp(np.log(rest) - largest)
        for u in range(len(out)):
            normaliser += np.exp(out[u] - largest)
        normaliser = largest + np.log(normaliser)
    for u in range(len(out)):
        log_q = out[u] - normaliser
        out[u] = score + (np.float32(0) if log_q > 0 else log_q)


@numba.njit(cache=True)
def _add_products(rows, factors, out):
    """out += factors @ rows: [K, U] and [K] to [U]."""
    for k in range(len(factors)):
        row, factor = rows[k], factors[k]
        for u in range(len(out)):
            out[u] += row[u] * factor


@numba.njit(cache=True)
def _largest(values):
    """Place and value of the largest, the first among equals; -inf if there is no number."""
    place, value = 0, np.float32(-np.inf)
    for u in range(len(values)):
        if values[u] > value:
            place, value = u, values[u]
    return place, value


@numba.njit(cache=True)
def _extend(p, p_blank, weight, w, b):
    """Writes the state behind a label: p [T] its probabilities, weight [T] the mass before its first emission."""
    total = np.float32(0)
    for t in range(len(p)):
        total += p[t] * weight[t]
    n = blank = np.float32(0)
    w[0] = b[0] = 0
    for t in range(len(p) - 1):
        blank = p_blank[t] * (blank + n)
        n = p[t] * (n + weight[t] / total)
        w[t + 1], b[t + 1] = n + blank, blank
