"""Sampling options and log probabilities, against vLLM's kernels.

Vocabularies are larger than one block of the kernel in question and no multiple of it.
"""

from types import SimpleNamespace

import pytest
import torch

MAX_REQS, VOCAB = 5, 1500
NEG_INF = float("-inf")
# Requests of five logits rows: request 3 has a last token and two drafts.
REQUESTS, LOCAL_POS = torch.tensor([3, 3, 3, 0, 4], dtype=torch.int32), torch.tensor([0, 1, 2, 0, 0], dtype=torch.int32)


def ints(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def logits():
    logits = 3 * torch.randn(5, VOCAB)
    logits[1, ::3] = NEG_INF
    return logits


@pytest.mark.parametrize("use_fp64", [False, True])
@pytest.mark.parametrize("is_drafting", [False, True])
@pytest.mark.parametrize("apply_temperature", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gumbel_sample(agree, use_fp64, is_drafting, apply_temperature, dtype):
    rows = 40
    requests = torch.arange(rows) % (MAX_REQS + 1) - 1  # with padding rows
    ours = agree(
        "sample.gumbel.gumbel_sample", torch.randn(rows, VOCAB).to(dtype), requests,
        torch.tensor([0.0, 1.0, 0.5, 2.0, 0.9]), ints([1, 2**40 + 5, -3, 2**63 - 1, 0], torch.int64),
        torch.randint(2**20, (rows,)), apply_temperature, is_drafting, use_fp64=use_fp64,
    )  # fmt: skip
    assert len(set(ours.result.tolist())) > rows / 2


@pytest.mark.parametrize("per_token_column", [False, True])
def test_gumbel_sample_keeps_the_logits_of_drafts(agree, per_token_column):
    column = ints([0, 1, 2, 1, 0]) if per_token_column else ints(2)
    logits = torch.randn(5, VOCAB)
    ours = agree(
        "sample.gumbel.gumbel_sample", logits, ints([0, 1, 2, -1, 4]), torch.tensor([0.0, 1.0, 0.5, 2.0, 0.9]),
        torch.arange(MAX_REQS), torch.arange(5), True, True, torch.zeros(MAX_REQS, 3, VOCAB + 7), column,
    )  # fmt: skip
    cache = ours.args[7]
    assert torch.equal(cache[2, 2, :VOCAB], logits[2])
    assert not cache[3].any()


def test_temperature(agree, logits):
    temperature = torch.tensor([0.0, 2.0, 2.0, 0.3, 1.0])
    ours = agree("sample.gumbel.apply_temperature", logits, REQUESTS, temperature)
    assert torch.equal(ours.args[0][3:], logits[3:])


def test_min_p(agree, logits):
    ours = agree("sample.min_p.apply_min_p", logits, REQUESTS, torch.tensor([0.0, 0.9, 0.9, 0.01, 0.5]))
    assert torch.equal(ours.args[0][3], logits[3]) and (ours.args[0][4] == NEG_INF).any()


@pytest.mark.parametrize("penalty", ["repetition", "frequency", "presence", "all", "none"])
def test_penalties(agree, logits, penalty):
    def values(name, neutral):
        active = torch.tensor([1.7, neutral, neutral, 0.6, neutral])
        return active if penalty in (name, "all") else torch.full((MAX_REQS,), neutral)

    token_ids = torch.randint(VOCAB, (5,), dtype=torch.int32)
    token_ids[2] = token_ids[1]  # a draft twice
    prompt_bits = torch.randint(-(2**31), 2**31, (MAX_REQS, (VOCAB + 31) // 32), dtype=torch.int32)
    counts = torch.randint(3, (MAX_REQS, VOCAB), dtype=torch.int32)
    ours = agree(
        "sample.penalties.apply_penalties", logits, REQUESTS, token_ids, LOCAL_POS, values("repetition", 1.0),
        values("frequency", 0.0), values("presence", 0.0), prompt_bits, counts,
    )  # fmt: skip
    assert torch.equal(ours.args[0], logits) == (penalty == "none")
    assert torch.equal(ours.args[8], counts)


def test_bincount(agree):
    prompt_len, prefill_len = ints([30, 0, 1100, 7, 5]), ints([30, 0, 1300, 20, 5])
    agree(
        "sample.penalties.bincount", ints([2, 3, 0], torch.int64),
        torch.randint(VOCAB, (MAX_REQS, 1400), dtype=torch.int32), prompt_len, prefill_len,
        torch.randint(9, (MAX_REQS, (VOCAB + 31) // 32), dtype=torch.int32),
        torch.randint(9, (MAX_REQS, VOCAB), dtype=torch.int32), 1300,
    )  # fmt: skip


@pytest.mark.parametrize("check_all_masked", [False, True])
def test_logit_bias(agree, check_all_masked):
    def distinct_ids():
        return torch.stack([torch.randperm(VOCAB)[:16] for _ in range(MAX_REQS)]).to(torch.int32)

    logits, stop_ids, allowed_ids = torch.randn(5, VOCAB), distinct_ids(), distinct_ids()
    # Request 3 may emit nothing but its stop tokens, and they are masked before its minimal length.
    stop_ids[3, :4] = allowed_ids[3, :4]
    logits[1, stop_ids[3, 0]] = NEG_INF
    ours = agree(
        "sample.logit_bias.apply_logit_bias", logits, REQUESTS, ints([10, 11, 30, 8, 9], torch.int64),
        ints([0, 0, 0, 4, 7]), allowed_ids, ints([3, 0, 0, 0, 16]), distinct_ids(), torch.randn(MAX_REQS, 16),
        ints([10, 0, 0, 20, 0]), ints([3, 0, 0, 4, 2]), ints([1, 0, 0, 1, 0]), stop_ids, check_all_masked,
    )  # fmt: skip
    left = (ours.args[0] > NEG_INF).sum(1).tolist()
    assert left == ([4, 3, 4] if check_all_masked else [0, 0, 4]) + [VOCAB - 3, 7] or left[3] == VOCAB


def test_bad_words(agree):
    output = [21, 5, 6, 21, 5]
    all_token_ids = torch.full((MAX_REQS, 20), 9, dtype=torch.int32)
    all_token_ids[:, 3:8] = ints(output)  # after a prompt of three tokens
    words = [[7], [5, 30], [21, 5, 31], [6, 5, 32], [5, 6, 33], [9, 21, 5, 6, 21, 5, 34], [8, 35], [5, 8, 36]]
    word_ids = torch.zeros(MAX_REQS, 64, dtype=torch.int32)
    offsets = torch.zeros(MAX_REQS, 12, dtype=torch.int32)
    for request in (3, 0):
        flat = [token for word in words for token in word]
        word_ids[request, : len(flat)] = ints(flat)
        offsets[request, 1 : len(words) + 1] = ints([len(word) for word in words]).cumsum(0)
    input_ids = ints([5, 6, 8, 5, 5])  # the drafts of request 3 are 6 and 8
    ours = agree(
        "sample.bad_words.apply_bad_words", torch.zeros(5, VOCAB), REQUESTS, word_ids, offsets, ints([8, 0, 0, 8, 0]),
        all_token_ids, ints([3] * MAX_REQS), ints([8] * MAX_REQS), input_ids, LOCAL_POS, 8,
    )  # fmt: skip
    masked = [(row == NEG_INF).nonzero().flatten().tolist() for row in ours.args[0]]
    assert masked == [[7, 30, 31], [7, 33], [7, 35], [7, 30, 31], []]


@pytest.mark.parametrize("is_first_look", [True, False])
@pytest.mark.parametrize(
    ("begin", "natural_end", "forced"),
    [([1], [2], [2]), ([1, 3], [2, 4], [5, 3, 2, 4])],
    ids=["one token each", "several tokens each"],
)
def test_thinking_budget(agree, begin, natural_end, forced, is_first_look):
    """Requests of few different tokens, so that markers, parts of them and forced ends are everywhere. The first look
    at request 0 reads two blocks; request 4 is shorter than what was seen of the one that had its slot."""
    num_forced = 0
    for _ in range(6):
        all_token_ids = torch.randint(1, 7, (MAX_REQS, 1500), dtype=torch.int32)
        total_len = ints([1200, 0, 0, torch.randint(2, 40, ()).item(), 12])
        all_token_ids[0, 100:] = 9
        last_start, last_end, scanned = (torch.full((MAX_REQS,), value, dtype=torch.int32) for value in (-1, -1, 0))
        if not is_first_look:
            last_start[3], last_end[3], scanned[3], scanned[4] = 1, 0, max(int(total_len[3]) - 5, 1), 20
        ours = agree(
            "sample.thinking_budget.apply_thinking_budget", torch.zeros(5, VOCAB), ints([3, 0, 4], torch.int64),
            REQUESTS, ints([9, -1, -1, 1, 3]), all_token_ids, total_len, torch.randint(1, 7, (5,), dtype=torch.int32),
            LOCAL_POS, last_start, last_end, scanned, ints(begin), ints(natural_end), ints(forced),
        )  # fmt: skip
        rows, tokens = (ours.args[0] > 0).nonzero(as_tuple=True)
        assert len(set(rows.tolist())) == len(rows) and set(tokens.tolist()) <= set(forced)
        num_forced += len(rows)
    assert 4 < num_forced < 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grammar_bitmask(agree, dtype):
    stride = 4
    # Request 0 has three rows, request 1 has two of which one mask was trimmed, request 2 has no grammar.
    masks = torch.randint(-(2**31), 2**31, (5, (VOCAB + 31) // 32), dtype=torch.int32)
    ours = agree(
        "structured_outputs._apply_grammar_bitmask_kernel", torch.randn(6, VOCAB).to(dtype), VOCAB,
        ints([0, 1, 2, stride, stride + 2]), ints([0, 3, 5, 6]), masks, masks.stride(0), VOCAB, MASK_STRIDE=stride,
        BLOCK_SIZE=1024, grid=(5, 2),
    )  # fmt: skip
    assert [(row == NEG_INF).any().item() for row in ours.args[0]] == [True, True, True, True, False, False]


def test_num_nans(agree, logits):
    logits[2, 5:9], logits[4, -1] = float("nan"), float("nan")
    assert agree("metrics.logits.get_num_nans", logits).result.tolist() == [0, 0, 4, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs(agree, logits, dtype):
    token_ids = torch.randint(VOCAB, (5, 7))
    agree("sample.logprob.compute_token_logprobs", logits.to(dtype), token_ids)


@pytest.mark.parametrize("num_logprobs", [0, 4])
@pytest.mark.parametrize("max_token_ids", [0, 6])
@pytest.mark.parametrize("logits_mode", [False, True])
def test_topk_scores(agree, num_logprobs, max_token_ids, logits_mode):
    state = SimpleNamespace(
        num_token_ids=SimpleNamespace(gpu=ints([6, 0, 0, 0, 2])),
        token_ids=SimpleNamespace(gpu=torch.randint(VOCAB, (MAX_REQS, 16), dtype=torch.int32)),
    )
    requests = torch.cat([REQUESTS, ints([1, 0])])  # more rows than requests
    agree(
        "sample.logprob.compute_topk_scores", torch.randn(7, VOCAB), num_logprobs, torch.randint(VOCAB, (7,)), None,
        state, requests, max_token_ids, logits_mode,
    )  # fmt: skip


def test_rank_of_a_tie_counts_every_equal_token(agree):
    logits = torch.randint(5, (5, VOCAB)).float()
    agree("sample.logprob.compute_topk_scores", logits, 0, torch.randint(VOCAB, (5,)))


def test_prompt_logprobs_token_ids(agree):
    agree(
        "sample.prompt_logprob.get_prompt_logprobs_token_ids", 12, ints([0, 5, 6, 12]), ints([2, 0, 4]),
        ints([30, 0, 0, 0, 7]), torch.randint(VOCAB, (MAX_REQS, 64), dtype=torch.int32),
    )  # fmt: skip
