"""Depths and ancestor sets, against a walk from every node to the anchor."""

import pytest
import torch

from vllm_ctc_spec.kernels.tree_mask import tree_mask, tree_mask_triton

from ..oracle.frames import generator
from ..oracle.trees import tree_tables

SHAPES = ["chain", "star", "unused", "caterpillar", "random", "random"]


def forest(shapes: list[str], num_nodes: int) -> torch.Tensor:
    """[len(shapes), 1 + N] int32; a random tree leaves the last rows unused."""
    node = torch.arange(num_nodes + 1)
    rows = []
    for seed, shape in enumerate(shapes):
        if shape == "random":
            parent = (torch.rand(num_nodes + 1, generator=generator(seed)) * node).long()
            used = num_nodes - seed % 3
        else:
            parent = {"chain": node - 1, "star": node * 0, "caterpillar": (node - 1) // 2 * 2, "unused": node}[shape]
            used = 0 if shape == "unused" else num_nodes
        rows.append(torch.where((node >= 1) & (node <= used), parent, -1))
    return torch.stack(rows).int()


def assert_by_definition(parents: torch.Tensor, depths: torch.Tensor, ancestors: torch.Tensor) -> None:
    _, *expected = tree_tables(parents.tolist(), parents.shape[1])
    torch.testing.assert_close([depths, ancestors], expected, rtol=0, atol=0)  # and of the same dtypes


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 17, 63, 64])
def test_reference_on_every_shape(num_nodes: int) -> None:
    parents = forest(SHAPES, num_nodes)
    before = parents.clone()
    assert_by_definition(parents, *tree_mask(parents))
    assert torch.equal(parents, before)


def test_reference_on_many_random_trees() -> None:
    parents = forest(["random"] * 100, 64)
    assert_by_definition(parents, *tree_mask(parents))


def test_node_64_is_the_sign_bit() -> None:
    depths, ancestors = tree_mask(forest(["chain"], 64))
    assert (depths[0, 64], ancestors[0, 64]) == (64, -1)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 8, 17, 63, 64])
def test_triton_on_every_shape(num_nodes: int, triton_device: str) -> None:
    parents = forest(SHAPES, num_nodes)
    depths, ancestors = tree_mask_triton(parents.to(triton_device))
    assert_by_definition(parents, depths.cpu(), ancestors.cpu())
