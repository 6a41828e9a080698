"""The walk down a tree along the target's tokens, and along edges that a rule allows beside them. Triton serves a GPU,
the numpy reference a CPU."""

import numpy as np
import torch
import triton
import triton.language as tl


def tree_walk(
    target_tokens: torch.Tensor,  # [L] int64
    draft_tokens: torch.Tensor,  # [L] int64
    parents: torch.Tensor,  # [S, 1 + N] int32
    requests: torch.Tensor,  # [R] int32
    cu_num_logits: torch.Tensor,  # [R + 1] int32
    loose: torch.Tensor | None = None,  # [L] bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # [R, 1 + N] int64, [R] int32, [R, 1 + N] int32
    """Node `i` of request `r` is row `cu_num_logits[r] + i` of the token lists, `i < num_logits`. From node 0, with
    y = target_tokens[node]:

        step to the child c of node with draft_tokens[c] = y, if there is one, and emit y;
        else to the first child c of node with loose[c], and emit draft_tokens[c];
        else emit y and stop

    The target's token was drawn once per node, from the target's own distribution after the path to that node. So
    without `loose` the emitted tokens are distributed as without speculation, greedy and sampled.

    Arguments:
        target_tokens: [L] int64, L >= cu_num_logits[R].
        draft_tokens: [L] int64, the token of each node; that of the anchor is not read. -1 is never stepped to.
        parents: [S, 1 + N] int32, contiguous, as in `DraftTree`: a parent stands before its children, which differ.
        requests: [R] int32, request slots: rows of `parents`.
        cu_num_logits: [R + 1] int32; the tree is cut to its first num_logits rows. num_logits = 0 emits nothing.
        loose: [L] bool, nodes that may be taken although the target drew another token at their parent; None: no node.
    Returns:
        sampled [R, 1 + N] int64, the emitted tokens, then 0; num_sampled [R] int32; path [R, 1 + N] int32, the node
        after which the k-th token is emitted, then `path[k] = k`, so that compaction leaves those rows in place.

    Why custom: each step depends on the one before it, so torch needs eight launches for each level of the deepest
    tree. One program per request compares all children at once and stops at its own last step.
    """
    run = tree_walk_triton if target_tokens.is_cuda else tree_walk_reference
    return run(target_tokens, draft_tokens, parents, requests, cu_num_logits, loose)


def tree_walk_reference(
    target_tokens: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    requests: torch.Tensor,
    cu_num_logits: torch.Tensor,
    loose: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Serves a CPU. One pass over the nodes, the last first, finds where each of them would lead."""
    target, draft = target_tokens.numpy().tolist(), draft_tokens.numpy().tolist()
    may_loosely = [False] * len(target) if loose is None else loose.numpy().tolist()
    all_parents, starts = parents.numpy(), cu_num_logits.numpy().tolist()
    num_requests, width = len(requests), parents.shape[1]
    sampled = np.zeros((num_requests, width), np.int64)
    num_sampled = np.empty(num_requests, np.int32)
    path = np.empty((num_requests, width), np.int32)
    path[:] = np.arange(width, dtype=np.int32)
    for r, request in enumerate(requests.numpy().tolist()):
        start, num_logits = starts[r], starts[r + 1] - starts[r]
        drawn: dict[int, int] = {}  # by node: the child that carries the target's token
        allowed: dict[int, int] = {}  # by node: its first loose child
        tree = all_parents[request, :num_logits].tolist()
        for node in range(num_logits - 1, 0, -1):
            parent, token = tree[node], draft[start + node]
            if parent < 0 or token < 0:
                continue
            if token == target[start + parent]:
                drawn[parent] = node
            if may_loosely[start + node]:
                allowed[parent] = node
        nodes, emitted = [0][:num_logits], []
        while len(emitted) < len(nodes):
            node = nodes[-1]
            following = drawn.get(node, allowed.get(node))
            if following is None:
                emitted.append(target[start + node])
                break
            emitted.append(draft[start + following])
            nodes.append(following)
        num_sampled[r] = len(nodes)
        sampled[r, : len(nodes)] = emitted
        path[r, : len(nodes)] = nodes
    return torch.from_numpy(sampled), torch.from_numpy(num_sampled), torch.from_numpy(path)


def tree_walk_triton(
    target_tokens: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    requests: torch.Tensor,
    cu_num_logits: torch.Tensor,
    loose: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_requests, width = requests.shape[0], parents.shape[1]
    device = target_tokens.device
    sampled = torch.empty(num_requests, width, dtype=torch.int64, device=device)
    num_sampled = torch.empty(num_requests, dtype=torch.int32, device=device)
    path = torch.empty(num_requests, width, dtype=torch.int32, device=device)
    _tree_walk_kernel[(num_requests,)](
        target_tokens, draft_tokens, parents, requests, cu_num_logits,
        None if loose is None else loose.view(torch.uint8), sampled, num_sampled, path,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip
    return sampled, num_sampled, path


@triton.jit
def _tree_walk_kernel(
    target_ptr,  # [L] int64
    draft_ptr,  # [L] int64
    parents_ptr,  # [S, WIDTH] int32
    requests_ptr,  # [R] int32
    cu_num_logits_ptr,  # [R + 1] int32
    loose_ptr,  # [L] uint8, or None
    sampled_ptr,  # [R, WIDTH] int64
    num_sampled_ptr,  # [R] int32
    path_ptr,  # [R, WIDTH] int32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tree of a request in registers, one lane for each node. A step is two reductions, four with loose nodes.
    Grid (R,)."""
    request = tl.program_id(0)
    start = tl.load(cu_num_logits_ptr + request)
    num_logits = tl.load(cu_num_logits_ptr + request + 1) - start
    lane = tl.arange(0, BLOCK)
    is_node = (lane >= 1) & (lane < num_logits)
    tree = tl.load(requests_ptr + request).to(tl.int64) * WIDTH
    parent = tl.load(parents_ptr + tree + lane, mask=is_node, other=-1)
    draft = tl.load(draft_ptr + start + lane, mask=is_node, other=-1)
    target = tl.load(target_ptr + start + lane, mask=lane < num_logits, other=-1)
    if loose_ptr is not None:
        is_loose = tl.load(loose_ptr + start + lane, mask=is_node, other=0) != 0

    sampled = tl.zeros((BLOCK,), tl.int64)
    path = lane
    # BLOCK stands for the end of the walk: no lane has that number.
    node = tl.where(num_logits > 0, 0, BLOCK)
    step = 0
    while node < BLOCK:
        token = tl.sum(tl.where(lane == node, target, 0), axis=0)
        is_child = is_node & (parent == node) & (draft >= 0)
        following = tl.min(tl.where(is_child & (draft == token), lane, BLOCK), axis=0)
        if loose_ptr is not None:
            allowed = tl.min(tl.where(is_child & is_loose, lane, BLOCK), axis=0)
            following = tl.where(following < BLOCK, following, allowed)
            carried = tl.sum(tl.where(lane == following, draft, 0), axis=0)
            token = tl.where(following < BLOCK, carried, token)
        sampled = tl.where(lane == step, token, sampled)
        path = tl.where(lane == step, node, path)
        step += 1
        node = following

    tl.store(sampled_ptr + request * WIDTH + lane, sampled, mask=lane < WIDTH)
    tl.store(path_ptr + request * WIDTH + lane, path, mask=lane < WIDTH)
    tl.store(num_sampled_ptr + request, step)
