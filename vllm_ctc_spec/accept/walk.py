"""The walk from each anchor down its tree, under a rule."""

import torch
from torch import Tensor

from vllm_ctc_spec.accept.rule import AcceptanceRule, Rows
from vllm_ctc_spec.kernels.tree_walk import tree_walk

Walked = tuple[Tensor, Tensor, Tensor]
"""sampled [R, 1 + N] int64, num_sampled [R] int32, path [R, 1 + N] int32, as `tree_walk` returns them."""


def walk(
    rule: AcceptanceRule,
    logits: Tensor,
    target_tokens: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    requests: Tensor,
    cu_num_logits: Tensor,
    hidden: Tensor | None = None,
) -> Walked:
    """Emitted tokens and accepted paths under `rule`.

    logits [L, V] fp32, target_tokens, draft_tokens [L] int64, hidden [L, H] as in `Rows`; parents [S, 1 + N] int32,
    requests [R] int32, cu_num_logits [R + 1] int32 as in `tree_walk`. With the exact rule it is one launch.
    """
    tree = parents, requests, cu_num_logits
    loose = None
    if not rule.exact:
        parent = parent_rows(*tree, len(target_tokens))
        loose = rule.loose(Rows(logits, target_tokens, draft_tokens, parent, hidden))
    return tree_walk(target_tokens, draft_tokens, *tree, loose)


def parent_rows(parents: Tensor, requests: Tensor, cu_num_logits: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64: each row's parent in the list of all requests' rows; a row without a parent has itself."""
    node = torch.arange(parents.shape[1], device=parents.device)
    start = cu_num_logits[:-1, None].long()
    parent = parents[requests.long()].long()
    has_parent = (node < cu_num_logits.diff()[:, None]) & (parent >= 0)
    result = torch.arange(num_rows + 1, device=parents.device)  # the last place takes entries that are no row
    result[torch.where(has_parent, start + node, num_rows)] = torch.where(has_parent, start + parent, num_rows)
    return result[:num_rows]
