"""Collapse of an alignment: merge repeats, then drop blanks. Triton serves a GPU, the torch reference a CPU."""

import torch
import triton
import triton.language as tl


def collapse(
    alignment: torch.Tensor,  # [B, T] int64
    blank: int,
    anchor: torch.Tensor,  # [B] int64
    num_labels: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, num_labels] int64, [B] int32
    """The CTC collapse. Frame `t` emits its symbol when it is not blank and differs from the symbol of frame `t - 1`;
    the `i`-th emission is label `i`. A label follows itself only with a blank between: `a a - a` is `a a`.

    Arguments:
        alignment: [B, T] int64, one symbol per frame, `blank` among them.
        blank: the id of the blank.
        anchor: [B] int64, the token before the first label.
        num_labels: N; more labels than N are cut.
    Returns:
        labels [B, N] int64 and lengths [B] int32, lengths <= N. The last label, or else the anchor, fills the places
        past the length: the target embeds every drafted id, so a filler must be a real token.

    Why custom: one launch in place of about ten of torch, without the host synchronisation of a boolean index.
    """
    run = collapse_triton if alignment.is_cuda else collapse_reference
    return run(alignment, blank, anchor, num_labels)


def collapse_reference(
    alignment: torch.Tensor, blank: int, anchor: torch.Tensor, num_labels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    emits = alignment != blank
    emits[:, 1:] &= alignment[:, 1:] != alignment[:, :-1]
    count = emits.cumsum(1)  # labels emitted up to and with each frame
    lengths = count[:, -1].clamp(max=num_labels)
    # Column 0 is the anchor and column i the i-th label. A last column takes all other symbols and is cut off.
    columns = anchor.new_empty(alignment.shape[0], num_labels + 2)
    columns[:, 0] = anchor
    columns.scatter_(1, torch.where(emits, count, num_labels + 1).clamp(max=num_labels + 1), alignment)
    filled = torch.arange(1, num_labels + 1, device=alignment.device).minimum(lengths[:, None])
    return columns.gather(1, filled), lengths.int()


def collapse_triton(
    alignment: torch.Tensor, blank: int, anchor: torch.Tensor, num_labels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_frames = alignment.shape
    labels = torch.empty(batch, num_labels, dtype=torch.int64, device=alignment.device)
    lengths = torch.empty(batch, dtype=torch.int32, device=alignment.device)
    _collapse_kernel[(batch,)](
        alignment.contiguous(),
        blank,
        anchor.contiguous(),
        labels,
        lengths,
        num_frames,
        num_labels,
        BLOCK_T=triton.next_power_of_2(num_frames),
        BLOCK_N=triton.next_power_of_2(num_labels),
        num_warps=1,
    )
    return labels, lengths


@triton.jit(do_not_specialize=["blank", "num_frames", "num_labels"])
def _collapse_kernel(
    alignment_ptr,  # [B, T] int64
    blank,
    anchor_ptr,  # [B] int64
    labels_ptr,  # [B, N] int64
    lengths_ptr,  # [B] int32
    num_frames,
    num_labels,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The place of an emission is the number of emissions before it: one prefix sum per row. Grid (B,)."""
    row = tl.program_id(0)
    frame = tl.arange(0, BLOCK_T)
    alignment_ptr += row * num_frames
    symbol = tl.load(alignment_ptr + frame, mask=frame < num_frames, other=blank)
    previous = tl.load(alignment_ptr + frame - 1, mask=(frame > 0) & (frame < num_frames), other=blank)
    # The frame before the first reads as blank, which differs from every label.
    emits = (symbol != blank) & (symbol != previous)
    place = tl.cumsum(emits.to(tl.int32), axis=0) - 1
    length = tl.minimum(tl.sum(emits.to(tl.int32), axis=0), num_labels)
    last = tl.sum(tl.where(emits & (place == length - 1), symbol, 0), axis=0)
    fill = tl.where(length > 0, last, tl.load(anchor_ptr + row))

    labels_ptr += row * num_labels
    tl.store(labels_ptr + place, symbol, mask=emits & (place < num_labels))
    column = tl.arange(0, BLOCK_N)
    tl.store(
        labels_ptr + column, tl.zeros((BLOCK_N,), tl.int64) + fill, mask=(column >= length) & (column < num_labels)
    )
    tl.store(lengths_ptr + row, length)
