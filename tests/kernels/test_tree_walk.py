"""The walk down a tree, against a search for the child among all nodes."""

import random

import pytest
import torch

from vllm_ctc_spec.kernels.tree_walk import tree_walk, tree_walk_triton

from ..oracle.trees import node_path, random_tree, starts, tree_tables

NUM_LOGITS = [65, 1, 2, 30, 0, 64]


def walk_by_definition(
    parents: list[int], draft: list[int], target: list[int], loose: list[bool]
) -> tuple[list[int], list[int]]:
    """The emitted tokens and the nodes after which they are emitted."""
    nodes, emitted = [0], []
    while True:
        rows = list(enumerate(zip(parents, draft)))[1:]
        children = [node for node, (parent, token) in rows if parent == nodes[-1] and token >= 0]
        wanted = [node for node in children if draft[node] == target[nodes[-1]]]
        below = wanted + [node for node in children if loose[node]]
        if not below:
            return [*emitted, target[nodes[-1]]], nodes
        nodes.append(below[0])
        emitted.append(draft[below[0]])


def random_step(seed: int) -> tuple[list[list[int]], list[int], list[list[int]], list[list[int]]]:
    """Trees, requests, and the draft and target tokens of each request. Siblings differ, targets often hit a child."""
    rng = random.Random(seed)
    trees = [random_tree(rng.choice([64, 64, 5]), rng) for _ in range(len(NUM_LOGITS) + 2)]
    requests = rng.sample(range(len(trees)), len(NUM_LOGITS))
    drafts, targets = [], []
    for request, num_logits in zip(requests, NUM_LOGITS):
        tree = (trees[request] + [-1] * 64)[:num_logits]
        # The token of a node is its number among its siblings, so that it stands in many places of the tree.
        draft = [tree[:node].count(parent) for node, parent in enumerate(tree)]
        drafts.append(draft)
        targets.append([rng.choice([0, 0, 0, 1, 2**40]) for _ in range(num_logits)])
    return trees, requests, drafts, targets


def assert_walk(run, seed: int, device: str, with_loose: bool) -> int:
    trees, requests, drafts, targets = random_step(seed)
    rng = random.Random(seed)
    loose = [[with_loose and rng.random() < 0.3 for _ in draft] for draft in drafts]
    for draft in drafts:
        if with_loose:
            draft[:] = [rng.choice([token] * 9 + [-1]) for token in draft]
    parents, _, _ = tree_tables(trees, 65)
    flat = [torch.tensor([token for row in rows for token in row] + [-1, 0]) for rows in (targets, drafts)]
    inputs = [*flat, parents, torch.tensor(requests, dtype=torch.int32), starts(NUM_LOGITS)]
    if with_loose:
        inputs.append(torch.tensor([bit for bits in loose for bit in bits] + [True, True]))
    sampled, num_sampled, path = run(*(value.to(device) for value in inputs))
    assert (sampled.dtype, num_sampled.dtype, path.dtype) == (torch.int64, torch.int32, torch.int32)
    for r, (request, *rows) in enumerate(zip(requests, drafts, targets, loose)):
        tokens, nodes = walk_by_definition(trees[request], *rows) if rows[0] else ([], [])
        assert num_sampled[r] == len(tokens)
        assert sampled[r].tolist() == tokens + [0] * (65 - len(tokens))
        assert path[r].tolist() == nodes + list(range(len(nodes), 65))
        if nodes:
            assert node_path(trees[request], nodes[-1]) == nodes[1:]
    return int(num_sampled.max())


@pytest.mark.parametrize("with_loose", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_reference_on_random_trees(seed: int, with_loose: bool) -> None:
    assert_walk(tree_walk, seed, "cpu", with_loose)


@pytest.mark.parametrize("with_loose", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_triton_on_random_trees(seed: int, with_loose: bool, triton_device: str) -> None:
    assert_walk(tree_walk_triton, seed, triton_device, with_loose)


def test_random_trees_are_walked_down() -> None:
    exact, loose = (max(assert_walk(tree_walk, seed, "cpu", bits) for seed in range(20)) for bits in (False, True))
    assert 6 <= exact < loose


def assert_special_walks(run, device: str) -> None:
    """A whole chain of 3; the same chain of which one node is given; a filler -1 that a target of -1 must not hit."""
    parents = torch.tensor([[-1, 0, 1, 2], [-1, 0, 0, -1]], dtype=torch.int32, device=device)
    draft = torch.tensor([50, 7, 8, 9] + [50, 7] + [50, -1, -1], device=device)
    target = torch.tensor([7, 8, 9, 10] + [7, 8] + [-1, 8, 8], device=device)
    requests = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    sampled, num_sampled, path = run(target, draft, parents, requests, starts([4, 2, 3]).to(device))
    assert num_sampled.tolist() == [4, 2, 1]
    assert sampled.tolist() == [[7, 8, 9, 10], [7, 8, 0, 0], [-1, 0, 0, 0]]
    assert path.tolist() == [[0, 1, 2, 3]] * 3


def test_reference_on_special_walks() -> None:
    assert_special_walks(tree_walk, "cpu")


def test_triton_on_special_walks(triton_device: str) -> None:
    assert_special_walks(tree_walk_triton, triton_device)
