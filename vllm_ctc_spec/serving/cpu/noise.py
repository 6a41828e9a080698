"""The random numbers of vLLM's sampler: the same bits for the same seed and position as its Triton kernels draw.

Gumbel noise comes from a murmur3 hash of (seed, position, token id); the uniform numbers of the rejection sampler are
Triton's `tl.rand`, Philox 4x32-10.
"""

import functools

import numpy as np

MASK32 = 0xFFFFFFFF
DRAFT_NOISE_SALT = 1 << 30  # keeps the noise of a draft disjoint from the target's
HIGH_WORD_DOMAIN = 0x9E3779B9
UNIFORM_MIN = np.float32(4.6566127342e-10)  # smallest positive value of tl.rand


def step_seed(seed: int, step: int) -> int:
    """The seed of one step of a draft. From vLLM 0.33 on, random numbers depend on the step beside the position."""
    from vllm.v1.worker.gpu.sample import gumbel as kernels

    return seed ^ (step << 32) if hasattr(kernels, "spec_step_seed") else seed


def noised_argmax(row: np.ndarray, seed: int, pos: int, temperature: float, use_fp64: bool) -> tuple[float, int]:
    """Maximum of `row + Gumbel noise` and its index; without noise at temperature 0. `row` is `[V]`, kept as it is."""
    if temperature != 0.0:
        noise = gumbel(seed, pos, len(row), use_fp64)
        noise += row
        row = noise
    index = int(row.argmax())
    return row[index], index


def gumbel(seed: int, pos: int, num_tokens: int, use_fp64: bool) -> np.ndarray:
    """Gumbel noise of the tokens `0..num_tokens-1`: `-log(-log(1 - u))` in float32, `-log(-log(u))` in float64."""
    low = murmur3_hash(seed, pos, num_tokens)
    if use_fp64:
        high = murmur3_hash(seed, pos, num_tokens, HIGH_WORD_DOMAIN).astype(np.uint64)
        random53 = ((high << np.uint64(32)) | low) >> np.uint64(11)
        uniform = np.minimum((random53 + 0.5) * 2.0**-53, 1 - 2.0**-53)
        return -np.log(-np.log(uniform))
    # (low + 0.5) * 2**-32 rounded once to float32, as the kernel does: both 16-bit halves convert exactly.
    uniform = (low >> np.uint32(16)).view(np.int32).astype(np.float32)
    low &= np.uint32(0xFFFF)
    tail = low.view(np.int32).astype(np.float32)
    tail += np.float32(0.5)
    tail *= np.float32(2.0**-32)
    uniform *= np.float32(2.0**-16)
    uniform += tail
    np.minimum(uniform, np.float32(1 - 2.0**-24), out=uniform)
    # The kernel approximates log1p by a series with an error up to 6e-7.
    np.log1p(np.negative(uniform, out=uniform), out=uniform)
    np.log(np.negative(uniform, out=uniform), out=uniform)
    np.negative(uniform, out=uniform)
    return uniform


def murmur3_hash(seed: int, pos: int, num_tokens: int, domain: int = 0) -> np.ndarray:
    """uint32 hash of (seed, pos, token) of the tokens `0..num_tokens-1`; only the last round differs by token."""
    prefix = domain
    for word in (seed & MASK32, (seed >> 32) & MASK32, pos & MASK32):
        key = _rotate_left(word * 0xCC9E2D51 & MASK32, 15) * 0x1B873593 & MASK32
        prefix = (_rotate_left(prefix ^ key, 13) * 5 + 0xE6546B64) & MASK32
    h = _mixed_token_keys(num_tokens) ^ np.uint32(prefix)
    h = (h << np.uint32(13)) | (h >> np.uint32(19))
    h *= np.uint32(5)
    h += np.uint32(0xE6546B64)
    h ^= np.uint32(16)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


@functools.lru_cache(maxsize=8)
def _mixed_token_keys(num_tokens: int) -> np.ndarray:
    keys = np.arange(num_tokens, dtype=np.uint32) * np.uint32(0xCC9E2D51)
    keys = (keys << np.uint32(15)) | (keys >> np.uint32(17))
    return keys * np.uint32(0x1B873593)


def _rotate_left(value: int, shift: int) -> int:
    return (value << shift | value >> (32 - shift)) & MASK32


def philox_uniform(seed: int, offset: int) -> np.float32:
    """`tl.rand(seed, offset)` in (0, 1): the first word of Philox 4x32-10."""
    c0, c1, c2, c3 = offset & MASK32, offset >> 32 & MASK32, 0, 0
    k0, k1 = seed & MASK32, seed >> 32 & MASK32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & MASK32, (a >> 32) ^ c3 ^ k1, a & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    folded = MASK32 - c0 if c0 >> 31 else c0  # int32 x to x or -x - 1, as Triton's uint_to_uniform_float
    return max(np.float32(folded) * UNIFORM_MIN, UNIFORM_MIN)
