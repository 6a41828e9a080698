"""The chain: brute force over all alignments, then the fp64 oracle, then the law of the samples, then Triton."""

import itertools
from collections import defaultdict

import pytest
import torch
from vllm_ctc_spec.kernels.prefix_chain import (
    ChainSampling,
    prefix_chain,
    prefix_chain_reference,
    prefix_chain_triton,
)

from vllm_ctc_spec import ctc

ANCHOR = 1
IMPOSSIBLE = 1e-30
NEVER = 7.5  # what rows of draft_logits hold that must not be written


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_frames(batch: int, num_frames: int, num_tokens: int, seed: int, scale: float = 3.0) -> tuple:
    logits = torch.randn(batch, num_frames, num_tokens, generator=generator(seed)) * scale
    return from_odds(logits, torch.randn(batch, num_frames, generator=generator(seed + 1)))


def from_odds(logits: torch.Tensor, odds: torch.Tensor) -> tuple:
    """`logits, log_label, log_blank` where P(blank) = sigmoid(odds)."""
    log_label = torch.nn.functional.logsigmoid(-odds) - torch.logsumexp(logits.float(), -1)
    return logits, log_label, torch.nn.functional.logsigmoid(odds)


def hard_frames(name: str, batch: int, num_frames: int, num_tokens: int) -> tuple:
    """Frames that break careless code; ids near both ends of the vocabulary carry the mass."""
    logits, odds = torch.zeros(batch, num_frames, num_tokens), torch.zeros(batch, num_frames)
    if name == "flat":
        pass
    elif name == "peaky":
        peaks = torch.randint(0, num_tokens, (batch, num_frames, 1), generator=generator(3))
        logits.scatter_(2, peaks, 60.0)
        odds.fill_(-4)
    elif name == "repeats":
        logits[..., num_tokens - 1] = 40.0
    elif name == "repeats of the anchor":
        logits[..., ANCHOR] = 40.0
    elif name == "all blank":
        odds.fill_(torch.inf)
    elif name == "nearly all blank":
        odds.fill_(50.0)
    elif name == "no blank":
        logits = torch.randn(batch, num_frames, num_tokens, generator=generator(4)) * 4
        odds.fill_(-torch.inf)
    elif name == "no blank, one label":
        logits.fill_(-torch.inf)[..., num_tokens - 1] = 0.0
        odds.fill_(-torch.inf)
    elif name == "ties":
        logits[..., [2, num_tokens // 2, num_tokens - 1]] = 9.0
    elif name == "empty frames":
        logits = torch.randn(batch, num_frames, num_tokens, generator=generator(5)) * 4
        logits[:, ::2] = -torch.inf
    elif name == "blank of 0 and 1":
        logits = torch.randn(batch, num_frames, num_tokens, generator=generator(6)) * 4
        odds[:, ::2], odds[:, 1::2] = torch.inf, -torch.inf
    return from_odds(logits, odds)


HARD = [
    "flat",
    "peaky",
    "repeats",
    "repeats of the anchor",
    "all blank",
    "nearly all blank",
    "no blank",
    "no blank, one label",
    "ties",
    "empty frames",
    "blank of 0 and 1",
]


def markov_head(num_tokens: int, rank: int, scale: float = 0.7) -> tuple[torch.Tensor, torch.Tensor] | None:
    if rank == 0:
        return None
    w_in, w_out = torch.randn(2, num_tokens, rank, generator=generator(rank)) * (scale / rank**0.5) ** 0.5
    return w_in.contiguous(), w_out.contiguous()


def sampling_for(batch: int, num_labels: int, num_tokens: int, temperature: list[float]) -> ChainSampling:
    """Row b uses slot `batch - 1 - b` of `batch + 1`."""
    return ChainSampling(
        temperature=torch.tensor([*temperature, 1.0])[: batch + 1],
        seeds=torch.arange(batch + 1) * 1_000_003 - 2,
        positions=torch.arange(batch) * 17 + 2**32 - 3,
        slots=torch.arange(batch).flip(0),
        draft_logits=torch.full((batch + 1, num_labels, num_tokens), NEVER),
    )


def anchors(batch: int) -> torch.Tensor:
    return torch.full((batch,), ANCHOR)


# Brute force.


def prefix_probabilities(p: torch.Tensor) -> dict[tuple, float]:
    """P(the collapse starts with y) for every y: the sum over all alignments of p [T, V + 1], blank last."""
    blank, starts = p.shape[1] - 1, defaultdict(float)
    for alignment in itertools.product(range(p.shape[1]), repeat=p.shape[0]):
        labels = [s for s, _ in itertools.groupby(alignment) if s != blank]
        probability = p[range(p.shape[0]), alignment].prod().item()
        for length in range(len(labels) + 1):
            starts[tuple(labels[:length])] += probability
    return starts


SMALL = [(v, t, seed) for v in (1, 2, 3) for t in (1, 2, 3, 4, 5) for seed in (0, 1) if (v + 1) ** t <= 1024]


def small_frames(num_tokens: int, num_frames: int, seed: int) -> tuple:
    frames = random_frames(1, num_frames, num_tokens, seed=10 * seed + num_frames, scale=1.5)
    logits, log_label, log_blank = (x.double() for x in frames)
    p = torch.cat([(logits + log_label[..., None]).exp()[0], log_blank.exp()[0, :, None]], 1)
    return frames, prefix_probabilities(p)


@pytest.mark.parametrize("num_tokens, num_frames, seed", SMALL)
def test_greedy_chain_against_brute_force(num_tokens: int, num_frames: int, seed: int) -> None:
    frames, starts = small_frames(num_tokens, num_frames, seed)
    num_labels = num_frames + 2
    labels, lengths = prefix_chain(*frames, torch.tensor([0]), num_labels)
    prefix = ()
    for label in labels[0, : lengths[0]].tolist():
        best = max(starts[(*prefix, v)] for v in range(num_tokens))
        assert starts[(*prefix, label)] >= best * (1 - 1e-5) > 0
        prefix = (*prefix, label)
    if len(prefix) < num_labels:
        assert all(starts[(*prefix, v)] == 0 for v in range(num_tokens))
    assert labels[0, lengths[0] :].tolist() == [prefix[-1]] * (num_labels - len(prefix))
    assert (labels.dtype, lengths.dtype) == (torch.int64, torch.int32)


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("num_tokens, num_frames, seed", SMALL)
def test_draft_logits_against_brute_force(num_tokens: int, num_frames: int, seed: int, rank: int) -> None:
    frames, starts = small_frames(num_tokens, num_frames, seed)
    markov = markov_head(num_tokens, rank)
    sampling = sampling_for(1, num_frames, num_tokens, [1.3])
    labels, lengths = prefix_chain(*frames, torch.tensor([0]), num_frames, markov, sampling)
    prefix, last = (), 0
    for k in range(lengths.item()):
        q = torch.tensor([starts[(*prefix, v)] for v in range(num_tokens)], dtype=torch.float64) / starts[prefix]
        if markov is not None:
            q *= torch.exp(markov[1].double() @ markov[0][last].double())
        torch.testing.assert_close(sampling.draft_logits[0, k].double().exp(), q, rtol=1e-5, atol=0)
        last = labels[0, k].item()
        prefix = (*prefix, last)
    assert starts[prefix] > 0


# The fp64 oracle, for what is too large to enumerate.


def assert_follows_the_oracle(
    frames: tuple, row: int, labels: list[int], length: int, drafts: torch.Tensor, atol: float = 0.0
) -> None:
    """Every drafted conditional equals the oracle's, given the labels that were drafted, and the end is the same."""
    logits, log_label, log_blank = (x[row].double() for x in frames)
    log_p = torch.cat([logits + log_label[:, None], log_blank[:, None]], 1)
    log_p = log_p.masked_fill(torch.isneginf(torch.nn.functional.pad(logits, (0, 1))), -torch.inf).clamp_min(ctc.NEG)
    prefix = ctc.Prefix.root(log_p)
    for k, label in enumerate(labels):
        q = prefix.conditional(log_p).exp()
        if k >= length:
            assert not (q > max(IMPOSSIBLE, atol)).any()
            assert label == (labels[length - 1] if length else ANCHOR)
            one_hot = torch.full_like(drafts[k], -torch.inf)
            one_hot[label] = 0
            assert torch.equal(drafts[k], one_hot)
            continue
        torch.testing.assert_close(drafts[k].double().exp(), torch.where(q > IMPOSSIBLE, q, 0), rtol=1e-5, atol=atol)
        prefix = prefix.extend(log_p, label)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", HARD)
def test_hard_frames_against_the_oracle(name: str, temperature: float) -> None:
    frames = hard_frames(name, 2, 12, 37)
    sampling = sampling_for(2, 16, 37, [temperature] * 2)
    labels, lengths = prefix_chain(*frames, anchors(2), 16, sampling=sampling)
    for row in range(2):
        drafts = sampling.draft_logits[sampling.slots[row]]
        assert_follows_the_oracle(frames, row, labels[row].tolist(), lengths[row].item(), drafts)


@pytest.mark.parametrize("scale", [0.1, 3.0, 15.0])
def test_long_chains_against_the_oracle(scale: float) -> None:
    frames = random_frames(3, 32, 50, seed=8, scale=scale)
    sampling = sampling_for(3, 40, 50, [1.0, 0.0, 2.0])
    labels, lengths = prefix_chain(*frames, anchors(3), 40, sampling=sampling)
    assert (lengths <= 32).all()
    for row in range(3):
        drafts = sampling.draft_logits[sampling.slots[row]]
        # The forward vectors span the 38 decades of fp32: a label that needs more than that has lost them.
        assert_follows_the_oracle(frames, row, labels[row].tolist(), lengths[row].item(), drafts, atol=1e-15)


def expected_chain(name: str, num_frames: int, num_labels: int, num_tokens: int) -> list[int]:
    top = num_tokens - 1
    return {
        "repeats": [top] * num_labels,
        "repeats of the anchor": [ANCHOR] * num_labels,
        "all blank": [ANCHOR] * num_labels,
        "no blank, one label": [top] * num_labels,
    }[name]


@pytest.mark.parametrize(
    "name, length", [("repeats", 6), ("repeats of the anchor", 6), ("all blank", 0), ("no blank, one label", 1)]
)
def test_chains_known_in_advance(name: str, length: int) -> None:
    labels, lengths = prefix_chain(*hard_frames(name, 2, 12, 37), anchors(2), 6)
    assert labels.tolist() == [expected_chain(name, 12, 6, 37)] * 2
    assert lengths.tolist() == [length] * 2


def test_ties_go_to_the_lowest_index() -> None:
    labels, _ = prefix_chain(*hard_frames("ties", 1, 1, 37), anchors(1), 1)
    assert labels.tolist() == [[2]]


def test_the_anchor_is_under_no_repeat_rule_but_feeds_the_markov_head() -> None:
    frames = random_frames(1, 6, 9, seed=1)
    assert torch.equal(*(prefix_chain(*frames, torch.tensor([a]), 4)[0] for a in (0, 5)))
    w_in, w_out = torch.zeros(9, 1), torch.zeros(9, 1)
    w_in[5], w_out[7] = 1.0, 100.0
    markov = (w_in, w_out)
    assert prefix_chain(*frames, torch.tensor([5]), 1, markov)[0].item() == 7
    assert prefix_chain(*frames, torch.tensor([0]), 1, markov)[0].item() != 7


def test_frames_that_are_not_numbers_end_the_chain() -> None:
    logits, log_label, log_blank = random_frames(1, 6, 9, seed=1)
    sampling = sampling_for(1, 4, 9, [1.0])
    labels, lengths = prefix_chain(logits, log_label, log_blank * torch.nan, torch.tensor([5]), 4, sampling=sampling)
    assert labels[0, lengths[0] :].unique().numel() == 1
    labels, lengths = prefix_chain(logits * torch.nan, log_label, log_blank, torch.tensor([5]), 4, sampling=sampling)
    assert labels.tolist() == [[5] * 4] and lengths.tolist() == [0]
    assert not sampling.draft_logits.isnan().any()


# The law of the samples.


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_their_draft_logits(vary: str, temperature: float) -> None:
    rows, num_labels, num_tokens = 20_000, 3, 5
    frames = tuple(x.expand(rows, *x.shape[1:]) for x in random_frames(1, 5, num_tokens, seed=2, scale=1.0))
    varied, fixed = torch.arange(rows) * num_labels, torch.full((rows,), 41)
    sampling = ChainSampling(
        temperature=torch.full((rows,), temperature),
        seeds=varied if vary == "seeds" else fixed,
        positions=varied if vary == "positions" else fixed,
        slots=torch.arange(rows),
        draft_logits=torch.empty(rows, num_labels, num_tokens),
    )
    labels, _ = prefix_chain(*frames, anchors(rows), num_labels, markov_head(num_tokens, 5), sampling)
    statistic = freedom = 0.0
    for k in range(num_labels):
        # Given the labels before it, so that noise shared between steps would show.
        prefix_code = (labels[:, :k] * num_tokens ** torch.arange(k)).sum(1)
        for prefix in prefix_code.unique():
            members = prefix_code == prefix
            law = torch.softmax(sampling.draft_logits[members][:, k] / temperature, -1)
            assert torch.allclose(law, law[:1])
            expected = law[0] * members.sum()
            counts = torch.bincount(labels[members, k], minlength=num_tokens)
            usual = expected > 5
            statistic += ((counts - expected)[usual] ** 2 / expected[usual]).sum().item()
            freedom += usual.sum().item() - 1
    assert freedom > 50
    assert abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_greedy_rows_and_inert_rows_of_a_sampled_batch() -> None:
    frames = random_frames(3, 6, 40, seed=3)
    sampling = sampling_for(3, 4, 40, [0.0, 1.0, 0.0])
    sampling.slots[1] = -1
    labels, lengths = prefix_chain(*frames, anchors(3), 4, sampling=sampling)
    greedy, greedy_lengths = prefix_chain(*frames, anchors(3), 4)
    assert torch.equal(labels[[0, 2]], greedy[[0, 2]])
    assert torch.equal(lengths[[0, 2]], greedy_lengths[[0, 2]])
    assert ((labels >= 0) & (labels < 40)).all()
    # Rows 0 and 2 use slots 2 and 0; nobody writes to slot 1, nor to the last one, which is where -1 points.
    written = (sampling.draft_logits != NEVER).any(-1).any(-1)
    assert written.tolist() == [True, False, True, False]


# Triton.


def assert_triton_equals_reference(
    frames: tuple,
    num_labels: int,
    device: str,
    markov: tuple[torch.Tensor, torch.Tensor] | None = None,
    temperature: list[float] | None = None,
    inert: int | None = None,
) -> None:
    batch, _, num_tokens = frames[0].shape
    calls = []
    for run, where in ((prefix_chain_reference, "cpu"), (prefix_chain_triton, device)):
        sampling = None
        if temperature is not None:
            sampling = sampling_for(batch, num_labels, num_tokens, temperature)
            if inert is not None:
                sampling.slots[inert] = -1
            sampling = ChainSampling(*(x.to(where) for x in sampling))
        weights = None if markov is None else tuple(x.to(where) for x in markov)
        labels, lengths = run(*(x.to(where) for x in frames), anchors(batch).to(where), num_labels, weights, sampling)
        assert (labels.dtype, lengths.dtype) == (torch.int64, torch.int32)
        assert ((labels >= 0) & (labels < num_tokens)).all()
        calls.append((labels.cpu(), lengths.cpu(), None if sampling is None else sampling.draft_logits.cpu()))
    (labels, lengths, drafts), (triton_labels, triton_lengths, triton_drafts) = calls
    active = [row for row in range(batch) if row != inert]
    assert torch.equal(triton_labels[active], labels[active])
    assert torch.equal(triton_lengths[active], lengths[active])
    if temperature is not None:
        torch.testing.assert_close(triton_drafts, drafts, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [None, [1.0, 0.0]])
@pytest.mark.parametrize("name", HARD)
def test_triton_on_hard_frames(name: str, temperature: list[float] | None, triton_device: str) -> None:
    assert_triton_equals_reference(hard_frames(name, 2, 5, 300), 7, triton_device, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [5, 64])
@pytest.mark.parametrize("temperature", [None, [0.7, 1.0, 0.0]])
def test_triton_with_a_markov_head(
    rank: int, temperature: list[float] | None, dtype: torch.dtype, triton_device: str
) -> None:
    logits, log_label, log_blank = random_frames(3, 6, 300, seed=rank)
    # The interpreter's tl.dot multiplies the bit patterns of bfloat16: there the head of bf16 logits is fp16.
    head_dtype = torch.float16 if (dtype, triton_device) == (torch.bfloat16, "cpu") else dtype
    markov = tuple(x.to(head_dtype) for x in markov_head(300, rank, scale=3.0))
    assert_triton_equals_reference(
        (logits.to(dtype), log_label, log_blank), 4, triton_device, markov=markov, temperature=temperature
    )


@pytest.mark.parametrize("num_frames, num_labels", [(1, 1), (1, 3), (3, 8), (12, 2), (17, 3), (32, 2)])
def test_triton_for_any_number_of_frames_and_labels(num_frames: int, num_labels: int, triton_device: str) -> None:
    frames = random_frames(2, num_frames, 130, seed=num_frames)
    assert_triton_equals_reference(frames, num_labels, triton_device, temperature=[1.0, 0.0])


def test_triton_rows_of_more_than_one_group(triton_device: str) -> None:
    frames = random_frames(18, 3, 70, seed=9)
    temperature = [0.5, 0.0, 1.0] * 6
    assert_triton_equals_reference(frames, 2, triton_device, markov_head(70, 5), temperature, inert=17)


@pytest.mark.parametrize("inert", [0, 1])
def test_triton_inert_rows_write_nothing(inert: int, triton_device: str) -> None:
    frames = random_frames(2, 4, 300, seed=inert)
    assert_triton_equals_reference(frames, 6, triton_device, temperature=[1.0, 1.0], inert=inert)


def test_triton_on_a_slice_of_frames(triton_device: str) -> None:
    logits, log_label, log_blank = random_frames(2, 6, 40, seed=11)
    frames = (logits[:, 1:5], log_label[:, 1:5], log_blank[:, 1:5])
    moved = tuple(x.to(triton_device)[:, 1:5] for x in (logits, log_label, log_blank))
    expected = prefix_chain_reference(*frames, anchors(2), 4)
    got = prefix_chain_triton(*moved, anchors(2).to(triton_device), 4)
    assert torch.equal(got[0].cpu(), expected[0])
    assert torch.equal(got[1].cpu(), expected[1])


def test_triton_refuses_strided_inputs(triton_device: str) -> None:
    logits, log_label, log_blank = (x.to(triton_device) for x in random_frames(1, 4, 4, seed=0))
    anchor = anchors(1).to(triton_device)
    with pytest.raises(ValueError, match="contiguous in the vocabulary"):
        prefix_chain_triton(logits.mT, log_label, log_blank, anchor, 2)
    with pytest.raises(ValueError, match="contiguous Markov weights"):
        weights = torch.zeros(3, 4, device=triton_device).T
        prefix_chain_triton(logits, log_label, log_blank, anchor, 2, (weights, weights))
