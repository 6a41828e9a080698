"""The drafting noise: Philox bits, the Gumbel law, independence, and a stream of its own."""

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels import noise
from vllm_ctc_spec.kernels.noise import gumbel_noise, gumbel_noise_reference, philox_reference

from ..oracle.chi_square import p_value

# Seeds and positions with a sign bit, and with bits above the first 32.
SEEDS = torch.tensor([0, 1, -1, 2**31, 2**63 - 1, -(2**62) - 5])
POSITIONS = torch.tensor([0, 1, 7, 2**31 - 1, 2**31 + 3, 2**33 + 1])
LABELS = torch.tensor([0, 1, 63])
ZERO = torch.tensor([0])


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, labels_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    token = tl.arange(0, BLOCK)
    seed, position, label = tl.load(seeds_ptr + row), tl.load(positions_ptr + row), tl.load(labels_ptr + row)
    tl.store(out_ptr + row * BLOCK + token, gumbel_noise(seed, position, label, token))


@triton.jit
def _rand_kernel(seed, first_offset, out_ptr, BLOCK: tl.constexpr):
    token = tl.arange(0, BLOCK)
    tl.store(out_ptr + token, tl.rand(seed, token.to(tl.int64) + first_offset))


@pytest.mark.parametrize(
    "counter, key, word",
    [
        ((0, 0, 0, 0), 0, 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, -1, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, 0xD16CFE09),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: int, word: int) -> None:
    """Salmon et al. 2011, Random123's table of known answers."""
    assert philox_reference(torch.tensor(key), *(torch.tensor(c) for c in counter)).item() == word


def uniforms(
    seeds: torch.Tensor, positions: torch.Tensor, num_tokens: int, labels: torch.Tensor = ZERO
) -> torch.Tensor:
    return torch.exp(-torch.exp(-gumbel_noise_reference(seeds, positions, labels, torch.arange(num_tokens)).double()))


@pytest.mark.parametrize("axis", ["token", "position", "label", "seed"])
def test_uniform_and_independent_along_each_axis(axis: str) -> None:
    n = 1 << 16
    one, many = torch.tensor([12345]), torch.arange(n)
    if axis == "token":
        u = uniforms(one, one, n).flatten()
    elif axis == "position":
        u = uniforms(one.expand(n), many, 1).flatten()
    elif axis == "label":
        u = uniforms(one, one, n // 64, torch.arange(64)[:, None]).movedim(0, -1).flatten()
    else:
        u = uniforms(many, one.expand(n), 1).flatten()
    bins = Counter((u * 64).long().tolist())
    assert 1e-4 < p_value(bins, dict.fromkeys(range(64), 1 / 64)) < 1 - 1e-4
    centred = (u - 0.5) * 12**0.5
    for lag in (1, 2, 16, 4096):
        assert abs((centred[lag:] * centred[:-lag]).mean()) < 4.5 / n**0.5


def test_noise_is_finite_for_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([[0, 1, 511, 512, 2**31, 2**32 - 512, 2**32 - 1]])
    monkeypatch.setattr(noise, "philox_reference", lambda *_: words)
    values = gumbel_noise_reference(ZERO, ZERO, ZERO, torch.arange(7))
    assert values.isfinite().all()
    assert (values.diff() >= 0).all()
    assert -2.9 < values.min() < -2.7 and 16.6 < values.max() < 16.7


def test_every_bit_of_seed_position_and_label_counts() -> None:
    three, every = torch.tensor([3]), torch.arange(64)
    base = gumbel_noise_reference(three, three, three, every)
    for bit in range(63):
        other = torch.tensor([3 ^ (1 << bit)])
        assert not torch.equal(base, gumbel_noise_reference(other, three, three, every))
        assert not torch.equal(base, gumbel_noise_reference(three, other, three, every))
        if bit < 6:
            assert not torch.equal(base, gumbel_noise_reference(three, three, other, every))


def test_triton_draws_the_same_noise(triton_device: str) -> None:
    every = torch.meshgrid(SEEDS, POSITIONS, LABELS, indexing="ij")
    seeds, positions, labels = (x.flatten().contiguous() for x in every)
    out = torch.empty(len(seeds), 128, device=triton_device)
    on_device = [x.to(triton_device) for x in (seeds, positions, labels.int())]
    _noise_kernel[(len(seeds),)](*on_device, out, BLOCK=128)
    expected = gumbel_noise_reference(seeds, positions, labels, torch.arange(128))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [0, 5, 1000])
def test_triton_rand_is_another_stream(position: int, triton_device: str) -> None:
    rand = torch.empty(4096, device=triton_device)
    # The offsets whose two counter words, token and position, are those of the drafting noise: without the salt the
    # random words would be the same, up to the conversion to a float.
    _rand_kernel[(1,)](99, position << 32, rand, BLOCK=4096)
    seed, word, token, zero = torch.tensor([99]), torch.tensor([position]), torch.arange(4096), torch.zeros(1).long()
    unsalted = philox_reference(seed, token, word, zero, zero)
    signed = torch.where(unsalted < 2**31, unsalted, 2**32 - 1 - unsalted)
    torch.testing.assert_close(rand.cpu().double(), signed.double() / 2**31, rtol=1e-5, atol=1e-6)
    drafted = uniforms(seed, word, 4096)[0]
    for other in (rand.cpu().double(), unsalted / 2**32):
        assert abs(torch.corrcoef(torch.stack([drafted, other]))[0, 1]) < 4.5 / 4096**0.5
