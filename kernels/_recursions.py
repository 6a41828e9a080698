"""Device functions in Triton that the searches share: probabilities of a frame, and the state behind a label."""

import triton
import triton.language as tl


@triton.jit
def frame_prob(logits, log_scale):
    """`p_t(v)`. 0 by hand at -inf: a frame of -inf only may have an infinite log_scale, and -inf + inf is NaN."""
    return tl.where(logits == -float("inf"), 0.0, tl.exp(logits.to(tl.float32) + log_scale))


@triton.jit
def complement(x):
    """`1 - e^x`, x <= 0. Near 0 by its series, because the difference cancels and Triton has no expm1."""
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.125, series, 1 - tl.exp(x))


@triton.jit
def then(a, c, a_next, c_next):
    """The affine map `x -> a x + c`, and then the next one."""
    return a * a_next, c * a_next + c_next


@triton.jit
def behind_label(blank, p, first, p_before, first_before):
    """The state `n`, `b` behind a label `y`: `state[t]` is in lane `t`, `t = 0..T-1`.

    Lane `t` of the arguments belongs to frame `t` (`*_before`: to frame `t - 1`) of `1..T`: the probability of the
    blank, `p_t(y)`, and the mass of `y` first appearing there.

    Both recursions of CTC are affine in their state, so each is a scan over frames. `n` composes the maps of the frames
    up to `t`. `b` needs `n[t-1]`: the same scan one frame later is cheaper than a turn through shared memory.
    """
    _, n = tl.associative_scan((p, first), 0, then)
    _, n_before = tl.associative_scan((p_before, first_before), 0, then)
    _, b = tl.associative_scan((blank, blank * n_before), 0, then)
    return n, b


@triton.jit
def along_transitions(mass, transitions_ptr, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """`phi'[t] = sum_s mass[s] A[s, t] / sum_s mass[s]`, 0 if there is no mass. transitions_ptr: A [1 + T, T]."""
    total = tl.sum(mass, axis=0)
    # Rounded to nearest, so that all mass at one frame is exactly 1.
    emitted = tl.where(total > 0, tl.div_rn(mass, total), 0.0)
    s, t = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_T)[None, :]
    tile = tl.load(transitions_ptr + (1 + s) * T + t, mask=(s < T) & (t < T), other=0.0)
    return tl.sum(emitted[:, None] * tile, axis=0)
