"""FLy on trees: by its definition, and for a tree that is a chain token for token as vLLM 0.33 accepts it."""

import math
import random

import pytest
import torch
from torch import Tensor

from vllm_ctc_spec.accept.exact import Exact
from vllm_ctc_spec.accept.fly import Fly, agreed_with, top_k_entropy
from vllm_ctc_spec.accept.walk import walk

from ..oracle.fly import accepted_by_vllm, walk_by_definition
from ..oracle.trees import random_tree, starts

VOCABULARY = 5


def random_rows(num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of targets that are certain, hesitant, or cannot say some tokens; and what they say, greedily in every
    second row and drawn in the others."""
    draw = torch.Generator().manual_seed(seed)
    sharpness = torch.tensor([0.5, 2.0, 20.0])[torch.randint(3, (num_rows, 1), generator=draw)]
    logits = sharpness * torch.randn(num_rows, VOCABULARY, generator=draw)
    logits[torch.rand(logits.shape, generator=draw) < 0.15] = -torch.inf
    logits[:, 0] = logits[:, 0].clamp_min(-5)  # something is always possible
    drawn = logits.softmax(-1).multinomial(1, generator=draw)[:, 0]
    return logits, torch.where(torch.arange(num_rows) % 2 == 0, logits.argmax(-1), drawn)


def likely(drawn: int, rng: random.Random) -> int:
    """Often the target's token, now and then one that a grammar forbids."""
    return rng.choice([drawn] * 12 + [*range(VOCABULARY)] + [-1])


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_is_accepted_as_vllm_accepts_it(seed):
    """5000 chains a seed, 100 000 in all: greedy and sampled, of 0 to 12 drafts."""
    rng = random.Random(seed)
    window, threshold = rng.choice([1, 2, 3, 4, 6]), rng.choice([0.0, 0.05, 0.3, 0.9])
    counts = [rng.choice([rng.randint(0, 12), 12]) for _ in range(5000)]
    first = starts([1 + count for count in counts])
    logits, targets = random_rows(int(first[-1]), seed)
    drafts = torch.tensor([0] + [likely(drawn, rng) for drawn in targets[:-1].tolist()])
    chains = torch.arange(-1, 12, dtype=torch.int32)[None]
    rule = Fly(window, threshold)
    requests = torch.zeros(len(counts), dtype=torch.int32)
    sampled, num_sampled, path = walk(rule, logits, targets, drafts, chains, requests, first)

    loosely = 0
    entropies = top_k_entropy(logits, rule.entropy_top_k).tolist()
    native = torch.cat([drafts[1:] == targets[:-1], torch.tensor([False])]).tolist()  # of the draft after each row
    possible = logits.gather(1, drafts.roll(-1).clamp_min(0)[:, None])[:, 0].isfinite().tolist()
    targets, drafts, sampled, num_sampled = (x.tolist() for x in (targets, drafts, sampled, num_sampled))
    for r, count in enumerate(counts):
        start = int(first[r])
        rows, tokens = slice(start, start + count), drafts[start + 1 : start + 1 + count]
        accepted = accepted_by_vllm(tokens, native[rows], possible[rows], entropies[rows], window, threshold)
        # Behind them vLLM emits the target's arg-max, or a draw of the target's that is not the rejected draft.
        assert sampled[r][: num_sampled[r]] == [*tokens[:accepted], targets[start + accepted]]
        loosely += accepted > [*native[rows], False].index(False)
    assert torch.equal(path, torch.arange(13, dtype=torch.int32).expand_as(path))
    assert loosely > 20


@pytest.mark.parametrize("seed", range(300))
def test_a_tree_is_walked_by_the_definition(seed):
    rng = random.Random(seed)
    window, threshold = rng.choice([1, 1, 2, 3]), rng.choice([0.0, 0.1, 0.5])
    trees = [random_tree(rng.randint(0, 12), rng) for _ in range(8)]
    first = starts([len(tree) for tree in trees])
    logits, targets = random_rows(int(first[-1]), seed)
    parents = torch.full((len(trees), 13), -1, dtype=torch.int32)
    drafts, expected = [], []
    for slot, tree in enumerate(trees):
        parents[slot, : len(tree)] = torch.tensor(tree)
        start = int(first[slot])
        given: set[tuple[int, int]] = set()
        tokens = [0]
        for parent in tree[1:]:
            # Siblings differ. A node with more children than tokens hands the others tokens that cannot be said.
            free = [token for token in range(VOCABULARY) if (parent, token) not in given]
            drawn = int(targets[start + parent])
            token = drawn if drawn in free and rng.random() < 0.6 else rng.choice([*free, -1])
            given.add((parent, token))
            tokens.append(token)
        drafts += tokens
    drafts_all = torch.tensor(drafts)
    rule = Fly(window, threshold)
    entropies = top_k_entropy(logits, rule.entropy_top_k).tolist()
    for slot, tree in enumerate(trees):
        rows = slice(int(first[slot]), int(first[slot + 1]))
        tokens = drafts[rows]
        possible = [
            parent >= 0 and token >= 0 and bool(logits[rows.start + parent, token] > -math.inf)
            for parent, token in zip(tree, tokens)
        ]
        of_tree = tree, tokens, targets[rows].tolist(), possible, entropies[rows]
        expected.append(walk_by_definition(*of_tree, window, threshold))
    requests = torch.arange(len(trees), dtype=torch.int32)
    sampled, num_sampled, path = walk(rule, logits, targets, drafts_all, parents, requests, first)
    for r, (emitted, nodes) in enumerate(expected):
        assert num_sampled[r] == len(emitted) == len(nodes)
        assert sampled[r, : len(emitted)].tolist() == emitted
        assert path[r, : len(nodes)].tolist() == nodes


def chain_of(targets: list[int], drafts: list[int], logits: Tensor, rule) -> list[int]:
    """Emitted tokens of one chain."""
    count = len(targets)
    parents = torch.arange(-1, count - 1, dtype=torch.int32)[None]
    request = torch.zeros(1, dtype=torch.int32)
    sampled, num_sampled, _ = walk(
        rule, logits, torch.tensor(targets), torch.tensor([0, *drafts]), parents, request, starts([count])
    )
    return sampled[0, : int(num_sampled)].tolist()


def test_a_loose_token_by_hand():
    """The target says 1 1 1 1 1, the draft 2 1 1 1: accepted if the target hesitates at 2 and agrees long enough."""
    targets, drafts = [1] * 5, [2, 1, 1, 1]
    hesitant = torch.zeros(5, VOCABULARY)
    certain = hesitant.clone()
    certain[0, 1] = 30.0
    silent = hesitant.clone()
    silent[0, 2] = -torch.inf
    assert chain_of(targets, drafts, hesitant, Fly(3)) == [2, 1, 1, 1, 1]
    assert chain_of(targets, drafts, hesitant, Fly(4)) == [1]
    assert chain_of(targets, drafts, certain, Fly(3)) == [1]
    assert chain_of(targets, drafts, certain, Fly(3, entropy_threshold=0.0)) == [2, 1, 1, 1, 1]
    assert chain_of(targets, drafts, silent, Fly(3, entropy_threshold=0.0)) == [1]
    assert chain_of(targets, [2, 1, 2, 1], hesitant, Fly(2)) == [1]  # two doubts in one window
    assert chain_of(targets, [2, 1, 2, 1], hesitant, Fly(1)) == [2, 1, 2, 1, 1]  # each with a window of its own


def test_the_first_loose_child_is_taken_and_none_where_the_target_goes_on():
    """Node 0 has children 1, 2 (loose, each with an agreement below) and 3, the target's token."""
    targets = torch.tensor([4, 1, 1, 0, 0, 0])
    parents = torch.tensor([[-1, 0, 0, 0, 1, 2]], dtype=torch.int32)
    request, first = torch.zeros(1, dtype=torch.int32), starts([6])
    logits = torch.zeros(6, VOCABULARY)
    for token, emitted in ((4, [4, 0]), (3, [1, 1, 0])):
        drafts = torch.tensor([0, 1, 2, token, 1, 1])
        sampled, num_sampled, _ = walk(Fly(1), logits, targets, drafts, parents, request, first)
        assert sampled[0, : int(num_sampled)].tolist() == emitted


@pytest.mark.parametrize("rule", [Fly(12), Fly(1, entropy_threshold=math.inf)], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_a_window_or_a_threshold_that_nothing_reaches_is_the_exact_rule(seed, rule):
    rng = random.Random(seed)
    trees = [random_tree(12, rng) for _ in range(20)]
    first = starts([13] * 20)
    logits, targets = random_rows(260, seed)
    drafts = torch.tensor([0] + [likely(drawn, rng) for drawn in targets[:-1].tolist()])
    step = logits, targets, drafts, torch.tensor(trees, dtype=torch.int32), torch.arange(20, dtype=torch.int32), first
    for given, expected in zip(walk(rule, *step), walk(Exact(), *step), strict=True):
        assert torch.equal(given, expected)


@pytest.mark.parametrize("length", range(1, 9))
def test_powers_of_next_are_steps(length):
    rng = random.Random(length)
    parent = [0, *(rng.choice([row - 1] * 8 + [rng.randrange(row), row]) for row in range(1, 400))]
    following = {}
    for row, above in enumerate(parent):
        if above != row and rng.random() < 0.95:
            following.setdefault(above, row)
    agrees = torch.tensor([following.get(above) == row for row, above in enumerate(parent)])
    parent = torch.tensor(parent)
    found = agreed_with(agrees, parent, length).tolist()
    for row in range(400):
        reached = row
        for _ in range(length):
            reached = following.get(reached)
        assert found[row] == (reached is not None)
    assert {True, False} == set(found)


def test_entropy_counts_the_largest_probabilities_only():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [1.0, 0, 0, 0], [0.25] * 4]).log()
    found = top_k_entropy(logits, 3)
    expected = [0.5 * math.log(2) + 0.25 * math.log(4) + 0.125 * math.log(8), 0, 0.75 * math.log(4)]
    assert torch.allclose(found, torch.tensor(expected))
    assert torch.allclose(top_k_entropy(logits, 9)[2], torch.tensor(math.log(4)))
