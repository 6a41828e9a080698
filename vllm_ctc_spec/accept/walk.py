"""The walk from each anchor down its tree, along edges that a rule marks."""

import torch
from torch import Tensor

from vllm_ctc_spec.accept.exact import Exact
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
    requests [R] int32, cu_num_logits [R + 1] int32 as in `tree_walk`: the walk of the exact rule, in one launch.
    """
    if isinstance(rule, Exact):
        return tree_walk(target_tokens, draft_tokens, parents, requests, cu_num_logits)
    parent = parent_rows(parents, requests, cu_num_logits, len(target_tokens))
    rows = Rows(logits, target_tokens, draft_tokens, parent, hidden)
    return walk_edges(rule.accepts(rows), target_tokens, draft_tokens, parents, requests, cu_num_logits)


def walk_edges(
    accepts: Tensor,
    target_tokens: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    requests: Tensor,
    cu_num_logits: Tensor,
) -> Walked:
    """From node 0 of each request:

        step to the child whose token the target drew, if it is accepted;
        else to the first accepted child (the best-scored one), and emit that child's token;
        else emit the target's token and stop

    accepts [L] bool, the edge from a row's parent to the row; the other arguments as above. All requests take each of
    1 + N steps at once: nothing is read on the host.
    """
    width = parents.shape[1]
    node = torch.arange(width, device=parents.device)
    start, num_logits = cu_num_logits[:-1, None].long(), cu_num_logits.diff()[:, None]
    is_row = node < num_logits  # [R, 1 + N]
    row = torch.where(is_row, start + node, 0)
    parent, draft, target = parents[requests.long()].long(), draft_tokens[row], target_tokens[row]
    is_edge = accepts[row] & is_row & (parent >= 0) & (draft >= 0)
    is_exact = draft == target.gather(1, parent.clamp_min(0))
    preference = torch.where(is_exact, node, node + width)  # the smallest wins

    none = 2 * width
    current = torch.zeros_like(start)
    walking = num_logits > 0  # [R, 1]
    sampled, path = torch.zeros_like(parent), node.repeat(len(parent), 1)
    num_sampled = torch.zeros_like(num_logits)
    for step in range(width):
        children = is_edge & (parent == current)
        best = torch.where(children, preference, none).min(1, keepdim=True).values
        goes_on, child = best < none, best % width
        token = torch.where(goes_on, draft.gather(1, child), target.gather(1, current))
        sampled[:, step : step + 1] = torch.where(walking, token, 0)
        path[:, step : step + 1] = torch.where(walking, current, step)
        num_sampled += walking
        walking, current = walking & goes_on, torch.where(goes_on, child, current)
    return sampled, num_sampled[:, 0].int(), path.int()


def parent_rows(parents: Tensor, requests: Tensor, cu_num_logits: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int64: each row's parent in the list of all requests' rows; a row without a parent has itself."""
    node = torch.arange(parents.shape[1], device=parents.device)
    start = cu_num_logits[:-1, None].long()
    parent = parents[requests.long()].long()
    has_parent = (node < cu_num_logits.diff()[:, None]) & (parent >= 0)
    result = torch.arange(num_rows + 1, device=parents.device)  # the last place takes entries that are no row
    result[torch.where(has_parent, start + node, num_rows)] = torch.where(has_parent, start + parent, num_rows)
    return result[:num_rows]
