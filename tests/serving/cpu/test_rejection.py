"""The rejection sampler, against vLLM's kernels."""

import math

import pytest
import torch

from vllm_ctc_spec.serving.cpu import rejection
from vllm_ctc_spec.serving.cpu.noise import philox_uniform

from ...oracle.fly import accepted_by_vllm
from ...releases import SINCE_33

MAX_REQS, STEPS = 8, 4
SIZES = [5, 5, 3, 5, 1, 5, 2, 5]  # logits rows of a request: its drafts and the bonus token
TEMPERATURES = torch.tensor([0.0, 1.0, 0.7, 1.3, 0.0, 1.0, 0.4, 1.0])


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def batch(vocab):
    """Arguments of `rejection_sample` with drafts that are often the target's choice."""
    bounds = torch.cat([ints([0]), ints(SIZES).cumsum(0)]).to(torch.int32)
    requests = torch.randperm(MAX_REQS).to(torch.int32)
    expanded = requests.repeat_interleave(ints(SIZES))
    local_pos = torch.cat([torch.arange(size) for size in SIZES]).to(torch.int32)
    sharpness = torch.tensor([0.3, 3.0, 30.0, 30.0])[expanded % 4]  # hopeless, uncertain and certain requests
    target = sharpness[:, None] * torch.randn(len(expanded), vocab)
    target[:, torch.randperm(vocab)[: vocab // 3]] = float("-inf")  # as after top-k or a grammar
    draft_logits = torch.randn(MAX_REQS, STEPS, vocab)
    drafts = torch.randint(vocab, (len(expanded),), dtype=torch.int32)
    for row in range(len(expanded) - 1):
        if local_pos[row] < local_pos[row + 1]:
            request, step = expanded[row], local_pos[row]
            draft_logits[request, step] = 0.7 * target[row] + 0.3 * draft_logits[request, step]
            good = target[row].argmax() if torch.rand(()) < 0.6 else target[row].softmax(0).multinomial(1)[0]
            drafts[row + 1] = good if torch.rand(()) < 0.93 else -1 if torch.rand(()) < 0.5 else drafts[row + 1]
    positions = torch.randint(1000, (len(expanded),))
    seeds = torch.randint(-(2**62), 2**62, (MAX_REQS,))
    return target, draft_logits, drafts, bounds, positions, requests, expanded, local_pos, TEMPERATURES, seeds, STEPS


def same_tokens(both, *args, **kwargs):
    """Compare what `rejection_sample` leaves on both sides, its unused slots aside; the numbers of accepted drafts."""
    outcomes = both("spec_decode.rejection_sampler_utils.rejection_sample", *args, **kwargs)
    (their_tokens, their_counts), (our_tokens, our_counts) = (outcome.result for outcome in outcomes)
    assert our_counts.tolist() == their_counts.tolist()
    for ours, theirs, count in zip(our_tokens.tolist(), their_tokens.tolist(), our_counts.tolist(), strict=True):
        assert ours[:count] == theirs[:count]
    return (our_counts - 1).tolist()


@pytest.mark.parametrize("mode", ["standard", "block", "synthetic"])
@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("vocab, use_fp64", [(300, True), (9000, False)])
def test_rejection_sample(both, mode, one_hot, vocab, use_fp64):
    torch.manual_seed(vocab + 2 * one_hot + len(mode))
    rates = torch.tensor([0.95, 0.9, 0.9, 0.8]) if mode == "synthetic" else None
    accepted = []
    for _ in range(2):
        # 9000 is more than one block of the statistics and of the resampling.
        target, draft_logits, *rest = batch(vocab)
        if one_hot:
            draft_logits = None
        accepted += same_tokens(both, target, draft_logits, *rest, rates, use_fp64, mode == "block")
    assert {0, STEPS} < set(accepted), "the cases should cover rejection and full acceptance"


@pytest.mark.parametrize("draft_vocab", [280, 320])
def test_draft_vocabulary_of_another_size(both, draft_vocab):
    """vLLM verifies the common part."""
    torch.manual_seed(0)
    target, draft_logits, drafts, *rest = batch(300)
    draft_logits = torch.nn.functional.pad(draft_logits, (0, draft_vocab - 300), value=0.0)
    drafts = drafts.clamp(max=270)
    same_tokens(both, target, draft_logits, drafts, *rest)


def test_block_verification_resamples_after_accepted_drafts(both):
    """Drafts drawn from the drafter's own, different distribution: the residual then depends on the joint ratio."""
    torch.manual_seed(0)
    num_reqs, size, vocab = 24, STEPS + 1, 12
    rows = num_reqs * size
    draft_logits = torch.randn(num_reqs, STEPS, vocab)
    drafts = torch.zeros(num_reqs, size, dtype=torch.int32)
    drafts[:, 1:] = draft_logits.softmax(-1).view(-1, vocab).multinomial(1).view(num_reqs, STEPS)
    requests = torch.arange(num_reqs, dtype=torch.int32)
    accepted = same_tokens(
        both, torch.randn(rows, vocab), draft_logits, drafts.view(-1), ints(range(0, rows + 1, size)),
        torch.randint(1000, (rows,)), requests, requests.repeat_interleave(size),
        torch.arange(size, dtype=torch.int32).repeat(num_reqs), torch.ones(num_reqs), torch.arange(num_reqs), STEPS,
        None, False, True,
    )  # fmt: skip
    assert set(accepted) >= {1, 2, 3}


def test_gather_draft_sampled(agree):
    # Request 2 is past its prefill, request 0 starts in it, request 4 on its very end.
    ours = agree(
        "spec_decode.rejection_sampler.gather_draft_sampled", torch.randint(900, (30,), dtype=torch.int32),
        torch.cat([torch.arange(40, 50), torch.arange(8, 18), torch.arange(12, 22)]),
        ints([7, 8, 9, 17, 18, 19, 20, 29], torch.int64), ints([2, 2, 2, 0, 0, 0, 4, 4]),
        ints([0, 1, 2, 0, 1, 2, 0, 1]), ints([16, 0, 20, 0, 12]),
    )  # fmt: skip
    assert (ours.result[0] == -1).tolist() == [False, False, False, False, True, True, False, False]


def test_flatten_sampled(agree):
    agree(
        "spec_decode.rejection_sampler._flatten_sampled_kernel", torch.zeros(9, dtype=torch.int64),
        torch.randint(900, (3, 5)), 5, ints([2, 1, 3]), ints([0, 5, 6, 9]), num_warps=1, grid=(3,),
    )  # fmt: skip


@pytest.mark.skipif(not SINCE_33, reason="vLLM 0.32 does not know FLy")
@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_fly(both, one_hot, window):
    torch.manual_seed(window)
    accepted = []
    for threshold in (0.0, 0.3, 0.8):
        for _ in range(3):
            target, draft_logits, *rest = batch(300)
            accepted += same_tokens(
                both, target, None if one_hot else draft_logits, *rest, fly_window_size=window,
                fly_entropy_threshold=threshold, fly_entropy_top_k=3,
            )  # fmt: skip
    assert {0, STEPS} < set(accepted)


@pytest.mark.parametrize("is_greedy", [True, False])
@pytest.mark.parametrize("one_hot", [True, False])
def test_fly_accepts_as_vllm_does(is_greedy, one_hot):
    """vLLM's loop, retyped (tests/oracle/fly.py), with the same uniform numbers."""
    torch.manual_seed(0)
    num_requests, steps, vocab, window, threshold = 2500, 8, 5, 2, 0.4
    rows = num_requests * (1 + steps)
    target = 2 * torch.randn(rows, vocab)
    target[torch.rand(rows, vocab) < 0.1] = float("-inf")
    target[:, 0] = target[:, 0].clamp_min(-4)
    draft_logits = None
    drafts = torch.where(torch.rand(rows) < 0.7, target.roll(1, 0).argmax(-1), torch.randint(-1, vocab, (rows,))).int()
    if not one_hot:
        draft_logits = torch.randn(num_requests, steps, vocab)
        draft_logits[torch.rand(draft_logits.shape) < 0.1] = float("-inf")
    bounds = torch.arange(0, rows + 1, 1 + steps, dtype=torch.int32)
    positions, seeds = torch.randint(1000, (rows,)), torch.randint(-(2**62), 2**62, (num_requests,))
    entropies = torch.rand(rows)
    target_log_p, temperature = target.log_softmax(-1), torch.full((num_requests,), 0.0 if is_greedy else 1.0)
    draft_log_p = None if one_hot else draft_logits.log_softmax(-1)

    sampled = torch.zeros(num_requests, 1 + steps, dtype=torch.int64)
    accepted, target_sums, draft_sums = torch.zeros(num_requests, dtype=torch.int32), *torch.zeros(2, num_requests)
    of_draft = draft_logits.logsumexp(-1) if not one_hot else torch.zeros(num_requests, steps)
    of_draft = torch.cat([of_draft, torch.zeros(num_requests, 1)], 1).view(rows, 1)
    no_maximum, ones = torch.zeros(rows, 1), torch.ones(rows, 1)
    rejection.rejection(
        sampled, 0, accepted, target_sums, draft_sums, target, 0, target.argmax(-1, keepdim=True), 0,
        target.logsumexp(-1, keepdim=True), 0, ones, 0, drafts, draft_logits, 0, 0, of_draft, 0, ones, 0, bounds,
        torch.arange(num_requests), temperature, seeds, positions, None, no_maximum, no_maximum, 0, 1, 1,
        not one_hot, False, False, entropies, threshold, window,
    )  # fmt: skip

    loosely = 0
    for request in range(num_requests):
        first = int(bounds[request])
        tokens = drafts[first + 1 : first + 1 + steps].tolist()
        native, possible = [], []
        for step, token in enumerate(tokens):
            p = float(target_log_p[first + step, token])
            q = 0.0 if one_hot else float(draft_log_p[request, step, token])
            uniform = float(philox_uniform(int(seeds[request]), int(positions[first + step])))
            is_best = token == int(target[first + step].argmax())
            native.append(is_best if is_greedy else p > math.log(uniform) + q)
            possible.append(p > -math.inf and (is_greedy or q > -math.inf))
        hesitation = entropies[first : first + steps].tolist()
        expected = accepted_by_vllm(tokens, native, possible, hesitation, window, threshold)
        assert accepted[request] == expected
        assert sampled[request, :expected].tolist() == tokens[:expected]
        if is_greedy and expected < steps:
            assert sampled[request, expected] == target[first + expected].argmax()
        loosely += False in (native[step] for step in range(expected))
    assert loosely > 30
