"""Reference of `ctc_transform` in torch. It serves a CPU too; the oracle is in the tests, in dictionaries."""

import torch

from vllm_ctc_spec.kernels.contract import Budget, DraftTree, Frames
from vllm_ctc_spec.kernels.tree_mask import tree_mask_reference

# Nodes are ordered by integer keys: the bits of the cost (no cost is negative, so they grow with it), then the depth,
# then the place of the first emission.
_COST, _DEPTH = 1 << 32, 1 << 16
_UNUSED = (1 << 63) - 1


def ctc_transform_reference(frames: Frames, budget: Budget, chain_only: torch.Tensor | None = None) -> DraftTree:
    """Only the costs and the prefixes go frame by frame; everything else is done for all frames at once. Raw path i of
    frame t has the number t * N + i. A prefix has the number of the raw path that emitted it first, plus one: 0 is the
    root."""
    logits, log_scale, log_blank, anchor = frames[:4]
    num_nodes, width, depth = budget
    blank = logits.shape[2]
    best, tokens = best_tokens(logits, num_nodes, width)
    log_p = (best.float() + log_scale[..., None]).masked_fill_(best == -torch.inf, -torch.inf)
    costs = torch.cat([log_p, log_blank[..., None]], 2).neg_().clamp_(min=0)
    costs.masked_fill_(costs.sum((1, 2), keepdim=True).isnan(), torch.inf)
    symbols = torch.nn.functional.pad(tokens, (0, 1), value=blank)

    cost, choice = _beam(costs, num_nodes, chain_only)  # [B, T, N]
    parent = choice.div(symbols.shape[2], rounding_mode="floor")
    symbol = symbols.gather(2, choice - parent * symbols.shape[2])
    before = torch.nn.functional.pad(symbol[:, :-1].gather(2, parent[:, 1:]), (0, 0, 1, 0), value=blank)
    emits = (symbol != blank) & (symbol != before) & (cost < torch.inf)
    label = torch.where(emits, symbol, blank)
    prefix, above = (x.flatten(1) for x in _prefixes(parent, label, emits, blank))

    emits, label = emits.flatten(1), label.flatten(1)
    node_cost = _node_costs(torch.where(emits, prefix, 0), cost.flatten(1))
    node_cost, node_depth = _down_the_tree(node_cost, above, logits.shape[1])
    number = torch.arange(above.shape[1], device=above.device)
    is_node = emits & (prefix == number + 1) & (node_depth <= depth)
    key = torch.add(node_depth * _DEPTH + number, node_cost.view(torch.int32), alpha=_COST)
    key, place = torch.where(is_node, key, _UNUSED).topk(num_nodes, largest=False)

    used = key != _UNUSED
    row_of = above.new_zeros(above.shape[0], above.shape[1] + 1)
    row_of.scatter_(1, place + 1, torch.arange(1, num_nodes + 1, device=place.device).expand_as(place))
    row_of[:, 0] = 0
    parents = torch.where(used, row_of.gather(1, above.gather(1, place)), -1)
    scores = torch.where(used, -node_cost.gather(1, place), -torch.inf)
    labels = torch.where(used, label.gather(1, place), anchor[:, None])
    parents = torch.nn.functional.pad(parents.int(), (1, 0), value=-1)
    depths, ancestors = tree_mask_reference(parents)
    scores = torch.nn.functional.pad(scores, (1, 0))
    return DraftTree(torch.cat([anchor[:, None], labels], 1), parents, depths, scores, ancestors)


def best_tokens(logits: torch.Tensor, num_nodes: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and the ids of a frame's tokens among its symbols, [B, T, <= k - 1]. N tokens are enough: before any
    further one come N extensions of the same path."""
    return logits.topk(min(width - 1, logits.shape[2], num_nodes), dim=2)


def _beam(
    costs: torch.Tensor, num_paths: int, chain_only: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, T, N] fp32, [B, T, N] int64
    """`-log P` of the kept raw paths of each frame, and which of the N * k extensions each is."""
    batch, _, num_symbols = costs.shape
    order = torch.arange(num_paths * num_symbols, device=costs.device)
    cost = torch.nn.functional.pad(costs.new_zeros(batch, 1), (0, num_paths - 1), value=torch.inf)
    off_chain = None if chain_only is None else torch.where(chain_only[:, None], cost, 0.0)  # inf from row 1 on
    kept, choices = [], []
    for frame in costs[:, :, None].unbind(1):
        extended = (cost[..., None] + frame).flatten(1)
        choice = torch.add(order, extended.view(torch.int32), alpha=_COST).topk(num_paths, largest=False).indices
        cost = extended.gather(1, choice)
        if off_chain is not None:
            cost = cost + off_chain
        kept.append(cost)
        choices.append(choice)
    return torch.stack(kept, 1), torch.stack(choices, 1)


def _prefixes(
    parent: torch.Tensor, label: torch.Tensor, emits: torch.Tensor, blank: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, T, N] int64, [B, T, N] int64
    """The prefix of each raw path, and that of its path one frame before. `label` is the blank unless it is emitted."""
    prefix = torch.zeros_like(parent[:, 0])
    keys = torch.full_like(prefix[:, :1], -1)
    prefixes, above = [], []
    for up, token, new in zip(parent.unbind(1), label.unbind(1), emits.unbind(1)):
        prefix = prefix.gather(1, up)
        above.append(prefix)
        key = torch.add(token, prefix, alpha=blank + 1)
        keys = torch.cat([keys, key], 1)
        first = (key[..., None] == keys[:, None]).view(torch.uint8).argmax(2)
        prefix = torch.where(new, first, prefix)
        prefixes.append(prefix)
    return torch.stack(prefixes, 1), torch.stack(above, 1)


def _node_costs(prefix: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """`-log` of the sum over the raw paths that emit a prefix, [B, 1 + T * N]; 0 for the root, where the others go."""
    least = cost.new_full((cost.shape[0], cost.shape[1] + 1), torch.inf).scatter_reduce_(1, prefix, cost, "amin")
    mass = torch.zeros_like(least).scatter_add_(1, prefix, (least.gather(1, prefix) - cost).exp_())
    node_cost = least.sub_(mass.log_()).clamp_(min=0)
    node_cost[:, 0] = 0
    return node_cost


def _down_the_tree(
    node_cost: torch.Tensor, above: torch.Tensor, num_frames: int
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, T * N] fp32, [B, T * N] int64
    """The greatest cost on the way from the root, and the length of the way, by pointer doubling."""
    up = torch.nn.functional.pad(above, (1, 0))
    depth = torch.nn.functional.pad(torch.ones_like(above), (1, 0))
    for _ in range((num_frames - 1).bit_length()):
        node_cost = torch.maximum(node_cost, node_cost.gather(1, up))
        depth = depth + depth.gather(1, up)
        up = up.gather(1, up)
    return node_cost[:, 1:], depth[:, 1:]
