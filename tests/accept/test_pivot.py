"""The rule of pivots on trees, by its definition, and at the two ends of its threshold."""

import random

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.accept.exact import Exact
from vllm_ctc_spec.accept.pivot import ENTROPY_TOP_K, Classifier, Pivot
from vllm_ctc_spec.accept.rule import Rows
from vllm_ctc_spec.accept.walk import walk

from ..oracle.pivot import classify, entropy, probabilities, walk_by_definition
from ..oracle.trees import random_tree, starts

VOCABULARY, HIDDEN, UNITS = 30, 6, 5  # more tokens than the entropy counts


def random_classifier(draw: torch.Generator) -> Classifier:
    weights = torch.randn(UNITS, HIDDEN + 2, generator=draw)
    return Classifier(weights, *(torch.randn(shape, generator=draw) for shape in ([UNITS], [UNITS], [])))


def random_step(seed: int, num_trees: int = 8) -> tuple[list[list[int]], tuple[Tensor, ...], Tensor]:
    """Trees, the arguments of `walk` behind the rule, and hidden states. Some tokens cannot be said, some may not be;
    siblings differ, and are often the target's token."""
    rng, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    trees = [random_tree(rng.randint(0, 12), rng) for _ in range(num_trees)]
    first = starts([len(tree) for tree in trees])
    count = int(first[-1])
    logits = 3 * torch.randn(count, VOCABULARY, generator=draw)
    logits[torch.rand(logits.shape, generator=draw) < 0.15] = -torch.inf
    logits[:, 0] = 0
    targets = logits.softmax(-1).multinomial(1, generator=draw)[:, 0]
    parents, drafts = torch.full((num_trees, 13), -1, dtype=torch.int32), []
    for slot, tree in enumerate(trees):
        parents[slot, : len(tree)] = torch.tensor(tree)
        given: set[tuple[int, int]] = set()
        drafts.append(0)
        for parent in tree[1:]:
            drawn = int(targets[int(first[slot]) + parent])
            choices = [drawn] * 9 + [*range(VOCABULARY)] + [-1] * 3
            token = rng.choice([token for token in choices if (parent, token) not in given or token < 0])
            given.add((parent, token))
            drafts.append(token)
    hidden = torch.randn(count, HIDDEN, generator=draw)
    return trees, (logits, targets, torch.tensor(drafts), parents, torch.arange(num_trees).int(), first), hidden


@pytest.mark.parametrize("seed", range(200))
def test_a_tree_is_walked_by_the_definition(seed):
    trees, step, hidden = random_step(seed)
    logits, targets, drafts, *_, first = step
    classifier = random_classifier(torch.Generator().manual_seed(seed))
    threshold, floor = random.Random(seed).choice([0.2, 0.5, 0.8]), random.Random(-seed).choice([1e-6, 1e-2, 0.1])
    sampled, num_sampled, path = walk(Pivot(threshold, floor, "", classifier), *step, hidden)
    loose = 0
    for r, tree in enumerate(trees):
        rows = slice(int(first[r]), int(first[r + 1]))
        of_tree = [x[rows].tolist() for x in (drafts, targets, logits, hidden)]

        def p_pivot(node: int, child: int, of_tree: list = of_tree) -> float:
            tokens, _, law, states = of_tree
            log_p = torch.tensor(probabilities(law[node])[tokens[child]]).log().item()
            features = [*states[child], entropy(law[node], ENTROPY_TOP_K), log_p]
            return classify([part.tolist() for part in classifier], features)

        emitted, nodes = walk_by_definition(tree, *of_tree[:3], p_pivot, threshold, floor)
        assert num_sampled[r] == len(emitted)
        assert sampled[r, : len(emitted)].tolist() == emitted
        assert path[r, : len(nodes)].tolist() == nodes
        loose += sum(said != of_tree[1][node] for said, node in zip(emitted, nodes))
    if threshold == 0.8 and floor == 1e-6:
        assert loose > 0


@pytest.mark.parametrize("seed", range(20))
def test_below_every_probability_it_is_the_exact_rule(seed):
    _, step, hidden = random_step(seed)
    classifier = random_classifier(torch.Generator().manual_seed(seed))
    for given, expected in zip(walk(Pivot(-1.0, 1e-30, "", classifier), *step, hidden), walk(Exact(), *step)):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("seed", range(20))
def test_above_every_probability_first_children_are_followed_as_far_as_the_target_can_say_them(seed):
    trees, step, hidden = random_step(seed)
    logits, targets, drafts, *_, first = step
    rule = Pivot(1.0, 1e-30, "", random_classifier(torch.Generator().manual_seed(seed)))
    _, num_sampled, path = walk(rule, *step, hidden)
    for r, tree in enumerate(trees):
        start = int(first[r])
        node, nodes = 0, [0]
        while True:
            children = [child for child in range(1, len(tree)) if tree[child] == node]
            said = [child for child in children if drafts[start + child] == targets[start + node]]
            possible = [c for c in children[:1] if drafts[start + c] >= 0]
            possible = [c for c in possible if logits[start + node, drafts[start + c]] > -torch.inf]
            if not (said or possible):
                break
            node = (said or possible)[0]
            nodes.append(node)
        assert path[r, : int(num_sampled[r])].tolist() == nodes


def test_a_node_by_hand():
    """Three children of the anchor, of which the first alone may be loose, and only if each of the conditions holds."""
    zeros = torch.zeros(1, 3), torch.zeros(1), torch.zeros(1)
    certainly, never = Classifier(*zeros, torch.tensor(9.0)), Classifier(*zeros, torch.tensor(-9.0))
    logits = torch.zeros(4, 4)
    logits[0] = torch.tensor([0.0, -2.0, 0.0, 0.0])
    probability = float(logits[0].softmax(-1)[1])
    rows = Rows(logits, torch.full((4,), 3), torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.int64))
    rows = rows._replace(hidden=torch.zeros(4, 1))

    def loose(classifier: Classifier, floor: float, of: Rows = rows) -> list[bool]:
        return Pivot(0.5, floor, "", classifier).loose(of).tolist()

    assert loose(never, probability - 1e-3) == [False, True, False, False]
    assert loose(never, probability + 1e-3) == [False] * 4
    assert loose(certainly, 1e-4) == [False] * 4
    forbidden = rows._replace(draft_tokens=torch.tensor([0, -1, 2, 0]))
    assert loose(never, 1e-4, forbidden) == [False] * 4  # the second child is not the first


def test_the_classifier_reads_its_inputs_in_their_places():
    """State, then entropy, then log probability, each with a weight of its own."""
    weights, five, two, one = (torch.tensor(x) for x in ([[1.0, 10.0, 100.0]], [5.0], [2.0], 1.0))
    classifier = Classifier(weights, five, two, one)
    found = classifier.log_odds(torch.tensor([[3.0]]), torch.tensor([0.5]), torch.tensor([-0.01]))
    assert found.tolist() == pytest.approx([2 * (3 + 5 - 1 + 5) + 1])
    assert classifier.hidden_size == 1
