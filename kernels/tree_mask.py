"""Depths and ancestor sets of a forest of parents. Triton serves a GPU, the torch reference a CPU."""

import torch
import triton
import triton.language as tl

# Row 0, the anchor, has no bit; node i has bit i - 1, so that node 64 is the sign.
_BITS = torch.tensor([0, *(1 << i for i in range(63)), -(1 << 63)])


def tree_mask(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Walk from every node to the anchor:

        depth[i] = 1 + depth[parent[i]],   ancestors[i] = ancestors[parent[i]] | 1 << (i - 1)

    Arguments:
        parents: [B, 1 + N] int32, N <= 64, as in `DraftTree`: row 0 is the anchor with parent -1, a used row has a
            parent in front of it, an unused row has parent -1.
    Returns:
        depths [B, 1 + N] int32 and ancestors [B, 1 + N] int64, both 0 in row 0 and in unused rows.

    Why custom: both recursions go down the tree one level after the other; one launch doubles all pointers in
    registers, in log2(N) steps.
    """
    return (tree_mask_triton if parents.is_cuda else tree_mask_reference)(parents)


def tree_mask_reference(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """With `P[i, j] = 1` if j is the parent of i, `1 + P + P^2 + .. = (1 - P)^-1` is the relation "i is below j or is
    j". The matrix is triangular and of 0 and 1, so solving for it is exact."""
    row = torch.arange(parents.shape[1], device=parents.device)
    minus_parent = (parents[..., None] == row).float().neg_()
    used = torch.diag_embed((parents >= 0).float())
    below = torch.linalg.solve_triangular(minus_parent, used, upper=False, unitriangular=True)
    bits = _BITS[: parents.shape[1]].to(parents.device)
    return below.sum(2, dtype=torch.int32), torch.where(below > 0, bits, 0).sum(2)


def tree_mask_triton(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parents = parents.contiguous()
    depths = torch.empty_like(parents)
    ancestors = torch.empty_like(parents, dtype=torch.int64)
    batch, width = parents.shape
    _tree_mask_kernel[(batch,)](
        parents, depths, ancestors, N=width - 1, BLOCK_N=triton.next_power_of_2(width - 1), num_warps=1
    )
    return depths, ancestors


@triton.jit
def _tree_mask_kernel(
    parents_ptr,  # [B, 1 + N] int32
    depths_ptr,  # [B, 1 + N] int32
    ancestors_ptr,  # [B, 1 + N] int64
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pointer doubling: after s steps a node knows the 2^s nodes that end in it. Grid (B,)."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)  # node lane + 1
    inside = lane < N
    at = row * (N + 1) + 1 + lane
    parent = tl.load(parents_ptr + at, mask=inside, other=-1)
    used = parent >= 0
    depth = used.to(tl.int32)
    ancestors = tl.where(used, tl.full((BLOCK_N,), 1, tl.int64) << lane, 0)
    above = parent - 1  # the parent's lane; negative at the anchor
    step = 1
    while step < N:
        below = above >= 0
        there = tl.where(below, above, 0)
        depth += tl.where(below, tl.gather(depth, there, 0), 0)
        ancestors |= tl.where(below, tl.gather(ancestors, there, 0), 0)
        above = tl.where(below, tl.gather(above, there, 0), -1)
        step *= 2
    tl.store(depths_ptr + at, depth, mask=inside)
    tl.store(ancestors_ptr + at, ancestors, mask=inside)
    tl.store(depths_ptr + row * (N + 1), 0)
    tl.store(ancestors_ptr + row * (N + 1), 0)
