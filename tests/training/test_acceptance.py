"""The offline measure: serving's walk by hand, drafts against the oracle, and the interval."""

import dataclasses
import math
import weakref

import pytest
import torch

from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.kernels.contract import DraftTree
from vllm_ctc_spec.training import measure
from vllm_ctc_spec.training.acceptance import Acceptance, expected_walk, walk
from vllm_ctc_spec.training.batches import make_batch
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.drafting import Drafting
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import measure_chain, measure_sampled_chain, measure_trees

EXAMPLE = Example([1, 5, 3, 2], [6, 7, 8, 9, 9, 9, 6, 7, 3])
LATTICES = ["ctc", "transitions", "slots"]
LABELS = [0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 15, 18, 20, 21, 22, 28, 30]  # of a draft vocabulary, without 5 and 9


@pytest.fixture
def make_drafter(target):
    def make(lattice="ctc", token_ids=None):
        torch.manual_seed(3)
        shape = dict(num_frames=6, num_labels=4, markov_rank=5, lattice=lattice)
        if token_ids is not None:
            shape["draft_vocab_size"] = len(token_ids)
        if lattice == "transitions":
            shape["transition_rank"] = 3
        config = DrafterConfig.for_target(target.model.config, **shape)
        labels = None if token_ids is None else torch.tensor(token_ids)
        drafter = CTCDrafter(config, target.embedding, target.head, labels)
        torch.nn.init.normal_(drafter.markov_head.embedding.weight)
        torch.nn.init.normal_(drafter.markov_head.output.weight)
        return drafter, in_process(target, drafter.config.aux_hidden_state_layer_ids)

    return make


@torch.no_grad()
def draft(drafter, hidden_states, example=EXAMPLE) -> Drafting:
    """At every anchor of one response."""
    positions = torch.arange(len(example.prompt), len(example) - 1)[None]
    batch = make_batch([example], positions, drafter.config.num_labels)
    return Drafting.at(drafter, hidden_states([example], batch.token_ids), batch)


def oracle_arguments(drafting: Drafting, row: int) -> dict:
    """The frames, as the oracle's functions take them, which know labels only."""
    logits, (odds, log_transitions) = drafting.outputs
    if odds is None:
        odds = torch.full(logits.shape[:2], -torch.inf)
    drafter = drafting.drafter
    bias = drafter.markov_head(torch.arange(drafter.config.num_markov_inputs)).detach()
    return dict(
        log_probs=oracle.frame_log_probs(logits[row], odds[row]),
        label_bias=bias,
        anchor=label_of(drafter, int(drafting.anchors[row])),
        log_transitions=None if log_transitions is None else log_transitions[row],
    )


def label_of(drafter: CTCDrafter, token: int) -> int:
    return token if drafter.vocabulary is None else int(drafter.vocabulary.labels[token])


def tokens_of(drafter: CTCDrafter, labels: tuple[int, ...]) -> tuple[int, ...]:
    return labels if drafter.vocabulary is None else tuple(LABELS[label] for label in labels)


KINDS = pytest.mark.parametrize(
    "lattice, token_ids", [*((lattice, None) for lattice in LATTICES), ("ctc", LABELS), ("transitions", LABELS)]
)


@pytest.mark.parametrize(
    ("accepted", "steps"),
    [([0, 0, 0], 3), ([2, 9, 9], 1), ([1, 9, 0], 2), ([3, 9, 9, 9, 1, 9, 0], 3), ([], 0)],
)
def test_walk_advances_by_the_accepted_labels_and_one(accepted, steps):
    assert walk(accepted) == steps


def test_expected_walk_is_the_mean_over_all_outcomes():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(5, 2, generator=generator)

    def steps_from(anchor: int) -> float:
        if anchor >= 5:
            return 0.0
        first, second = probability[anchor].tolist()
        outcomes = ((1 - first, 1), (first * (1 - second), 2), (first * second, 3))
        return 1 + sum(p * steps_from(anchor + advance) for p, advance in outcomes)

    assert expected_walk(probability) == pytest.approx(steps_from(0))
    assert expected_walk(torch.zeros(4, 3)) == 4 and expected_walk(torch.ones(4, 3)) == 1


@KINDS
def test_drafts_are_the_oracles(lattice, token_ids, make_drafter):
    drafting = draft(*make_drafter(lattice, token_ids))
    chains, tree = drafting.chain().tolist(), drafting.tree(31)  # as wide as the vocabulary
    for row in range(len(chains)):
        frames = oracle_arguments(drafting, row)
        assert tuple(chains[row]) == tokens_of(drafting.drafter, oracle.chain(num_labels=4, **frames).labels)
        expected = oracle.best_prefixes(num_nodes=12, depth=4, **frames)
        assert [tuple(tree.path(row, node)) for node in range(1, 13)] == [
            tokens_of(drafting.drafter, labels) for labels, _ in expected
        ]


@KINDS
def test_log_q_is_the_oracles_conditional(lattice, token_ids, make_drafter):
    drafting = draft(*make_drafter(lattice, token_ids))
    log_q, outside = drafting.log_q(), 0
    for row, labels in enumerate(drafting.labels.tolist()):
        frames = oracle_arguments(drafting, row)
        prefix, last = oracle.root_prefix(frames["log_probs"], frames["log_transitions"]), frames["anchor"]
        for k, token in enumerate(labels):
            if not drafting.valid[row, k]:
                break
            label = label_of(drafting.drafter, token)
            if token_ids is not None and label == len(token_ids):  # no draft goes on from here
                assert (log_q[row, k:] == -torch.inf).all()
                outside += 1
                break
            law = torch.log_softmax(prefix.conditional(frames["log_probs"]) + frames["label_bias"][last], -1)
            assert float(log_q[row, k]) == pytest.approx(float(law[label]), abs=2e-4)
            prefix, last = prefix.extend(frames["log_probs"], label), label
    assert (outside > 0) == (token_ids is not None)


def test_a_tree_is_followed_as_deep_as_it_holds_the_labels(make_drafter, monkeypatch):
    drafting = draft(*make_drafter())
    labels = drafting.labels[0].tolist()  # 7 8 9 9
    wrong = 20
    # Depth two on a late row, below a sibling of a wrong node that carries the right token one level too deep.
    tokens = torch.tensor([[6, wrong, labels[0], labels[1], labels[1], labels[2]]]).expand(len(drafting.labels), -1)
    parents = torch.tensor([[-1, 0, 0, 1, 2, 3]], dtype=torch.int32).expand_as(tokens)
    depths = torch.tensor([[0, 1, 1, 2, 2, 3]], dtype=torch.int32).expand_as(tokens)
    tree = DraftTree(tokens, parents, depths, torch.zeros(tokens.shape), torch.zeros_like(tokens))

    def first_rows(self, num_nodes):
        return DraftTree(*(getattr(tree, field.name)[:, : 1 + num_nodes] for field in dataclasses.fields(tree)))

    monkeypatch.setattr(Drafting, "tree", first_rows)
    assert [int(drafting.accepted_in(drafting.tree(size))[0]) for size in (1, 2, 3, 4, 5)] == [0, 1, 1, 2, 2]


def test_a_token_past_the_end_is_not_accepted(make_drafter, monkeypatch):
    """Labels are padded with token 0, which a drafter may draft."""
    drafting = draft(*make_drafter())
    assert not drafting.valid[-1, 1]
    said = drafting.labels.clone()  # all of them right, and zeros behind the end
    monkeypatch.setattr(Drafting, "chain", lambda self: said)
    assert drafting.accepted(drafting.chain()).tolist() == drafting.valid.sum(1).tolist()


@pytest.mark.parametrize("at_once", [4, 64])
def test_measured_steps_are_those_of_serving_one_anchor_at_a_time(make_drafter, monkeypatch, at_once):
    monkeypatch.setattr(measure, "ANCHORS_AT_ONCE", at_once)
    examples = [EXAMPLE, Example([1, 2], [3]), Example([1, 9, 2], [4, 5, 5]), Example([1, 2], [10, 11, 12, 13])]
    answers = {6: [7, 8, 0, 0], 9: [9, 9, 9, 9], 7: [3, 0, 0, 0], 4: [5, 5, 5, 5], 10: [0, 12, 13, 0]}

    def chain(self):
        return torch.tensor([answers.get(anchor, [0, 0, 0, 0]) for anchor in self.anchors.tolist()])

    monkeypatch.setattr(Drafting, "chain", chain)
    # first: 6 -> (7 8) 9; 9 -> (9 9) 6; 6 -> (7) 3, the response ends; third: 4 -> (5 5), ends;
    # fourth: a wrong first label takes the right ones behind it along: 11; 12; 13
    result = measure_chain(*make_drafter(), examples)
    assert (result.tokens, result.steps) == ([8, 2, 3], [3, 1, 3])
    assert result.length == 13 / 7


@pytest.mark.parametrize("lattice", LATTICES)
def test_the_real_drafts_are_measured_like_a_loop_over_steps(lattice, make_drafter):
    drafter, hidden_states = make_drafter(lattice)
    tokens = torch.tensor([EXAMPLE.prompt + EXAMPLE.response])

    def loop(depth_of) -> int:
        position, steps = 4, 0
        while position < 12:
            following = make_batch([EXAMPLE], torch.tensor([[position]]), 4)
            context = hidden_states([EXAMPLE], tokens[:, :position])
            with torch.no_grad():
                position += 1 + depth_of(Drafting.at(drafter, context, following))
            steps += 1
        return steps

    chain_steps = loop(lambda drafting: int(drafting.accepted(drafting.chain())))
    assert measure_chain(drafter, hidden_states, [EXAMPLE]).steps == [chain_steps]
    measured = measure_trees(drafter, hidden_states, [EXAMPLE], [4, 16])
    for size in (4, 16):
        in_tree = lambda drafting, size=size: int(drafting.accepted_in(drafting.tree(size)))  # noqa: E731
        assert measured[size].steps == [loop(in_tree)]


def test_the_logits_of_few_anchors_are_there_at_a_time(make_drafter, monkeypatch):
    """However long the response is."""
    monkeypatch.setattr(measure, "ANCHORS_AT_ONCE", 2)
    at, logits, most = Drafting.at, [], []

    def watched(*args):
        most.append(sum(there() is not None for there in logits))
        drafting = at(*args)
        logits.append(weakref.ref(drafting.outputs.logits))
        return drafting

    monkeypatch.setattr(Drafting, "at", watched)
    drafter, hidden_states = make_drafter()
    measure_chain(drafter, hidden_states, [EXAMPLE])
    measure_trees(drafter, hidden_states, [EXAMPLE], [4, 16])
    measure_sampled_chain(drafter, hidden_states, [EXAMPLE], lambda example: torch.zeros(9))
    assert most == [0] * 12  # four parts each


def test_sampled_chains_are_accepted_by_the_ratio_of_the_laws(make_drafter):
    drafter, hidden_states = make_drafter()
    log_q, valid = (getattr(draft(drafter, hidden_states), name) for name in ("log_q", "valid"))
    log_p = torch.log(torch.linspace(0.05, 0.9, 9))
    expected = torch.zeros(8, 4)
    for i in range(8):
        for k in range(4):
            if valid[i, k]:
                expected[i, k] = min(1.0, math.exp(float(log_q()[i, k]) - float(log_p[i + 1 + k])))
    measured = measure_sampled_chain(drafter, hidden_states, [EXAMPLE], lambda example: log_p)
    assert measured.tokens == [8] and measured.steps == [pytest.approx(expected_walk(expected), rel=1e-4)]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hits, trials = 0, 400
    for _ in range(trials):
        tokens = torch.randint(20, 200, (60,), generator=generator)
        noise = 0.4 * torch.randn(60, generator=generator)
        steps = (tokens / (2.5 + noise)).round().clamp_min(1)
        measured = Acceptance(tokens.tolist(), [int(s) for s in steps])
        truth = 1 / float((1 / (2.5 + 0.4 * torch.randn(20000, generator=generator))).mean())
        hits += abs(measured.length - truth) <= measured.half_width
    assert 0.91 <= hits / trials <= 0.985
    assert Acceptance([5], [2]).half_width == math.inf


def measured(tokens, per_step) -> Acceptance:
    return Acceptance(tokens.tolist(), (tokens / per_step).tolist())


def test_the_interval_of_a_difference_covers_it_and_is_narrower_than_those_of_its_terms():
    """Two drafters on prompts of which some are harder for both."""
    generator = torch.Generator().manual_seed(0)

    def drafters(count: int) -> tuple[Acceptance, Acceptance]:
        tokens = torch.randint(20, 200, (count,), generator=generator)
        ease = 0.5 * torch.randn(count, generator=generator).clamp(-3, 3)
        noise = 0.1 * torch.randn(2, count, generator=generator)
        return measured(tokens, 3.2 + ease + noise[0]), measured(tokens, 3.0 + ease + noise[1])

    one, other = drafters(200_000)
    truth, trials, hits, narrower = one.length - other.length, 400, 0, 0
    for _ in range(trials):
        one, other = drafters(60)
        difference, half_width = one.minus(other)
        hits += abs(difference - truth) <= half_width
        narrower += half_width < 0.5 * math.hypot(one.half_width, other.half_width)
    assert 0.91 <= hits / trials <= 0.985 and narrower > 0.95 * trials
    assert one.minus(one) == (0, 0)
    assert Acceptance([5], [2]).minus(Acceptance([5], [3])) == (5 / 2 - 5 / 3, math.inf)


def test_the_interval_over_conversations_covers_the_truth_where_the_one_over_prompts_does_not():
    """Turns of a conversation are as easy as each other."""
    generator, trials = torch.Generator().manual_seed(0), 400
    turns, hits = 6, {"conversations": 0, "prompts": 0}

    def conversations(count: int) -> Acceptance:
        ease = 0.5 * torch.randn(count, 1, generator=generator).clamp(-3, 3).expand(-1, turns)
        return measured(torch.randint(20, 200, (count * turns,), generator=generator), 3 + ease.flatten())

    truth = conversations(50_000).length
    for _ in range(trials):
        prompts = conversations(40)
        grouped = prompts.grouped([row // turns for row in range(40 * turns)])
        assert grouped.length == pytest.approx(prompts.length) and len(grouped.steps) == 40
        for name, acceptance in (("prompts", prompts), ("conversations", grouped)):
            hits[name] += abs(acceptance.length - truth) <= acceptance.half_width
    assert 0.91 <= hits["conversations"] / trials <= 0.985 and hits["prompts"] / trials < 0.8
