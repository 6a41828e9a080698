"""The chain of labels drafted from exact prefix conditionals.

For the prefix `y_1..y_k` drafted so far, `n[t]` and `b[t]` are the masses of the alignments of frames `1..t` that
collapse to exactly this prefix and end in `y_k`, or in blank; `w = n + b`. A new label `v` can first appear at frame
`t` after all of `w[t-1]`, except that a repeat needs a blank between, so that only `b[t-1]` counts for `v = y_k`:

    S(v)   = sum_{t=1..T} p_t(v) w_v[t-1],         w_v = b if v = y_k else w
    ell(v) = log S(v) + W_out[v] . W_in[last],      last = y_k, at the root the anchor
    y      = argmax_v ell(v)                                    greedy, ties to the lowest index
    y      = argmax_v ell(v) / temperature + Gumbel(seed, position + k, k, v)        sampled

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

from vllm_ctc_spec.kernels.contract import ChainSampling, Frames
from vllm_ctc_spec.kernels.prefix_chain.gpu import prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_chain.reference import prefix_chain_reference


def prefix_chain(
    frames: Frames, num_labels: int, sampling: ChainSampling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, N] int64, [B] int32
    """Draft `N` labels, each from its exact conditional given the labels before it.

    Arguments:
        frames: log_blank is not read with transitions.
        num_labels: N, any relation to T.
        sampling: None for greedy, or `ChainSampling` (draft_logits contiguous in V). `draft_logits[r, k]` of request
            slot r receives `ell` before the temperature: the law of label k is exactly
            `softmax(draft_logits[r, k] / temperature)`. Past the end it is the one-hot row of the fill token (0 there,
            -inf elsewhere). Inert rows (slot -1) write nothing there and their labels are arbitrary token ids.
    Returns:
        labels [B, N] int64 and lengths [B] int32, the number of labels before the end. The last label fills the places
        past the length, or else the anchor, at most V - 1.
    Raises:
        ValueError: on a GPU, for logits, draft_logits or a head that are not contiguous.

    Why custom: a label depends on the one before it, so this is N dependent sweeps over T * V logits. In torch each
    sweep is some twenty launches and materialises fp32 probabilities; here a sweep is two launches and no scratch of
    size V. One program per request could keep the whole loop on the GPU, but would pull T * V logits per label through
    a single SM. So the host launches a static sequence of 1 + 2 N kernels, and each sweep spreads over the vocabulary.
    The host reads no value of a tensor: a CUDA graph can hold the sequence.
    """
    run = prefix_chain_triton if frames.logits.is_cuda else prefix_chain_reference
    return run(frames, num_labels, sampling)
