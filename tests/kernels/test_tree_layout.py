"""The layout of a step's rows, against a loop over rows and parents."""

import random

import pytest
import torch

from vllm_ctc_spec.kernels.contract import TreeRows
from vllm_ctc_spec.kernels.tree_layout import tree_layout, tree_layout_triton

from ..oracle.trees import ancestor_bits, node_path, random_tree, starts, tree_tables

JUNK = 99
# Rows of each request and how many of them are tree rows: a full tree of 64, a chunk of a prompt, a request without a
# draft, a list that was cut, one behind a chunk of its prompt, a prompt over several blocks, nothing to sample.
STEPS = {
    "one chain or tree": [(65, 65)],
    "one row": [(1, 1)],
    "mixed": [(65, 65), (1, 1), (7, 1), (4, 4), (9, 3), (1100, 2), (5, 0)],
}


def step(name: str, num_nodes: int, seed: int) -> tuple[tuple, list[list[int]], list[int]]:
    """The inputs of tree_layout, and the trees and requests in them."""
    rng = random.Random(seed)
    counts = STEPS[name]
    trees = [random_tree(num_nodes, rng) for _ in range(len(counts) + 2)]
    requests = rng.sample(range(len(trees)), len(counts))
    positions = torch.cat([torch.arange(num_rows) + rng.randrange(2**33) for num_rows, _ in counts])
    _, depths, ancestors = tree_tables(trees, 1 + num_nodes)
    query_start_loc, cu_num_logits = (starts(column) for column in zip(*counts))
    inputs = positions, query_start_loc, cu_num_logits, torch.tensor(requests, dtype=torch.int32), depths, ancestors
    return inputs, trees, requests


def expected_layout(name: str, positions: list[int], trees: list, requests: list) -> tuple[list, list, list, list]:
    """Positions, ancestors, anchor_rows and num_rows."""
    new_positions, bits, anchor_rows, num_rows = list(positions), [0] * len(positions), [], []
    end = 0
    for (rows, count), request in zip(STEPS[name], requests):
        end += rows
        anchor_rows.append(end - count)
        num_rows.append(count)
        for node in range(count):
            new_positions[anchor_rows[-1] + node] = positions[anchor_rows[-1]] + len(node_path(trees[request], node))
            bits[anchor_rows[-1] + node] = ancestor_bits(trees[request], node)
    return new_positions, bits, anchor_rows, num_rows


def outputs(num_tokens: int, num_requests: int, device: str) -> tuple[torch.Tensor, TreeRows]:
    """Positions and rows of these lengths, to be written."""
    of_rows = [torch.full((num_tokens,), JUNK, dtype=torch.int64, device=device) for _ in range(2)]
    of_requests = [torch.full((num_requests,), JUNK, dtype=torch.int32, device=device) for _ in range(2)]
    return of_rows[0], TreeRows(*of_requests, of_rows[1])


def assert_layout(run, name: str, padding: int, device: str) -> None:
    inputs, trees, requests = step(name, 64, seed=len(name) + padding)
    num_tokens, num_requests = len(inputs[0]), len(requests)
    out_positions, out_rows = outputs(num_tokens + padding, num_requests + padding, device)
    on_device = [value.to(device) for value in inputs]
    run(*on_device, out_positions, out_rows)
    positions, bits, anchor_rows, num_rows = expected_layout(name, inputs[0].tolist(), trees, requests)
    assert out_positions.tolist() == positions + [0] * padding
    assert out_rows.ancestors.tolist() == bits + [0] * padding
    assert out_rows.anchor_rows.tolist() == anchor_rows + [JUNK] * padding
    assert out_rows.num_rows.tolist() == num_rows + [0] * padding
    assert torch.equal(on_device[0].cpu(), inputs[0]), "positions were written"


@pytest.mark.parametrize("padding", [0, 1, 2500])
@pytest.mark.parametrize("name", STEPS)
def test_reference_on_steps(name: str, padding: int) -> None:
    assert_layout(tree_layout, name, padding, "cpu")


@pytest.mark.parametrize("padding", [0, 2500])
@pytest.mark.parametrize("name", STEPS)
def test_triton_on_steps(name: str, padding: int, triton_device: str) -> None:
    assert_layout(tree_layout_triton, name, padding, triton_device)


def test_reference_copies_rows_that_no_request_owns() -> None:
    assert_unowned_rows(tree_layout, "cpu")


def test_triton_copies_rows_that_no_request_owns(triton_device: str) -> None:
    assert_unowned_rows(tree_layout_triton, triton_device)


def assert_unowned_rows(run, device: str) -> None:
    """A padded step: `positions` is longer than the requests' rows."""
    inputs, _, _ = step("one row", 3, seed=0)
    positions, *rest = (value.to(device) for value in inputs)
    positions = torch.tensor([11, 12, 13], device=device)
    out_positions, out_rows = outputs(5, 5, device)
    run(positions, *rest, out_positions, out_rows)
    assert out_positions.tolist() == [11, 12, 13, 0, 0]
    assert out_rows.ancestors.tolist() == [0] * 5
