"""Merged sources: weights follow what each source said of the text, and change nothing else."""

import dataclasses
import math
import random

import pytest
import torch

from vllm_ctc_spec.draft.merged import FLOOR, SHARE, MergedSource, shared
from vllm_ctc_spec.draft.source import DraftStep
from vllm_ctc_spec.kernels.contract import DTYPES, Budget, DraftTree

from .simulation import Requests, tell

N, V = 10, 5


class RandomSource:
    """Trees of random paths with random probabilities; `right` of them begin with what the text will say."""

    reads = frozenset()

    def __init__(self, name: str, requests: Requests, right: float, seed: int):
        self.name, self.requests, self.right, self.draws = name, requests, right, random.Random(seed)
        self.told, self.forgotten = [], []

    def prepare(self, requests, num_sampled, num_logits):
        self.told.append(requests.tolist())

    def reset(self, request):
        self.forgotten.append(request)

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        return joined([self._tree(int(slot), budget.nodes) for slot in step.requests])

    def _tree(self, slot: int, num_nodes: int) -> DraftTree:
        length = int(self.requests.tokens.lengths[slot])
        true = self.requests.texts[slot][length : length + 4]
        paths: dict[tuple[int, ...], float] = {(): 0.0}
        for _ in range(4 * num_nodes):
            parent = self.draws.choice(list(paths))
            token = self.draws.randrange(V)
            if self.draws.random() < self.right and len(parent) < len(true) and list(parent) == true[: len(parent)]:
                token = true[len(parent)]
            paths.setdefault((*parent, token), paths[parent] + math.log(self.draws.uniform(0.05, 0.6) / 2))
        best = sorted(paths, key=lambda path: (-paths[path], len(path)))[: 1 + num_nodes]
        fields = {name: torch.zeros(1, 1 + num_nodes, dtype=dtype) for name, dtype in DTYPES.items()}
        fields["parents"] -= 1
        fields["scores"][:, 1:] = -torch.inf
        for row, path in enumerate(best[1:], 1):
            parent = best.index(path[:-1])
            fields["tokens"][0, row], fields["parents"][0, row], fields["depths"][0, row] = path[-1], parent, len(path)
            fields["scores"][0, row] = paths[path]
            fields["ancestors"][0, row] = fields["ancestors"][0, parent] | (1 << (row - 1))
        return DraftTree(**fields)


def joined(trees: list[DraftTree]) -> DraftTree:
    return DraftTree(**{name: torch.cat([getattr(tree, name) for tree in trees]) for name in DTYPES})


@pytest.fixture
def requests() -> Requests:
    draws = random.Random(3)
    return Requests([[draws.randrange(V) for _ in range(120)] for _ in range(2)], [5, 9])


def test_weights_are_the_fixed_share_posterior_of_what_the_target_said(requests):
    sources = [RandomSource("a", requests, 0.9, 1), RandomSource("b", requests, 0.1, 2)]
    merged = MergedSource(sources, requests.tokens, 2, N)
    weights = {slot: [0.5, 0.5] for slot in (0, 1)}
    drafted, accepted = [0, 0], [0, 0]
    for step in range(15):
        slots = [1, 0] if step % 2 else [0]
        state = [source.draws.getstate() for source in sources]
        trees = [source.draft(DraftStep(torch.tensor(slots), None, None, None), Budget(N, 1, N)) for source in sources]
        for source, before in zip(sources, state):
            source.draws.setstate(before)
        tree = requests.draft(merged, slots, N)
        tree.check(V)
        counts = []
        for row, slot in enumerate(slots):
            said = requests.verify(tree, row, slot)
            counts.append(len(said))
            nodes = [tuple(tree.path(row, node)) for node in range(1 + int(tree.num_nodes[row]))]
            path = max((p for p in nodes if list(p) == said[: len(p)]), key=len)
            posterior = []
            for s, of_source in enumerate(trees):
                law = {
                    tuple(of_source.path(row, node)): math.exp(of_source.scores[row, node])
                    for node in range(1 + int(of_source.num_nodes[row]))
                }
                kept = [p for p in nodes[1:] if p in law]
                drafted[s] += len(kept)
                accepted[s] += sum(list(p) == said[: len(p)] for p in kept)
                rest = law.get(path, 0) - sum(law.get(p, 0) for p in nodes if p and p[:-1] == path)
                posterior.append(weights[slot][s] * max(rest, FLOOR))
            weights[slot] = [(1 - SHARE) * p / sum(posterior) + SHARE / 2 for p in posterior]
        tell(merged, slots, counts, N)
        for slot in (0, 1):
            assert merged.weights[slot].tolist() == pytest.approx(weights[slot], rel=1e-3)
    assert merged.counts.tolist() == [drafted, accepted] and accepted[0] > 2 * accepted[1] > 0
    assert all(source.told == sources[0].told and len(source.told) == 15 for source in sources)


def test_a_new_request_begins_with_the_mean_of_the_others(requests):
    sources = [RandomSource("a", requests, 0.9, 1), RandomSource("b", requests, 0.0, 2)]
    merged = MergedSource(sources, requests.tokens, 2, N)
    for _ in range(20):
        tree = requests.draft(merged, [0], N)
        tell(merged, [0], [len(requests.verify(tree, 0, 0))], N)
    merged.reset(1)
    assert sources[0].forgotten == sources[1].forgotten == [1]
    assert merged.weights[1].sum() == pytest.approx(1, abs=1e-5)
    assert 0.5 < merged.weights[1, 0] < merged.weights[0, 0]


def test_weights_move_within_a_few_steps_and_back():
    weights = torch.tensor([[0.99, 0.01]])
    right = torch.tensor([[0.01, 0.7]])
    for _ in range(2):
        weights = shared(weights, right)
    assert weights[0, 1] > 0.9
    for _ in range(2):
        weights = shared(weights, right.flip(1))
    assert weights[0, 0] > 0.9
    never = shared(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 0.0]]))
    assert never.tolist() == [[0.5, 0.5]]


def test_a_draft_that_was_not_verified_moves_no_weight(requests):
    merged = MergedSource(
        [RandomSource("a", requests, 0.9, 1), RandomSource("b", requests, 0, 2)], requests.tokens, 2, N
    )
    requests.draft(merged, [0], N)
    requests.say(0, 1)
    merged.prepare(torch.tensor([0]), torch.tensor([1]), torch.tensor([1]))
    assert merged.weights[0].tolist() == [0.5, 0.5] and not merged.counts.any()


def test_rows_that_were_not_verified_do_not_count_for_a_source(requests):
    twins = [RandomSource("a", requests, 0.9, 1) for _ in range(2)]  # of one tree
    merged = MergedSource(twins, requests.tokens, 2, N)
    requests.draft(merged, [0], N)
    said = torch.tensor([len(requests.say(0, 1))], dtype=torch.int32)
    merged.prepare(torch.tensor([0]), said, torch.tensor([4]))
    assert merged.counts[0].tolist() == [3, 3]


def test_inert_rows_touch_no_request(requests):
    merged = MergedSource([RandomSource("a", requests, 0.9, 1)] * 2, requests.tokens, 2, N)
    before = [part.clone() for part in (merged.weights[:2], merged._probs[:2])]
    step = DraftStep(torch.tensor([-1]), torch.tensor([0]), torch.tensor([False]), None)
    tree = merged.draft(step, Budget(N, 1, N))
    assert dataclasses.is_dataclass(tree)
    for old, now in zip(before, (merged.weights[:2], merged._probs[:2])):
        assert torch.equal(old, now)
