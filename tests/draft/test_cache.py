"""The cache's rates are counts of what its children had a chance to be and were; a client's guess is another text."""

import random

import pytest
import torch

from vllm_ctc_spec.draft.cache import DISCOUNT, PRIOR_TRIES, CacheSource, HitRates
from vllm_ctc_spec.draft.client import ClientSource
from vllm_ctc_spec.kernels.history_tree import CLASSES, RANKS

from .simulation import Requests, tell

N = 12


def repetitive(seed: int, length: int = 90) -> list[int]:
    draws = random.Random(seed)
    phrases = [[draws.randrange(6) for _ in range(draws.randint(2, 7))] for _ in range(4)]
    text: list[int] = []
    while len(text) < length:
        text += draws.choice(phrases)
    return text[:length]


def chances(tree, row: int, edges: list[int], said: list[int]) -> list[tuple[int, bool]]:
    """(edge, hit) of every child that had its chance: its parent was said, and no earlier sibling was right."""
    found = []
    for node in range(1, 1 + int(tree.num_nodes[row])):
        path = tree.path(row, node)
        if len(path) > len(said) or path[:-1] != said[: len(path) - 1]:
            continue
        siblings = [n for n in range(1, 1 + int(tree.num_nodes[row])) if tree.path(row, n)[:-1] == path[:-1]]
        right = [edges[n] % RANKS for n in siblings if tree.path(row, n) == said[: len(path)]]
        if not right or edges[node] % RANKS <= right[0]:
            found.append((edges[node], path == said[: len(path)]))
    return found


def test_rates_are_discounted_counts_of_chances_and_hits():
    requests = Requests([repetitive(seed) for seed in range(3)], [10, 25, 40])
    source = CacheSource(requests.tokens, 3, N)
    expected = torch.zeros(2, CLASSES * RANKS)
    prior = source._rates.rates.clone()
    for step in range(12):
        slots = [0, 1, 2] if step % 3 else [2, 0]
        tree = requests.draft(source, slots, N)
        edges = source._edges.tolist()
        trees = {slot: (tree, row, edges[slot]) for row, slot in enumerate(slots)}
        counts = [len(requests.verify(tree, row, slot)) for row, slot in enumerate(slots)]
        now = torch.zeros(2, CLASSES * RANKS)
        for (of_tree, row, kinds), slot, count in zip(trees.values(), slots, counts):
            end = int(requests.tokens.lengths[slot])
            said = requests.texts[slot][end - count : end]
            for edge, hit in chances(of_tree, row, kinds, said):
                now[:, edge] += torch.tensor([float(hit), 1.0])
        expected = expected * DISCOUNT + now
        tell(source, slots, counts, N)
        rates = (expected[0].view_as(prior) + PRIOR_TRIES * prior) / (expected[1].view_as(prior) + PRIOR_TRIES)
        torch.testing.assert_close(source._rates.rates, rates)
    assert expected[1].sum() > 60 and expected[0].sum() > 15


def test_a_draft_for_another_place_is_not_judged():
    """Nothing was drafted for this step, or the slot has another request: the tree in the slot is an old one."""
    requests = Requests([repetitive(1)], [30])
    source = CacheSource(requests.tokens, 1, N)
    requests.draft(source, [0], N)
    requests.say(0, 1)  # a step without a draft
    tell(source, [0], [0], N)
    requests.say(0, 1)
    tell(source, [0], [1], N)
    assert not source._rates._counts.any()
    requests.draft(source, [0], N)
    source.reset(0)
    requests.say(0, 1)
    tell(source, [0], [1], N)
    assert not source._rates._counts.any()
    requests.draft(source, [0], N)
    tell(source, [0], [len(requests.say(0, 1))], N)
    assert source._rates._counts.any()


def test_equal_counts_give_equal_rates_in_any_order():
    """Ranks of tensor parallelism must draft the same."""
    edges = torch.randint(0, CLASSES * RANKS, (500,))
    hits, tries = torch.rand(500) < 0.5, torch.rand(500) < 0.7
    one, other = HitRates(torch.device("cpu")), HitRates(torch.device("cpu"))
    order = torch.randperm(500)
    one.add(edges, hits, tries)
    other.add(edges[order], hits[order], tries[order])
    assert torch.equal(one.rates, other.rates)


def test_a_copied_text_is_drafted_in_one_piece():
    phrase = list(range(10, 40))
    text = phrase + [7, 8, 9] + phrase
    requests = Requests([text], [len(phrase) + 3 + 8])
    source = CacheSource(requests.tokens, 1, 31)
    tree = requests.draft(source, [0], 31)
    assert len(requests.verify(tree, 0, 0)) >= 18


@pytest.mark.parametrize("wrong", [[], [3], [10, 11, 99, 98]])
def test_a_guess_is_followed_and_found_again(wrong: list[int]):
    """The answer is the guess, behind some tokens that are not."""
    guess, prompt = list(range(20, 60)), [1, 2, 3]
    answer = wrong + guess
    requests = Requests([prompt + answer], [len(prompt)])
    guesses = torch.zeros(1, 64, dtype=torch.int32)
    guesses[0, : len(guess)] = torch.tensor(guess)
    lengths, starts = (torch.tensor([n], dtype=torch.int32) for n in (len(guess), len(prompt)))
    source = ClientSource(requests.tokens, guesses, lengths, starts, 16)
    requests.say(0, 1)  # the prefill draws the answer's first token
    steps = 0
    while int(requests.tokens.lengths[0]) < len(prompt) + len(answer):
        tree = requests.draft(source, [0], 16)
        tree.check(100)
        tell(source, [0], [len(requests.verify(tree, 0, 0))], 16)
        steps += 1
    assert steps <= len(wrong) + 5


def test_a_request_without_a_guess_gets_an_empty_tree():
    requests = Requests([[1, 1, 1, 1, 1, 1]], [3])
    zeros = torch.zeros(1, dtype=torch.int32)
    source = ClientSource(requests.tokens, torch.ones(1, 8, dtype=torch.int32), zeros, zeros + 2, 4)
    assert requests.draft(source, [0], 4).num_nodes.tolist() == [0]
