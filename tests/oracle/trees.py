"""Trees and steps that the tests of layout, attention, walk and compaction share."""

import random

import torch


def random_tree(num_nodes: int, rng: random.Random) -> list[int]:
    """Parents, the anchor's first. A chain where rng draws one."""
    is_chain = rng.random() < 0.2
    return [-1] + [node - 1 if is_chain else rng.randrange(node) for node in range(1, num_nodes + 1)]


def node_path(parents: list[int], node: int) -> list[int]:
    """The nodes from below the anchor to `node`; none to the anchor and to an unused row."""
    return [] if parents[node] < 0 else [*node_path(parents, parents[node]), node]


def ancestor_bits(parents: list[int], node: int) -> int:
    """As a signed 64-bit word: bit i - 1 is set for node i on the path."""
    bits = sum(1 << (i - 1) for i in node_path(parents, node))
    return bits - 2**64 if bits >= 2**63 else bits


def tree_tables(trees: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parents, depths and ancestors [S, width] of trees with up to `width` rows, padded as `DraftTree` pads."""
    parents = torch.full((len(trees), width), -1, dtype=torch.int32)
    depths = torch.zeros(len(trees), width, dtype=torch.int32)
    ancestors = torch.zeros(len(trees), width, dtype=torch.int64)
    for row, tree in enumerate(trees):
        parents[row, : len(tree)] = torch.tensor(tree)
        depths[row, : len(tree)] = torch.tensor([len(node_path(tree, node)) for node in range(len(tree))])
        ancestors[row, : len(tree)] = torch.tensor([ancestor_bits(tree, node) for node in range(len(tree))])
    return parents, depths, ancestors


def starts(counts: list[int]) -> torch.Tensor:
    """The running sums of the counts, from 0: [len(counts) + 1] int32."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
