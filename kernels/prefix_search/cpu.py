"""Serves a CPU: `prefix_search` in loops that numba compiles. The oracle is `drafter/oracle.py`."""

import numpy as np
import torch

from vllm_ctc_spec.kernels._compiled import compiled
from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, Budget, DraftTree, Frames


@torch.no_grad()
def prefix_search_cpu(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    """One request after the other. In torch or numpy a search of a few hundred microseconds would be mostly the
    overhead of calls."""
    logits, log_scale, log_blank, anchor, markov, transitions, _ = frames
    batch, num_frames, num_tokens = logits.shape
    width, rows = min(budget.width, num_tokens), 1 + budget.nodes
    candidates = logits.topk(width, dim=2, sorted=False).indices.flatten(1).numpy()
    chains = [False] * batch if chain_only is None else chain_only.tolist()
    tree = {
        "tokens": np.repeat(anchor.numpy()[:, None], rows, 1),
        "parents": np.full((batch, rows), -1, np.int32),
        "depths": np.zeros((batch, rows), np.int32),
        "scores": np.full((batch, rows), -np.inf, np.float32),
        "ancestors": np.zeros((batch, rows), np.int64),
    }
    p_blank = np.exp(log_blank.numpy())
    label_mass = np.where(log_scale.numpy() < np.inf, -np.expm1(log_blank.numpy()), np.float32(0))
    no_transitions = np.zeros((0, 0), np.float32)
    for row, is_chain in enumerate(chains):
        tokens = np.unique(candidates[row])  # ascending: the order of columns is the order of tokens
        index = torch.from_numpy(tokens)
        x = logits[row].index_select(1, index).float()
        p = torch.exp(x + log_scale[row, :, None]).masked_fill_(x == -torch.inf, 0)  # log_scale may be infinite there
        if markov is None:
            inner, outer = np.zeros((1 + len(tokens), 0), np.float32), np.zeros((0, len(tokens)), np.float32)
        else:
            inner = markov[0].index_select(0, torch.cat([index, anchor[row : row + 1]])).float().numpy()
            outer = markov[1].index_select(0, index).float().T.contiguous().numpy()
        columns = best_first(
            p.numpy(), label_mass[row], p_blank[row],
            no_transitions if transitions is None else transitions[row].contiguous().numpy(),
            inner, outer, min(budget.depth, num_frames), is_chain, markov is not None, width == num_tokens,
            *(tree[name][row] for name in list(tree)[1:]),
        )  # fmt: skip
        tree["tokens"][row, 1 : 1 + len(columns)] = tokens[columns]
    return DraftTree(**{name: torch.from_numpy(values) for name, values in tree.items()})


@compiled
def best_first(
    p,  # [T, U] fp32, p_t(candidate)
    label_mass,  # [T] fp32, sum_v p_t(v)
    p_blank,  # [T] fp32
    transitions,  # [1 + T, T] fp32, or empty
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
    """Every node keeps the scores of its children that are not in the tree; the best of all joins the tree next."""
    num_rows, num_frames, num_columns = len(parents), *p.shape
    w, b = np.zeros((num_rows, num_frames), np.float32), np.zeros((num_rows, num_frames), np.float32)
    children = np.empty((num_rows, num_columns), np.float32)
    best = np.full(num_rows, np.float32(-np.inf))  # the best child of each row, and where it is
    best_column, columns = np.zeros(num_rows, np.int64), np.full(num_rows, -1, np.int64)
    scores[0] = 0
    if len(transitions):
        w[0] = b[0] = transitions[0]
    else:
        state = np.float32(1)
        for t in range(num_frames):
            w[0, t] = b[0, t] = state
            state *= p_blank[t]
    node = 0
    while node + 1 < num_rows:
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
        if best[parent] == -np.inf:
            break
        node += 1
        column = best_column[parent]
        columns[node], parents[node], depths[node], scores[node] = column, parent, depths[parent] + 1, best[parent]
        ancestors[node] = ancestors[parent] | (np.int64(1) << (node - 1))
        weight = b[parent] if column == columns[parent] else w[parent]
        if len(transitions):
            extend_along(p[:, column], transitions, weight, w[node], b[node])
        else:
            extend(p[:, column], p_blank, weight, w[node], b[node])
        children[parent, column] = -np.inf
        best_column[parent], best[parent] = _largest(children[parent])
    return columns[1 : node + 1]


@compiled
def _score_children(p, label_mass, w, b, inner, outer, last, has_head, is_complete, score, out):
    """Writes `score + log q` of every candidate [U]; -inf or NaN where there is no child."""
    out[:] = 0
    add_products(p, w, out)
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
        add_products(outer, inner, out)
        rest = total - mass
        largest = np.max(out)
        if not is_complete and not rest <= 0:  # a NaN must pass: it makes all scores NaN
            largest = max(largest, np.log(rest))
            normaliser += np.exp(np.log(rest) - largest)
        for u in range(len(out)):
            normaliser += np.exp(out[u] - largest)
        normaliser = largest + np.log(normaliser)
    for u in range(len(out)):
        log_q = out[u] - normaliser
        out[u] = score + (np.float32(0) if log_q > 0 else log_q)


@compiled
def add_products(rows, factors, out):
    """out += factors @ rows: [K, U] and [K] to [U]."""
    for k in range(len(factors)):
        row, factor = rows[k], factors[k]
        for u in range(len(out)):
            out[u] += row[u] * factor


@compiled
def _largest(values):
    """Place and value of the largest, the first among equals; -inf if there is no number."""
    place, value = 0, np.float32(-np.inf)
    for u in range(len(values)):
        if values[u] > value:
            place, value = u, values[u]
    return place, value


@compiled
def extend(p, p_blank, weight, w, b):
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


@compiled
def extend_along(p, transitions, weight, w, b):
    """The same with transitions between frames."""
    total = np.float32(0)
    for t in range(len(p)):
        total += p[t] * weight[t]
    w[:] = 0
    for s in range(len(p)):
        emitted = p[s] * weight[s] / total
        for t in range(s + 1, len(p)):
            w[t] += emitted * transitions[1 + s, t]
    b[:] = w
