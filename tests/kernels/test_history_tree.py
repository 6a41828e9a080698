"""Trees of what followed earlier: the candidates of Cacheback's table, the definition, and its implementations."""

from collections import OrderedDict

import pytest
import torch

from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree
from vllm_ctc_spec.kernels.history_tree import CLASSES, RANKS, Growth, HistoryTree, Texts, history_tree, match_class
from vllm_ctc_spec.kernels.history_tree.gpu import history_tree_triton
from vllm_ctc_spec.kernels.history_tree.reference import history_tree_reference

VOCABULARY = 4


class CachebackTable:
    """The paper's table: leaders of LL tokens to the FC followers of FL tokens that were used last, LC leaders."""

    def __init__(self, leader: int, length: int, followers: int, leaders: int):
        self.leader, self.length, self.followers, self.leaders = leader, length, followers, leaders
        self.table: OrderedDict[tuple[int, ...], OrderedDict[tuple[int, ...], None]] = OrderedDict()

    def update(self, text: list[int]) -> None:
        for at in range(self.leader, len(text)):
            leader, follower = tuple(text[at - self.leader : at]), tuple(text[at : at + self.length])
            of_leader = self.table.setdefault(leader, OrderedDict())
            self.table.move_to_end(leader)
            of_leader[follower] = None
            of_leader.move_to_end(follower)
            if len(of_leader) > self.followers:
                of_leader.popitem(last=False)
            if len(self.table) > self.leaders:
                self.table.popitem(last=False)

    def look_up(self, context: list[int]) -> list[tuple[int, ...]]:
        """The followers of the context's end, the one used last first."""
        return list(reversed(self.table.get(tuple(context[-self.leader :]), OrderedDict())))

    def candidates(self, context: list[int], rounds: int) -> set[tuple[int, ...]]:
        """All beginnings of all paths of followers of followers."""
        paths, ends = set(), [()]
        for _ in range(rounds):
            new = [(*end, *follower) for end in ends for follower in self.look_up([*context, *end])]
            paths |= {path[:k] for path in new for k in range(1, 1 + len(path))}
            ends = new
        return paths


def random_text(seed: int, length: int | None = None) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    length = length or int(torch.randint(1, 40, (1,), generator=generator))
    text = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
    return text + text[: length // 2] if seed % 2 else text  # with a repetition


def texts_of(texts: list[list[int]]) -> Texts:
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    padded = torch.full((len(texts), int(lengths.max()) + 3), 1, dtype=torch.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = torch.tensor(text)
    return Texts(padded, lengths, padded, lengths)


def random_hazards(seed: int) -> torch.Tensor:
    return 0.1 + 0.8 * torch.rand(CLASSES, RANKS, generator=torch.Generator().manual_seed(seed))


def paths_of(tree: DraftTree, row: int = 0) -> list[tuple[int, ...]]:
    return [tuple(tree.path(row, node)) for node in range(1, int(tree.num_nodes[row]) + 1)]


@pytest.mark.parametrize("leader", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_candidates_are_those_of_the_papers_table(leader: int, length: int) -> None:
    """With room for all of them."""
    every = Growth(leader, length, followers=64, leaders=64, rounds=1, scanned=64, nodes=1024, by_match=False)
    for seed in range(12):
        text = random_text(seed)
        table = CachebackTable(leader, length, followers=64, leaders=1000)
        table.update(text)
        rounds = 2 if length < 3 else 1
        tree, edges = history_tree(
            texts_of([text]), torch.tensor([0]), torch.tensor([text[-1]]), random_hazards(seed), 64, 64,
            growth=every._replace(rounds=rounds),
        )  # fmt: skip
        tree.check(VOCABULARY)
        expected = table.candidates(text, rounds)
        assert len(expected) > 64 or set(paths_of(tree)) == expected


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("leader", [1, 2])
def test_a_full_table_keeps_the_followers_that_were_used_last(leader: int, length: int, capacity: int) -> None:
    is_full = False
    for seed in range(20):
        text = random_text(seed, 20 + 5 * seed)
        # Further rounds are the same only where followers have one token: two longer ones may share their beginning.
        rounds = 3 if length == 1 else 1
        table, large = (CachebackTable(leader, length, followers, leaders=1000) for followers in (capacity, 64))
        table.update(text)
        large.update(text)
        is_full |= table.candidates(text, rounds) < large.candidates(text, rounds)
        growth = Growth(leader, length, capacity, leaders=64, rounds=rounds, scanned=64, nodes=1024, by_match=False)
        tree, _ = history_tree(
            texts_of([text]), torch.tensor([0]), torch.tensor([text[-1]]), random_hazards(seed), 64, 64, growth=growth
        )
        assert set(paths_of(tree)) == table.candidates(text, rounds)
    assert is_full


def test_the_papers_table_forgets_what_a_scan_does_not() -> None:
    """A table with fewer leaders than the text has gives some of the scan's candidates, those of the latest leaders."""
    texts = [random_text(seed, 30) for seed in range(20)]
    growth = Growth(2, 1, followers=64, leaders=64, rounds=1, scanned=64, nodes=1024, by_match=False)
    fewer = 0
    for text in texts:
        small = CachebackTable(2, 1, followers=64, leaders=4)
        small.update(text)
        tree, _ = history_tree(
            texts_of([text]), torch.tensor([0]), torch.tensor([text[-1]]), random_hazards(0), 64, 64, growth=growth
        )
        assert small.candidates(text, 1) <= set(paths_of(tree))
        fewer += small.candidates(text, 1) < set(paths_of(tree))
    assert fewer


def test_the_longest_match_comes_first() -> None:
    text = [0, 1, 2, 3, 9, 8, 1, 2, 5, 5, 2, 7, 0, 1, 2]  # "2" was followed by 7, "1 2" by 5, "0 1 2" by 3
    hazards = torch.full((CLASSES, RANKS), 0.5)
    tree, edges = history_tree(texts_of([text]), torch.tensor([0]), torch.tensor([2]), hazards, 16, 1)
    assert paths_of(tree) == [(3,), (5,), (7,)]
    assert edges[0, :4].tolist() == [-1, 3 * RANKS, 2 * RANKS + 1, 1 * RANKS + 2]
    assert tree.scores[0, 1:4].exp().tolist() == pytest.approx([0.5, 0.25, 0.125])
    assert [match_class(k) for k in range(10)] == [0, 1, 2, 3, 3, 4, 4, 4, 5, 5]


def test_another_text_is_followed_from_its_beginning_and_joined_again() -> None:
    """A client's guess of the answer: the prompt [7, 7] is no context for it."""
    guess = torch.tensor([[4, 5, 6, 4, 8, 9, 1]], dtype=torch.int32)
    hazards = torch.linspace(0.9, 0.3, CLASSES * RANKS).view(CLASSES, RANKS).flip(0)

    def best_path(answer: list[int]) -> tuple[int, ...]:
        context = torch.tensor([[7, 7, *answer]], dtype=torch.int32)
        texts = Texts(guess, torch.tensor([7]), context, torch.tensor([2 + len(answer)]), torch.tensor([2]))
        tree, _ = history_tree(texts, torch.tensor([0]), torch.tensor([answer[-1]]), hazards, 3, 9)
        paths = paths_of(tree)
        return paths[-1] if paths else ()

    assert best_path([4]) == (5, 6, 4)  # not 8: the guess begins with 4
    assert best_path([4, 5]) == (6, 4, 8)
    assert best_path([3]) == ()
    assert best_path([3, 4, 8]) == (9, 1)  # joined again after a difference


def random_case(seed: int) -> tuple[tuple, dict]:
    """Five slots, of which three are asked for, and an inert row; two texts or one; with and without a table."""
    generator = torch.Generator().manual_seed(1000 + seed)
    texts = texts_of([random_text(5 * seed + k) for k in range(5)])
    if seed % 3 == 1:
        guesses = texts_of([random_text(7 * seed + k) for k in range(5)])
        texts = Texts(guesses.text, guesses.text_lengths, *texts[:2], torch.minimum(texts[1], torch.tensor(3)).int())
        guesses.text_lengths[1] = 0
    frozen = None
    if seed % 2:
        frozen = torch.randint(-1, VOCABULARY, (VOCABULARY, 3, 2 + seed % 3), generator=generator).int()
        frozen[(frozen < 0).cumsum(2) > 0] = -1  # nothing stands behind an end
    growth = Growth(
        1 + seed % 2, 2 + seed % 3 * 3, followers=1 + seed % 4, leaders=1 + seed % 3, rounds=1 + seed % 4,
        scanned=1 + seed % 5, nodes=(12, 200)[seed % 2], by_match=seed % 5 != 0,
    )  # fmt: skip
    requests = torch.tensor([3, 0, -1, 1])
    chain_only = torch.tensor([False, seed % 2 == 0, False, False])
    anchor = torch.tensor([1, 2, 3, 0])
    numbers = (1, 6, 23, 64)[seed % 4], 1 + seed % 9
    return (texts, requests, anchor, random_hazards(seed), *numbers, chain_only, frozen, growth), {}


def assert_as_defined(run, seed: int, device: str = "cpu") -> None:
    arguments, _ = random_case(seed)
    expected = history_tree_reference(*arguments)
    texts, *rest = arguments
    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in rest]
    found = run(Texts(*(None if x is None else x.to(device) for x in texts)), *moved)
    found = HistoryTree(DraftTree(**{n: getattr(found.tree, n).cpu() for n in DTYPES}), found.edges.cpu())
    found.tree.check(VOCABULARY)
    for name in DTYPES:
        torch.testing.assert_close(getattr(found.tree, name), getattr(expected.tree, name), atol=1e-5, rtol=0)
    assert torch.equal(found.edges, expected.edges)


@pytest.mark.parametrize("seed", range(30))
def test_cpu_is_as_defined(seed: int) -> None:
    from vllm_ctc_spec.kernels.history_tree.cpu import history_tree_cpu

    assert_as_defined(history_tree_cpu, seed)


@pytest.mark.parametrize("seed", range(8))
def test_triton_is_as_defined(seed: int, triton_device: str) -> None:
    assert_as_defined(history_tree_triton, seed, triton_device)
