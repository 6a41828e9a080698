"""The losses' sums over the vocabulary, in chunks: nothing of size `[anchors, T, V]` or `[anchors, U, V]` exists.

For frames `h_t`, the labels' rows `W` of the target's head and the label-conditional head
`bias_k(v) = W_out[v] . W_in[y_{k-1}]`:

    lse_t    = log sum_v exp(W[v] . h_t)
    mass_k,t = log sum_{v not excluded_k} exp(W[v] . h_t + bias_k(v))

Both are sums over the vocabulary, so chunks of it are enough, forward and, recomputed, backward. With 512 anchors,
T = 12, U = 8 and V = 152 k, the frames' logits alone would be 3.7 GB in fp32; here the largest buffers are
`CHUNK_ELEMENTS` numbers each, six of them at a time.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}  # a CPU's cache; on a GPU few launches, 128 MiB in fp32


@dataclasses.dataclass(frozen=True)
class LabelScores:
    """Logits and sums at the labels `y_1..y_U` of each anchor and at the tokens before them, `y_0` the anchor.

    The fields of the label-conditional head are None without one.
    """

    log_label: Tensor  # [N, T, U] log softmax of frame t at y_k
    log_last: Tensor  # [N, T, U] log softmax of frame t at y_{k-1}
    log_mass: Tensor | None = None  # [N, U, T] log sum_v softmax_t(v) exp(bias_k(v)), the repeat v = y_{k-1} left out
    label_bias: Tensor | None = None  # [N, U] bias_k(y_k)
    last_bias: Tensor | None = None  # [N, U] bias_k(y_{k-1})


def label_scores(
    hidden: Tensor,  # [N, T, H], the frames' normalised hidden states
    head: Tensor,  # [V, H]
    anchors: Tensor,  # [N]
    labels: Tensor,  # [N, U]
    markov: tuple[Tensor, Tensor] | None = None,  # W_in [V or more, r], W_out [V, r]
    exclude_repeats: bool = True,
    dtype: torch.dtype | None = None,
) -> LabelScores:
    """exclude_repeats: False where a lattice has no repeat rule. dtype: of the matrix products, None for the inputs'.

    The anchor is not in the frames, so nothing is left out of the first label's sum. With a draft vocabulary the anchor
    may be no label: it then has a row of W_in behind those of the labels.
    """
    last = torch.cat([anchors[:, None], labels[:, :-1]], 1)
    dtype = dtype or hidden.dtype
    inner = outer = excluded = None
    if markov is not None:
        inner, outer = F.embedding(last, markov[0]), markov[1]
        excluded = last if exclude_repeats else torch.full_like(last, -1)
        excluded = torch.cat([torch.full_like(excluded[:, :1], -1), excluded[:, 1:]], 1)
    lse, mass = _VocabularySums.apply(hidden, head, inner, outer, excluded, dtype)
    last = last.clamp_max(len(head) - 1)  # the anchor's own entry is not read from here on
    log_label = _logits_at(hidden, head, labels, dtype) - lse[..., None]
    log_last = _logits_at(hidden, head, last, dtype) - lse[..., None]
    if markov is None:
        return LabelScores(log_label, log_last)
    label_bias, last_bias = ((inner * F.embedding(tokens, outer)).sum(-1) for tokens in (labels, last))
    return LabelScores(log_label, log_last, mass - lse[:, None], label_bias, last_bias)


def _logits_at(hidden: Tensor, head: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of each row's `tokens [N, U]` in its frames: [N, T, U]."""
    logits = torch.bmm(hidden.to(dtype), F.embedding(tokens, head).to(dtype).mT)
    return logits.to(hidden.dtype)


class _VocabularySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, inner, outer, excluded, dtype):
        """lse [N, T] and mass [N, U, T] (None without a head): running maxima and rescaled sums over the chunks."""
        rows = hidden.shape[:2]
        max_l, sum_l = hidden.new_full((*rows, 1), -torch.inf), hidden.new_zeros((*rows, 1))
        max_b = sum_z = None
        if inner is not None:
            max_b = hidden.new_full((*inner.shape[:2], 1), -torch.inf)
            sum_z = hidden.new_zeros(*inner.shape[:2], rows[1])
        for chunk in _chunks(hidden, head):
            logits = _scores(hidden, head[chunk], dtype)
            new_max = torch.maximum(max_l, logits.amax(-1, keepdim=True))
            shrink_l, logits = (max_l - new_max).exp(), logits.sub_(new_max).exp_()
            sum_l, max_l = sum_l * shrink_l + logits.sum(-1, keepdim=True), new_max
            if inner is not None:
                bias = _scores(inner, outer[chunk], dtype)
                new_max = torch.maximum(max_b, bias.amax(-1, keepdim=True))
                shrink_b, bias = (max_b - new_max).exp(), _without(bias.sub_(new_max).exp_(), excluded, chunk)
                sum_z, max_b = sum_z * shrink_b * shrink_l.mT + torch.bmm(bias, logits.mT), new_max
        ctx.save_for_backward(hidden, head, inner, outer, excluded, max_l, sum_l, max_b, sum_z)
        ctx.dtype = dtype
        lse = (sum_l.log() + max_l).squeeze(-1)
        if inner is None:
            return lse, None
        tiny = torch.finfo(sum_z.dtype).tiny
        return lse, sum_z.clamp_min(tiny).log() + max_b + max_l.mT

    @staticmethod
    def backward(ctx, grad_lse, grad_mass):
        hidden, head, inner, outer, excluded, max_l, sum_l, max_b, sum_z = ctx.saved_tensors
        dtype, share = ctx.dtype, grad_lse[..., None] / sum_l
        grad_hidden = torch.zeros_like(hidden)
        grad_inner = grad_outer = ratio = None
        if inner is not None:
            grad_inner, grad_outer = torch.zeros_like(inner), torch.empty_like(outer)
            ratio = grad_mass / sum_z.clamp_min(torch.finfo(sum_z.dtype).tiny)
        for chunk in _chunks(hidden, head):
            logits, weight = _scores(hidden, head[chunk], dtype).sub_(max_l).exp_(), share
            if inner is not None:
                bias = _without(_scores(inner, outer[chunk], dtype).sub_(max_b).exp_(), excluded, chunk)
                weight = share + torch.bmm(ratio.mT, bias)
                grad_bias = bias.mul_(torch.bmm(ratio, logits)).to(dtype).flatten(0, 1)
                grad_inner += (grad_bias @ outer[chunk].to(dtype)).view_as(inner)
                grad_outer[chunk] = grad_bias.mT @ inner.flatten(0, 1).to(dtype)
            grad_logits = logits.mul_(weight).to(dtype).flatten(0, 1)
            grad_hidden += (grad_logits @ head[chunk].to(dtype)).view_as(hidden)
        return grad_hidden, None, grad_inner, grad_outer, None, None


def _chunks(hidden: Tensor, head: Tensor) -> list[slice]:
    size = max(256, CHUNK_ELEMENTS[hidden.device.type] // (hidden.shape[0] * hidden.shape[1]))
    return [slice(start, min(start + size, len(head))) for start in range(0, len(head), size)]


def _scores(rows: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """`[N, K, d]` and `[C, d]` to `[N, K, C]`, computed in `dtype`, returned in the rows' own."""
    return F.linear(rows.to(dtype), table.to(dtype)).to(rows.dtype)


def _without(factor: Tensor, excluded: Tensor, chunk: slice) -> Tensor:
    """Zero at each row's excluded token [N, U], -1 for none: `factor [N, U, C]` is changed in place."""
    place = (excluded - chunk.start)[..., None]
    inside = (place >= 0) & (place < factor.shape[-1])
    place = place.clamp(0, factor.shape[-1] - 1)
    return factor.scatter_(-1, place, torch.where(inside, 0.0, factor.gather(-1, place)))
