"""Merged trees: against an enumeration of all paths, the properties that serving relies on, and each implementation
against the definition."""

import itertools
import math

import numpy as np
import pytest
import torch

from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree
from vllm_ctc_spec.kernels.tree_merge import MergedTree, tree_merge
from vllm_ctc_spec.kernels.tree_merge.gpu import tree_merge_triton
from vllm_ctc_spec.kernels.tree_merge.reference import tree_merge_reference

VOCABULARY, DEPTH = 4, 3
Paths = dict[tuple[int, ...], float]  # log probabilities


def random_law(
    draws: np.random.Generator, depth: int = DEPTH, prefix: tuple[int, ...] = (), score: float = 0.0
) -> Paths:
    """log P of every path: a random law of the next label, with a rest for none, at every prefix."""
    if len(prefix) == depth:
        return {}
    law = draws.normal(0, 2, VOCABULARY + 1)
    law = (law - np.logaddexp.reduce(law))[:VOCABULARY].tolist()
    found: Paths = {}
    for token, log_p in enumerate(law):
        path = (*prefix, token)
        found[path] = score + log_p
        found |= random_law(draws, depth, path, found[path])
    return found


def tree_of(paths: Paths, num_nodes: int) -> DraftTree:
    """The best nodes of a law, one request."""
    best = sorted(paths, key=lambda path: (-paths[path], len(path)))[:num_nodes]
    row_of = {(): 0} | {path: row for row, path in enumerate(best, 1)}
    fields = {name: torch.zeros(1, 1 + num_nodes, dtype=dtype) for name, dtype in DTYPES.items()}
    fields["parents"] -= 1
    fields["scores"][:, 1:] = -torch.inf
    for path, row in row_of.items():
        if not row:
            continue
        parent = row_of[path[:-1]]
        fields["tokens"][0, row], fields["parents"][0, row], fields["depths"][0, row] = path[-1], parent, len(path)
        fields["scores"][0, row] = paths[path]
        fields["ancestors"][0, row] = fields["ancestors"][0, parent] | (1 << (row - 1))
    return DraftTree(**fields)


def random_trees(seed: int, num_sources: int, num_nodes: int, batch: int = 1) -> list[DraftTree]:
    draws = np.random.default_rng(seed)
    rows = []
    for _ in range(batch):
        of_sources = []
        for _ in range(num_sources):
            law = random_law(draws)
            kept = int(draws.integers(0, len(law) + 1))
            of_sources.append(
                tree_of({path: law[path] for path in sorted(law, key=lambda p: -law[p])[:kept]}, num_nodes)
            )
        rows.append(of_sources)
    return [joined([row[s] for row in rows]) for s in range(num_sources)]


def joined(trees: list[DraftTree]) -> DraftTree:
    return DraftTree(**{name: torch.cat([getattr(tree, name) for tree in trees]) for name in DTYPES})


def tree_with_room(tree: DraftTree, num_nodes: int) -> DraftTree:
    """The same with unused rows behind it."""
    more = num_nodes + 1 - tree.tokens.shape[1]
    unused = {"tokens": None, "parents": -1, "depths": 0, "scores": -math.inf, "ancestors": 0}
    fields = {}
    for name, value in unused.items():
        field = getattr(tree, name)
        behind = field[:, :1].expand(-1, more) if value is None else field.new_full((len(field), more), value)
        fields[name] = torch.cat([field, behind], 1)
    return DraftTree(**fields)


def weights(*shares: float) -> torch.Tensor:
    return torch.tensor([shares]).log()


def paths_of(tree: DraftTree, row: int = 0) -> Paths:
    return {
        tuple(tree.path(row, node)): float(tree.scores[row, node]) for node in range(1, int(tree.num_nodes[row]) + 1)
    }


def assert_equal(a: DraftTree, b: DraftTree, atol: float = 0.0) -> None:
    for name in DTYPES:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=atol, rtol=0)


@pytest.mark.parametrize("seed", range(18))
def test_it_is_the_best_tree_of_the_mixture(seed: int) -> None:
    """Every path of length 3 over 4 labels: the sum of the N largest mixtures, whatever their prefixes."""
    num_nodes, num_sources = (3, 8, 20, 64)[seed % 4], 2 + seed // 12
    trees = random_trees(seed, num_sources, num_nodes)
    share = (0.5, 0.9, 0.01)[seed % 3]
    shares = [share, *[(1 - share) / (num_sources - 1)] * (num_sources - 1)]
    merged, rows = tree_merge(trees, weights(*shares))
    merged.check(VOCABULARY)
    found = {}
    for path in itertools.chain(*(itertools.product(range(VOCABULARY), repeat=k) for k in (1, 2, 3))):
        p = sum(pi * math.exp(paths_of(tree).get(path, -math.inf)) for pi, tree in zip(shares, trees))
        if p > 0:
            found[path] = math.log(p)
    best = sorted(found.values(), reverse=True)[:num_nodes]
    assert merged.scores[0, 1 : 1 + len(best)].tolist() == pytest.approx(best, abs=1e-5)
    assert int(merged.num_nodes) == len(best)
    for node, path in enumerate(paths_of(merged), 1):
        for s, tree in enumerate(trees):
            row = int(rows[0, node, s])
            assert row == -1 if path not in paths_of(tree) else tuple(tree.path(0, row)) == path


@pytest.mark.parametrize("num_nodes", [1, 5, 16])
def test_the_first_rows_are_the_tree_of_fewer_nodes(num_nodes: int) -> None:
    """A batch of many requests verifies the first K rows only: they have to be the best K."""
    trees = random_trees(3, 2, num_nodes, batch=4)
    room = [tree_with_room(tree, 64) for tree in trees]
    share = weights(0.3, 0.7).expand(4, 2)
    few, many = tree_merge(trees, share), tree_merge(room, share)
    assert (many.tree.num_nodes > few.tree.num_nodes).any()
    for name in DTYPES:
        assert torch.equal(getattr(few.tree, name), getattr(many.tree, name)[:, : 1 + num_nodes])
    assert torch.equal(few.rows, many.rows[:, : 1 + num_nodes])


@pytest.mark.parametrize("seed", range(4))
def test_properties(seed: int) -> None:
    a, b, c = random_trees(seed, 3, 24, batch=3)
    half = weights(0.5, 0.5).expand(3, 2)
    assert_equal(tree_merge([a, a], half).tree, a, 1e-6)
    assert_equal(tree_merge([a, b], weights(1, 0).expand(3, 2)).tree, a)
    assert_equal(tree_merge([b, a], weights(0, 1).expand(3, 2)).tree, a)
    assert_equal(tree_merge([a], torch.zeros(3, 1)).tree, a)
    one, other = tree_merge([a, b], half).tree, tree_merge([b, a], half).tree
    three = tree_merge([a, b, c], weights(0.2, 0.5, 0.3).expand(3, 3)).tree
    three.check(VOCABULARY)
    for row in range(3):
        assert paths_of(one, row) == pytest.approx(paths_of(other, row), abs=1e-6)


def test_chain_only_follows_the_best_child() -> None:
    a, b = random_trees(5, 2, 64)
    merged = tree_merge([a, b], weights(0.5, 0.5), torch.tensor([True])).tree
    assert merged.parents[0, : 1 + DEPTH].tolist() == [-1, 0, 1, 2] and int(merged.num_nodes) == DEPTH
    whole = paths_of(tree_merge([a, b], weights(0.5, 0.5)).tree)
    prefix: tuple[int, ...] = ()
    for token in merged.tokens[0, 1 : 1 + DEPTH].tolist():
        children = {path: score for path, score in whole.items() if path[:-1] == prefix}
        prefix = (*prefix, token)
        assert max(children, key=children.__getitem__) == prefix


def assert_as_defined(run, seed: int, device: str = "cpu") -> None:
    num_sources, num_nodes = 1 + seed % 3, (1, 7, 33, 64)[seed % 4]
    trees = random_trees(seed, num_sources, num_nodes, batch=3)
    generator = torch.Generator().manual_seed(seed)
    log_weights = torch.randn(3, num_sources, generator=generator).log_softmax(1)
    log_weights[0, 0] = -torch.inf
    chain_only = torch.tensor([False, True, False])
    stacked = [torch.stack([getattr(t, n) for t in trees], 1) for n in ("tokens", "parents", "scores")]
    expected = tree_merge_reference(*stacked, log_weights, chain_only)
    found = run(*(x.to(device) for x in (*stacked, log_weights, chain_only)))
    found = MergedTree(DraftTree(**{n: getattr(found.tree, n).cpu() for n in DTYPES}), found.rows.cpu())
    found.tree.check(VOCABULARY)
    assert_equal(found.tree, expected.tree, 1e-5)
    used = found.tree.parents >= 0
    assert torch.equal(found.rows[used], expected.rows[used])


@pytest.mark.parametrize("seed", range(12))
def test_cpu_is_as_defined(seed: int) -> None:
    from vllm_ctc_spec.kernels.tree_merge.cpu import tree_merge_cpu

    assert_as_defined(tree_merge_cpu, seed)


@pytest.mark.parametrize("seed", range(12))
def test_triton_is_as_defined(seed: int, triton_device: str) -> None:
    assert_as_defined(tree_merge_triton, seed, triton_device)
