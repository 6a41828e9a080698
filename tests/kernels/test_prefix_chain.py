"""The chain: brute force over all alignments, then the fp64 oracle, then the law of the samples."""

from collections import Counter

import pytest
import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels.contract import IMPOSSIBLE, ChainSampling, Frames
from vllm_ctc_spec.kernels.prefix_chain import chain_log_q, prefix_chain

from ..oracle.chi_square import chi_square, upper_tail
from ..oracle.enumeration import alignment_masses
from ..oracle.frames import (
    ANCHOR,
    HARD,
    NEVER,
    TRANSITIONS,
    anchors,
    hard_frames,
    log_probs,
    log_transitions,
    markov_head,
    random_frames,
    sampling_for,
    token_frames,
    transitions_between,
    whole_chain,
)

# Brute force.


SMALL = [(v, t, seed) for v in (1, 2, 3) for t in (1, 2, 3, 4, 5) for seed in (0, 1) if (v + 1) ** t <= 1024]


def small_frames(num_tokens: int, num_frames: int, seed: int) -> tuple[Frames, dict[tuple, float]]:
    """The anchor is token 0: there may be no other."""
    frames = random_frames(1, num_frames, num_tokens, seed=10 * seed + num_frames, scale=1.5)
    return frames._replace(anchor=torch.tensor([0])), alignment_masses(log_probs(frames, 0))[0]


@pytest.mark.parametrize("num_tokens, num_frames, seed", SMALL)
def test_greedy_chain_against_brute_force(num_tokens: int, num_frames: int, seed: int) -> None:
    frames, starts = small_frames(num_tokens, num_frames, seed)
    num_labels = num_frames + 2
    labels, lengths = whole_chain(frames, num_labels)
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
    labels, lengths = whole_chain(frames._replace(markov=markov), num_frames, sampling)
    prefix, last = (), 0
    for k in range(lengths.item()):
        q = torch.tensor([starts[(*prefix, v)] for v in range(num_tokens)], dtype=torch.float64) / starts[prefix]
        if markov is not None:
            q *= torch.exp(markov[1].double() @ markov[0][last].double())
        torch.testing.assert_close(sampling.draft_logits[0, k].double().exp(), q, rtol=1e-5, atol=0)
        last = labels[0, k].item()
        prefix = (*prefix, last)
    assert starts[prefix] > 0


@pytest.mark.parametrize("temperature", [None, [1.0]])
def test_an_anchor_that_is_no_label_is_a_row_of_the_head_alone(temperature: list[float] | None) -> None:
    """As if the frames had that label too, and never held it."""
    frames, (w_in, w_out) = random_frames(1, 5, 40, seed=2), markov_head(41, 5)
    wide = torch.nn.functional.pad(frames.logits, (0, 1), value=-torch.inf)
    chains = []
    for logits, outer in ((frames.logits, w_out[:40]), (wide, w_out)):
        sampling = None if temperature is None else sampling_for(1, 4, logits.shape[2], temperature)
        given = frames._replace(logits=logits, anchor=torch.tensor([40]), markov=(w_in, outer))
        chains.append(whole_chain(given, 4, sampling))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*chains, strict=True))


@pytest.mark.parametrize("temperature", [None, [1.0]])
def test_a_chain_that_ends_at_the_root_is_filled_with_a_label(temperature: list[float] | None) -> None:
    frames = hard_frames("all blank", 1, 3, 10)
    sampling = None if temperature is None else sampling_for(1, 2, 10, temperature)
    for anchor, fill in ((10, 9), (4, 4)):
        labels, lengths = whole_chain(frames._replace(anchor=torch.tensor([anchor])), 2, sampling)
        assert labels.tolist() == [[fill, fill]] and lengths.tolist() == [0]
        if sampling is not None:
            assert torch.equal(sampling.draft_logits[0].exp(), torch.eye(10)[[fill, fill]])


# The fp64 oracle, for what is too large to enumerate.


def assert_follows_the_oracle(
    frames: Frames, row: int, labels: list[int], length: int, drafts: torch.Tensor, atol: float = 0.0
) -> None:
    """Every drafted conditional equals the oracle's, given the labels that were drafted, and the end is the same."""
    log_p = log_probs(frames, row)
    prefix = oracle.root_prefix(log_p, log_transitions(frames, row))
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
    labels, lengths = whole_chain(frames, 16, sampling)
    for row in range(2):
        drafts = sampling.draft_logits[sampling.requests[row]]
        assert_follows_the_oracle(frames, row, labels[row].tolist(), lengths[row].item(), drafts)


@pytest.mark.parametrize("scale", [0.1, 3.0, 15.0])
def test_long_chains_against_the_oracle(scale: float) -> None:
    frames = random_frames(3, 32, 50, seed=8, scale=scale)
    sampling = sampling_for(3, 40, 50, [1.0, 0.0, 2.0])
    labels, lengths = whole_chain(frames, 40, sampling)
    assert (lengths <= 32).all()
    for row in range(3):
        drafts = sampling.draft_logits[sampling.requests[row]]
        # The forward vectors span the 38 decades of fp32: a label that needs more than that has lost them.
        assert_follows_the_oracle(frames, row, labels[row].tolist(), lengths[row].item(), drafts, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_frames", [1, 5, 12, 32])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions_against_the_oracle(name: str, num_frames: int, temperature: float) -> None:
    frames = token_frames(2, num_frames, 37, seed=3)._replace(transitions=transitions_between(name, 2, num_frames))
    sampling = sampling_for(2, 16, 37, [temperature] * 2)
    labels, lengths = whole_chain(frames, 16, sampling)
    for row in range(2):
        drafts = sampling.draft_logits[sampling.requests[row]]
        assert_follows_the_oracle(frames, row, labels[row].tolist(), lengths[row].item(), drafts)


@pytest.mark.parametrize("rank", [0, 5])
def test_slots_are_frames_one_by_one(rank: int) -> None:
    """The cross-entropy twin: label k is the best token of frame k, the head's bias included."""
    frames, markov = token_frames(3, 6, 40, seed=5), markov_head(40, rank, scale=3.0)
    sampling = sampling_for(3, 8, 40, [0.0] * 3)
    frames = frames._replace(markov=markov, transitions=transitions_between("slots", 3, 6))
    labels, lengths = whole_chain(frames, 8, sampling)
    assert lengths.tolist() == [6] * 3
    last = anchors(3)
    for k in range(6):
        scores = frames.logits[:, k] + frames.log_scale[:, k, None]
        if markov is not None:
            scores = scores + markov[0][last] @ markov[1].T
        assert torch.equal(labels[:, k], scores.argmax(1))
        drafts = sampling.draft_logits[sampling.requests, k]
        torch.testing.assert_close(drafts, scores, rtol=0, atol=5e-6)  # nothing is lost from label to label
        last = labels[:, k]
    assert torch.equal(labels[:, 6:], last[:, None].expand(-1, 2))


def test_transitions_are_under_no_repeat_rule_and_have_no_blank() -> None:
    frames = hard_frames("repeats", 2, 12, 37)._replace(
        log_blank=torch.full((2, 12), torch.nan),  # nobody reads it
        transitions=transitions_between("slots", 2, 12),
    )
    labels, lengths = whole_chain(frames, 14)
    assert labels.tolist() == [[36] * 14] * 2 and lengths.tolist() == [12] * 2


@pytest.mark.parametrize(
    "name, label, length",
    [
        ("repeats", 36, 6),
        ("repeats of the anchor", ANCHOR, 6),
        ("all blank", ANCHOR, 0),
        ("no blank, one label", 36, 1),
    ],
)
def test_chains_known_in_advance(name: str, label: int, length: int) -> None:
    labels, lengths = whole_chain(hard_frames(name, 2, 12, 37), 6)
    assert labels.tolist() == [[label] * 6] * 2
    assert lengths.tolist() == [length] * 2


def test_ties_go_to_the_lowest_index() -> None:
    labels, _ = whole_chain(hard_frames("ties", 1, 1, 37), 1)
    assert labels.tolist() == [[2]]


def test_the_anchor_is_under_no_repeat_rule_but_feeds_the_markov_head() -> None:
    frames = random_frames(1, 6, 9, seed=1)
    behind_0, behind_5 = (frames._replace(anchor=torch.tensor([a])) for a in (0, 5))
    assert torch.equal(whole_chain(behind_0, 4)[0], whole_chain(behind_5, 4)[0])
    w_in, w_out = torch.zeros(9, 1), torch.zeros(9, 1)
    w_in[5], w_out[7] = 1.0, 100.0
    markov = (w_in, w_out)
    assert whole_chain(behind_5._replace(markov=markov), 1)[0].item() == 7
    assert whole_chain(behind_0._replace(markov=markov), 1)[0].item() != 7


def test_frames_that_are_not_numbers_end_the_chain() -> None:
    frames = random_frames(1, 6, 9, seed=1)._replace(anchor=torch.tensor([5]))
    sampling = sampling_for(1, 4, 9, [1.0])
    labels, lengths = whole_chain(frames._replace(log_blank=frames.log_blank * torch.nan), 4, sampling)
    assert labels[0, lengths[0] :].unique().numel() == 1
    labels, lengths = whole_chain(frames._replace(logits=frames.logits * torch.nan), 4, sampling)
    assert labels.tolist() == [[5] * 4] and lengths.tolist() == [0]
    assert not sampling.draft_logits.isnan().any()


# The law of the samples.


@pytest.mark.parametrize("vary", ["seeds", "positions"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_samples_follow_their_draft_logits(vary: str, temperature: float) -> None:
    rows, num_labels, num_tokens = 20_000, 3, 5
    frames = Frames(*(x.expand(rows, *x.shape[1:]) for x in random_frames(1, 5, num_tokens, seed=2, scale=1.0)[:4]))
    varied, fixed = torch.arange(rows) * num_labels, torch.full((rows,), 41)
    sampling = ChainSampling(
        temperature=torch.full((rows,), temperature),
        seeds=varied if vary == "seeds" else fixed,
        positions=varied if vary == "positions" else fixed,
        requests=torch.arange(rows),
        draft_logits=torch.empty(rows, num_labels, num_tokens),
    )
    labels, _ = whole_chain(frames._replace(markov=markov_head(num_tokens, 5)), num_labels, sampling)
    statistic, freedom = 0.0, 0
    for k in range(num_labels):
        # Given the labels before it, so that noise shared between steps would show.
        prefix_code = (labels[:, :k] * num_tokens ** torch.arange(k)).sum(1)
        for prefix in prefix_code.unique():
            members = prefix_code == prefix
            law = torch.softmax(sampling.draft_logits[members][:, k] / temperature, -1)
            assert torch.allclose(law, law[:1])
            of_prefix = chi_square(Counter(labels[members, k].tolist()), dict(enumerate(law[0].tolist())))
            statistic, freedom = statistic + of_prefix[0], freedom + of_prefix[1]
    assert freedom > 50
    assert 1e-5 < upper_tail(statistic, freedom) < 1 - 1e-5


def test_greedy_rows_and_inert_rows_of_a_sampled_batch() -> None:
    frames = random_frames(3, 6, 40, seed=3)
    sampling = sampling_for(3, 4, 40, [0.0, 1.0, 0.0])
    sampling.requests[1] = -1
    labels, lengths = whole_chain(frames, 4, sampling)
    greedy, greedy_lengths = whole_chain(frames, 4)
    assert torch.equal(labels[[0, 2]], greedy[[0, 2]])
    assert torch.equal(lengths[[0, 2]], greedy_lengths[[0, 2]])
    assert ((labels >= 0) & (labels < 40)).all()
    # Rows 0 and 2 use slots 2 and 0; nobody writes to slot 1, nor to the last one, which is where -1 points.
    written = (sampling.draft_logits != NEVER).any(-1).any(-1)
    assert written.tolist() == [True, False, True, False]


# Candidates.


LATTICES = pytest.mark.parametrize("name", [None, *TRANSITIONS])


def candidate_frames(name: str | None, batch: int, num_frames: int, num_tokens: int, seed: int) -> Frames:
    if name is None:
        return random_frames(batch, num_frames, num_tokens, seed=seed)
    frames = token_frames(batch, num_frames, num_tokens, seed=seed)
    return frames._replace(transitions=transitions_between(name, batch, num_frames))


@pytest.mark.parametrize("rank", [0, 5])
@LATTICES
def test_candidates_have_their_law_among_all_tokens_and_others_none(name: str | None, rank: int) -> None:
    """The best 3 of each frame: `ell` is that of the whole vocabulary behind the same labels."""
    frames = candidate_frames(name, 4, 6, 40, seed=4)._replace(markov=markov_head(40, rank))
    ranked = frames.logits.topk(3, 2).indices.flatten(1)
    sampling = sampling_for(4, 5, 40, [1.0, 0.7, 0.0, 1.0])
    labels, lengths = prefix_chain(frames, 5, 3, sampling)
    seen = 0
    for row, slot in enumerate(sampling.requests.tolist()):
        log_p, last = log_probs(frames, row), int(frames.anchor[row])
        prefix = oracle.root_prefix(log_p, log_transitions(frames, row))
        is_candidate = torch.zeros(40, dtype=torch.bool).index_fill(0, ranked[row], True)
        for k, label in enumerate(labels[row, : lengths[row]].tolist()):
            ell = prefix.conditional(log_p)
            possible = is_candidate & (ell.exp() > IMPOSSIBLE)
            if rank:
                ell = ell + frames.markov[1].double() @ frames.markov[0][last].double()
            draft = sampling.draft_logits[slot, k]
            torch.testing.assert_close(draft[possible].double(), ell[possible], rtol=0, atol=1e-4)
            assert (draft[~is_candidate] == -torch.inf).all() and is_candidate[label]
            prefix, last, seen = prefix.extend(log_p, label), label, seen + 1
    assert (seen > 0) == (name != "nowhere")


@pytest.mark.parametrize("rank", [0, 5])
@LATTICES
def test_the_law_of_given_labels_is_that_of_the_samples(name: str | None, rank: int) -> None:
    frames = candidate_frames(name, 6, 5, 30, seed=7)._replace(markov=markov_head(30, rank))
    sampling = sampling_for(6, 4, 30, [1.0] * 6)
    labels, lengths = prefix_chain(frames, 4, 4, sampling)
    log_q = chain_log_q(frames, labels, 4)
    laws = sampling.draft_logits[sampling.requests].log_softmax(2)
    expected = laws.gather(2, labels[..., None])[..., 0]
    ended = torch.arange(4) >= lengths[:, None]
    torch.testing.assert_close(log_q, expected.masked_fill(ended, -torch.inf), rtol=1e-5, atol=1e-5)
    assert ended.all() == (name == "nowhere")


def test_a_label_that_is_no_candidate_ends_what_a_chain_can_have() -> None:
    frames = random_frames(1, 4, 30, seed=7)
    order = frames.logits[0, 0].argsort(descending=True)
    never = frames.logits[0].topk(2, 1).indices.flatten().tolist()
    outside = next(token for token in order.tolist() if token not in never)
    labels = torch.tensor([[int(order[0]), outside, int(order[0])]])
    assert chain_log_q(frames, labels, 2).isneginf().tolist() == [[False, True, True]]
    assert chain_log_q(frames, labels, 30)[0, 1] > -torch.inf


def test_rows_of_draft_logits_are_cleared_of_what_was_there() -> None:
    """A slot's rows hold the last step's law: other candidates."""
    first, second = (random_frames(2, 4, 30, seed=seed) for seed in (1, 2))
    used, fresh = (sampling_for(2, 3, 30, [1.0, 0.5]) for _ in range(2))
    prefix_chain(first, 3, 2, used)
    prefix_chain(second, 3, 2, used)
    prefix_chain(second, 3, 2, fresh)
    assert torch.equal(used.draft_logits, fresh.draft_logits)
