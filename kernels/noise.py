"""Gumbel noise for drafting: the same Philox bits in Triton, for a GPU, and in torch, the reference and for a CPU.

The noise of token `v` at sequence position `pos` of a request, drafted as label `k` of its chain, is

    x = Philox4x32-10(key = seed, counter = (v, pos mod 2^32, SALT + k, pos >> 32))[0]
    u = (floor(x / 2^9) + 1/2) / 2^23        uniform on the 2^23 midpoints of (0, 1)
    g = -log(-log(u))                        Gumbel(0, 1), between -2.82 and 16.64

The midpoints are exact in fp32 and are never 0 or 1, so `g` is finite without a clamp. SALT keeps the stream apart
from `tl.rand(seed, pos)`, whose third counter word is 0: vLLM's rejection sampler draws its acceptance uniforms that
way, and a proposal must be independent of its test. A position that was drafted and not reached is drafted again, as an
earlier label, and `k` makes its noise new. Block verification needs that, because it accepts a label by the labels
behind as well.
"""

import torch
import triton
import triton.language as tl

SALT = 0x43544347
_SALT = tl.constexpr(SALT)

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_A, _KEY_STEP_B = 0x9E3779B9, 0xBB67AE85


@triton.jit
def gumbel_noise(seed, position, label, token):
    """Gumbel(0, 1) noise of a block of tokens: seed and position int64 scalars, label int32, token int32 [BLOCK]."""
    zero = token * 0
    low = zero + position.to(tl.int32)
    high = zero + (position >> 32).to(tl.int32)
    bits, _, _, _ = tl.philox(seed, token, low, zero + (_SALT + label), high)
    u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(u))


def _multiply(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 x 32 bit product. The int64 product wraps, which leaves all of its 64 bits right."""
    product = word * constant
    return (product >> 32) & _WORD, product & _WORD


def philox_reference(
    seeds: torch.Tensor,  # int64, broadcastable against the counters
    c0: torch.Tensor,  # int64 words in [0, 2^32)
    c1: torch.Tensor,
    c2: torch.Tensor,
    c3: torch.Tensor,
) -> torch.Tensor:
    """First output word of Philox4x32-10, int64 in [0, 2^32); the shapes broadcast."""
    k0, k1 = seeds & _WORD, (seeds >> 32) & _WORD
    for _ in range(_ROUNDS):
        high_a, low_a = _multiply(_MULTIPLIER_A, c0)
        high_b, low_b = _multiply(_MULTIPLIER_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _KEY_STEP_A) & _WORD, (k1 + _KEY_STEP_B) & _WORD
    return c0


def gumbel_noise_reference(
    seeds: torch.Tensor,  # [...] int64
    positions: torch.Tensor,  # [...] int64
    labels: torch.Tensor,  # [...] int64
    tokens: torch.Tensor,  # [..., K] int64
) -> torch.Tensor:  # [..., K] fp32
    """The noise of these tokens at the given positions, drafted as the given labels of a chain."""
    position = positions.unsqueeze(-1)
    bits = philox_reference(
        seeds.unsqueeze(-1), tokens, position & _WORD, SALT + labels.unsqueeze(-1), (position >> 32) & _WORD
    )
    u = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
