"""For tests: the definition, path by path, in fp64."""

import math

import torch
from torch import Tensor

from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree
from vllm_ctc_spec.kernels.tree_merge import MergedTree


def tree_merge_reference(
    tokens: Tensor,  # [B, S, 1 + N] int64
    parents: Tensor,  # [B, S, 1 + N] int32
    scores: Tensor,  # [B, S, 1 + N] fp32
    log_weights: Tensor,  # [B, S] fp32
    chain_only: Tensor | None = None,
) -> MergedTree:
    batch, num_sources, width = tokens.shape
    tree = {name: torch.zeros(batch, width, dtype=dtype) for name, dtype in DTYPES.items()}
    tree["tokens"] += tokens[:, 0, :1]
    tree["parents"] -= 1
    tree["scores"][:, 1:] = -torch.inf
    rows = torch.full((batch, width, num_sources), -1)
    rows[:, 0] = 0
    for b in range(batch):
        places: dict[tuple[int, ...], list[int]] = {}  # path: its row in each tree; in the order of the union
        for s in range(num_sources):
            paths: list[tuple[int, ...]] = [()]
            for row in range(1, int((parents[b, s] >= 0).sum()) + 1):
                paths.append((*paths[parents[b, s, row]], int(tokens[b, s, row])))
                places.setdefault(paths[-1], [-1] * num_sources)[s] = row
        mixed = {path: _mixture(found, scores[b], log_weights[b]) for path, found in places.items()}
        chosen: list[tuple[int, ...]] = [()]
        while len(chosen) < width:
            above = chosen[-1:] if chain_only is not None and chain_only[b] else chosen
            open_ = [p for p in places if p not in chosen and p[:-1] in above and mixed[p] > -math.inf]
            if not open_:
                break
            path = max(open_, key=mixed.__getitem__)  # the first among equals
            row, parent = len(chosen), chosen.index(path[:-1])
            chosen.append(path)
            tree["tokens"][b, row], tree["parents"][b, row], tree["depths"][b, row] = path[-1], parent, len(path)
            tree["scores"][b, row] = min(mixed[path], float(tree["scores"][b, row - 1]))
            tree["ancestors"][b, row] = tree["ancestors"][b, parent] | (1 << (row - 1) if row < 64 else -(1 << 63))
            rows[b, row] = torch.tensor(places[path])
    return MergedTree(DraftTree(**tree), rows)


def _mixture(found: list[int], scores: Tensor, log_weights: Tensor) -> float:
    total = sum(math.exp(log_weights[s] + scores[s, row]) for s, row in enumerate(found) if row >= 0)
    return math.log(total) if total > 0 else -math.inf
