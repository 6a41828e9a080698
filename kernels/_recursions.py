"""Device functions in Triton that the searches share: probabilities of candidates, and the state behind a label.

Of one request: p_ptr [T, BLOCK_M] fp32 holds the probabilities of its candidates, from `candidate_probs`; a state
[2, T] fp32 is `w = n + b`, and `b`.
"""

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


@triton.jit
def first_largest(x, place):
    """The largest, and the first place of it. A maximum with its place is twice as many instructions."""
    largest = tl.max(x, axis=0)
    return largest, tl.min(tl.where(x == largest, place, 0x7FFFFFFF), axis=0)


@triton.jit
def root_state(log_blank_ptr, transitions_ptr, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """The state before the first label, where `w = b`, and the blank of the frame before. transitions_ptr: or None.

    Lane t holds the state before frame t + 1. Its last factor is the blank of frame t of 1..T, stored at t - 1.
    """
    t = tl.arange(0, BLOCK_T)
    behind = (t > 0) & (t < T)
    blank = tl.exp(tl.load(log_blank_ptr + t - 1, mask=behind, other=0.0))
    b = tl.cumprod(blank, axis=0)
    if transitions_ptr is not None:
        b = tl.load(transitions_ptr + t, mask=t < T, other=0.0)
    return blank, b


@triton.jit
def candidate_masses(p_ptr, state_ptr, place, repeat, T: tl.constexpr, BLOCK_M: tl.constexpr):
    """`S(v)` of every candidate. place: where the last label stands, -1 at the root; repeat: `S(last)`."""
    m = tl.arange(0, BLOCK_M)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    for t in tl.range(0, T, loop_unroll_factor=4):
        mass += tl.load(state_ptr + t) * tl.load(p_ptr + t * BLOCK_M + m)
    return tl.where(m == place, repeat, mass)


@triton.jit
def candidate_bias(
    tokens_ptr,  # [M] int64
    last,
    w_in_ptr,  # [V or more, RANK]
    w_out_ptr,  # [V, RANK]
    num_candidates,
    BLOCK_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`W_out[v] . W_in[last]` of every candidate."""
    m = tl.arange(0, BLOCK_M)
    valid = m < num_candidates
    token = tl.load(tokens_ptr + m, mask=valid, other=0)
    product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        inner = tl.load(w_in_ptr + last * RANK + r, mask=r < RANK, other=0.0).to(tl.float32)
        outer = tl.load(
            w_out_ptr + token[:, None] * RANK + r[None, :], mask=valid[:, None] & (r[None, :] < RANK), other=0.0
        )
        product += inner[None, :] * outer.to(tl.float32)
    return tl.sum(product, axis=1)


@triton.jit
def emission(p_ptr, weight_ptr, frame, T: tl.constexpr, BLOCK_M: tl.constexpr):
    """`p(y)` of a frame, and the mass of `y` first appearing there. Both are 0 outside of the frames."""
    inside = (frame >= 0) & (frame < T)
    p = tl.load(p_ptr + frame * BLOCK_M, mask=inside, other=0.0)
    return p, p * tl.load(weight_ptr + frame, mask=inside, other=0.0)


@triton.jit
def extend(
    p_ptr,  # [T, BLOCK_M] fp32, from the column of the label on
    weight_ptr,  # [T] fp32, w or b of the state before it
    blank,
    transitions_ptr,  # [1 + T, T] fp32, or None
    alive,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """`p_t(y)`, and the state `n`, `b` behind a label `y`, divided by `S(y)`; 0 where there is no label. With
    transitions `n` is 0: both vectors of the state are `b`."""
    t = tl.arange(0, BLOCK_T)
    p, first = emission(p_ptr, weight_ptr, t, T, BLOCK_M)
    if transitions_ptr is None:
        p_1, first_1 = emission(p_ptr, weight_ptr, t - 1, T, BLOCK_M)
        p_2, first_2 = emission(p_ptr, weight_ptr, t - 2, T, BLOCK_M)
        scale = tl.where(alive, 1.0 / tl.sum(first, axis=0), 0.0)
        n, b = behind_label(blank, p_1, first_1 * scale, p_2, first_2 * scale)
    else:
        b = along_transitions(tl.where(alive, first, 0.0), transitions_ptr, T, BLOCK_T)
        n = tl.zeros_like(b)
    return p, n, b


@triton.jit
def store_state(state_ptr, w, b, T: tl.constexpr, BLOCK_T: tl.constexpr):
    t = tl.arange(0, BLOCK_T)
    tl.store(state_ptr + t, w, mask=t < T)
    tl.store(state_ptr + T + t, b, mask=t < T)
