"""Positions, ancestor sets and row ranges of one step's token rows. Triton serves a GPU, the numpy reference a CPU."""

import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels.contract import TreeRows

_BLOCK = 1024


def tree_layout(
    positions: torch.Tensor,  # [num_tokens] int64
    query_start_loc: torch.Tensor,  # [R + 1] int32
    cu_num_logits: torch.Tensor,  # [R + 1] int32
    requests: torch.Tensor,  # [R] int32
    depths: torch.Tensor,  # [S, 1 + N] int32
    ancestors: torch.Tensor,  # [S, 1 + N] int64
    out_positions: torch.Tensor,  # [>= num_tokens] int64, written
    out_rows: TreeRows,  # written
) -> None:
    """Request `r` owns the rows `query_start_loc[r] .. query_start_loc[r + 1]`. Its last
    `num_rows = cu_num_logits[r + 1] - cu_num_logits[r]` rows are the first rows of its tree, the anchor in row `a`:

        anchor_rows[r] = a = query_start_loc[r + 1] - num_rows,    num_rows[r] = num_rows
        out_positions[a + i] = positions[a] + depths[requests[r], i]      i >= 1; positions in all other rows
        out_rows.ancestors[a + i] = ancestors[requests[r], i]             i >= 1; 0 in all other rows

    Siblings stand in different rows but at the same position: a row's own place says nothing about its RoPE position.

    Arguments:
        positions: [num_tokens] int64, counted up row by row as for a sequence; not written.
        query_start_loc, cu_num_logits: [R + 1] int32.
        requests: [R] int32, request slots: rows of the two tables of trees.
        depths, ancestors: [S, 1 + N] int32 and int64, contiguous, as in `DraftTree`. num_rows <= 1 + N.
        out_positions [>= num_tokens] int64, out_rows: contiguous, and longer than num_tokens or R where a CUDA graph
            pads the step. In the padding, positions, ancestors and num_rows are 0, and anchor_rows keep their values.

    Why custom: one launch whose shape depends on tensor shapes only. The rows of the trees are ragged: torch needs a
    repeat_interleave with a host synchronisation and about fifteen launches.
    """
    run = tree_layout_triton if positions.is_cuda else tree_layout_reference
    run(positions, query_start_loc, cu_num_logits, requests, depths, ancestors, out_positions, out_rows)


def tree_layout_reference(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_logits: torch.Tensor,
    requests: torch.Tensor,
    depths: torch.Tensor,
    ancestors: torch.Tensor,
    out_positions: torch.Tensor,
    out_rows: TreeRows,
) -> None:
    """Serves a CPU, through numpy views: an operation costs a fifth of torch's."""
    all_depths, all_ancestors = depths.numpy(), ancestors.numpy()
    row_positions = out_positions.numpy()
    anchor_rows, num_rows, row_ancestors = (values.numpy() for values in out_rows)
    num_tokens = len(positions)
    row_positions[:num_tokens] = positions.numpy()
    row_positions[num_tokens:] = 0
    row_ancestors[:] = 0
    num_rows[len(requests) :] = 0
    ends, logits = query_start_loc.numpy().tolist(), cu_num_logits.numpy().tolist()
    for r, request in enumerate(requests.numpy().tolist()):
        end, count = ends[r + 1], logits[r + 1] - logits[r]
        anchor_row = end - count
        anchor_rows[r], num_rows[r] = anchor_row, count
        if count > 1:
            row_positions[anchor_row + 1 : end] = row_positions[anchor_row] + all_depths[request, 1:count]
            row_ancestors[anchor_row + 1 : end] = all_ancestors[request, 1:count]


def tree_layout_triton(
    positions: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_logits: torch.Tensor,
    requests: torch.Tensor,
    depths: torch.Tensor,
    ancestors: torch.Tensor,
    out_positions: torch.Tensor,
    out_rows: TreeRows,
) -> None:
    num_requests = requests.shape[0]
    lengths = (out_positions.shape[0], out_rows.ancestors.shape[0], out_rows.num_rows.shape[0])
    _tree_layout_kernel[(num_requests + triton.cdiv(max(lengths), _BLOCK),)](
        positions, query_start_loc, cu_num_logits, requests, depths, ancestors, out_positions, *out_rows,
        num_requests, positions.shape[0], *lengths, WIDTH=depths.shape[1], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "positions_len", "ancestors_len", "num_rows_len"])
def _tree_layout_kernel(
    positions_ptr,  # [num_tokens] int64
    query_start_ptr,  # [R + 1] int32
    cu_num_logits_ptr,  # [R + 1] int32
    requests_ptr,  # [R] int32
    depths_ptr,  # [S, WIDTH] int32
    ancestors_ptr,  # [S, WIDTH] int64
    out_positions_ptr,  # [positions_len] int64
    out_anchor_rows_ptr,  # [>= R] int32
    out_num_rows_ptr,  # [num_rows_len] int32
    out_ancestors_ptr,  # [ancestors_len] int64
    num_requests,
    num_tokens,
    positions_len,
    ancestors_len,
    num_rows_len,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each request, then one for each block of the padding. Grid (R + cdiv(longest buffer, BLOCK),)."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    if program < num_requests:
        start, end = tl.load(query_start_ptr + program), tl.load(query_start_ptr + program + 1)
        num_rows = tl.load(cu_num_logits_ptr + program + 1) - tl.load(cu_num_logits_ptr + program)
        anchor_row = end - num_rows
        tl.store(out_anchor_rows_ptr + program, anchor_row)
        tl.store(out_num_rows_ptr + program, num_rows)
        tree = tl.load(requests_ptr + program).to(tl.int64) * WIDTH
        anchor_position = tl.load(positions_ptr + anchor_row, mask=num_rows > 0, other=0)
        for first in range(start, end, BLOCK):
            row = first + lane
            node = row - anchor_row
            in_tree = (node >= 1) & (row < end)
            position = tl.load(positions_ptr + row, mask=(node < 1) & (row < end), other=0)
            depth = tl.load(depths_ptr + tree + node, mask=in_tree, other=0)
            bits = tl.load(ancestors_ptr + tree + node, mask=in_tree, other=0)
            tl.store(out_positions_ptr + row, tl.where(in_tree, anchor_position + depth, position), mask=row < end)
            tl.store(out_ancestors_ptr + row, bits, mask=row < end)
    else:
        row = (program - num_requests) * BLOCK + lane
        unowned = row >= tl.load(query_start_ptr + num_requests)
        position = tl.load(positions_ptr + row, mask=unowned & (row < num_tokens), other=0)
        tl.store(out_positions_ptr + row, position, mask=unowned & (row < positions_len))
        tl.store(out_ancestors_ptr + row, tl.zeros((BLOCK,), tl.int64), mask=unowned & (row < ancestors_len))
        padding = (row >= num_requests) & (row < num_rows_len)
        tl.store(out_num_rows_ptr + row, tl.zeros((BLOCK,), tl.int32), mask=padding)
