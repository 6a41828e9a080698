"""The chain of labels sampled from exact prefix conditionals.

For the prefix `y_1..y_k` drafted so far, `n[t]` and `b[t]` are the masses of the alignments of frames `1..t` that
collapse to exactly this prefix and end in `y_k`, or in blank; `w = n + b`. A new label `v` can first appear at frame
`t` after all of `w[t-1]`, except that a repeat needs a blank between, so that only `b[t-1]` counts for `v = y_k`:

    S(v)   = sum_{t=1..T} p_t(v) w_v[t-1],         w_v = b if v = y_k else w
    ell(v) = log S(v) + W_out[v] . W_in[last],      last = y_k, at the root the anchor
    y      = argmax_v ell(v)                                    at temperature 0, ties to the lowest index
    y      = argmax_v ell(v) / temperature + Gumbel(seed, position + k, k, v)        else

The drafted label extends the state:

    n'[t] = p_t(y) (n'[t-1] + w_y[t-1]),   b'[t] = p_t(blank) (b'[t-1] + n'[t-1]),   n'[0] = b'[0] = 0

starting from `n = 0`, `b[t] = prod_{s<=t} p_s(blank)`. The anchor is not in the frames: there is no repeat rule at the
root (there `w = b`, so the rule is void). Both vectors are divided by `S(y)` after each label, so
`S(v) = q(v | y_1..y_k)` at every step. Only `t < T` is kept, because nothing can start after frame `T`. The chain
ends where no `S(v)` is above `IMPOSSIBLE`; `T` frames hold at most `T - repeats` labels. The vectors are linear fp32:
conditionals agree with fp64 to 1e-5, down to about 1e-10 in chains that use up their frames.

With transitions `A` between frames there is no blank and no repeat rule, and both vectors of the state are `phi`, the
mass with which the next label appears at a frame. Only the state differs:

    w[t-1] = b[t-1] = phi[t],   phi[t] = A[0, t] at the root,   phi'[t] = sum_{s<t} A[s, t] p_s(y) phi[s] / S(y)
"""

import torch

from vllm_ctc_spec.kernels.best_tokens import best_tokens_triton
from vllm_ctc_spec.kernels.contract import ChainSampling, Frames
from vllm_ctc_spec.kernels.prefix_chain.gpu import prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_chain.reference import log_q_of, prefix_chain_reference


def prefix_chain(
    frames: Frames, num_labels: int, width: int, sampling: ChainSampling
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, N] int64, [B] int32
    """Draft `N` labels, each from its exact conditional given the labels before it and that it is a candidate.

    Arguments:
        frames: log_blank is not read with transitions.
        num_labels: N, any relation to T.
        width: C. The candidates are the `C` best tokens of each frame, or all tokens where `C >= V`.
        sampling: `draft_logits[r, k]` (contiguous in V) of request slot r receives `ell` before the temperature, and
            -inf for what is no candidate: the law of label k is exactly `softmax(draft_logits[r, k] / temperature)`.
            Past the end it is the one-hot row of the fill token (0 there, -inf elsewhere). Inert rows (slot -1) write
            nothing there and their labels are arbitrary token ids.
    Returns:
        labels [B, N] int64 and lengths [B] int32, the number of labels before the end. The last label fills the places
        past the length, or else the anchor, at most V - 1.
    Raises:
        ValueError: on a GPU, for logits, draft_logits or a head that are not contiguous.

    Greedy chains are `greedy_chain` of `prefix_search`; here greedy rows stand among sampled ones.

    Why custom: a label depends on the one before it. In torch each takes some twenty launches. Sweeps over all `T * V`
    logits, one for each label, take 2 ms for 64 requests of 152 k tokens. One program per request holds the chain of
    its candidates; writing the rows of draft_logits is most of the time then. The host reads no value of a tensor: a
    CUDA graph can hold the sequence.
    """
    run = prefix_chain_triton if frames.logits.is_cuda else prefix_chain_reference
    return run(candidates(frames, width), frames, num_labels, sampling)


def chain_log_q(frames: Frames, labels: torch.Tensor, width: int) -> torch.Tensor:
    """log q of given labels [B, N], each given those before it, as `prefix_chain` samples them at temperature 1.

    Returns [B, N] fp32; -inf where such a chain cannot have the label, or one before it. labels: below V.
    """
    return log_q_of(candidates(frames, width), frames, labels)


def candidates(frames: Frames, width: int) -> torch.Tensor:  # [B, M] int64, ascending
    logits = frames.logits
    if width >= logits.shape[2]:
        return torch.arange(logits.shape[2], device=logits.device).expand(len(logits), -1).contiguous()
    if logits.is_cuda:
        return best_tokens_triton(logits, width, frames.tile_best)
    return logits.topk(width, dim=2, sorted=False).indices.flatten(1).sort(1).values
