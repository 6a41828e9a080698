"""The layout of a step's rows, against a loop over rows and parents."""

import random

import pytest
import torch

from vllm_ctc_spec.kernels.tree_layout import tree_layout, tree_layout_triton

from .trees import ancestor_bits, node_path, random_tree, starts, tree_tables

JUNK = 99
# Rows of each request and how many of them are tree rows: a full tree of 64, a chunk of a prompt, a request without a
# draft, a list that was cut, one behind a chunk of its prompt, a prompt over several blocks, nothing to sample.
STEPS = {
    "one chain or tree": [(65, 65)],
    "one row": [(1, 1)],
    "mixed": [(65, 65), (1, 1), (7, 1), (4, 4), (9, 3), (1100, 2), (5, 0)],
}


def step(name: str, num_nodes: int, seed: int) -> tuple[tuple, list[list[int]], list[int]]:
    """The inputs of tree_layout, and the trees and slots in them."""
    rng = random.Random(seed)
    counts = STEPS[name]
    trees = [random_tree(num_nodes, rng) for _ in range(len(counts) + 2)]
    slots = rng.sample(range(len(trees)), len(counts))
    positions = torch.cat([torch.arange(num_rows) + rng.randrange(2**33) for num_rows, _ in counts])
    _, depths, ancestors = tree_tables(trees, 1 + num_nodes)
    query_start_loc, cu_num_logits = (starts(column) for column in zip(*counts))
    inputs = positions, query_start_loc, cu_num_logits, torch.tensor(slots, dtype=torch.int32), depths, ancestors
    return inputs, trees, slots


def expected_layout(name: str, positions: list[int], trees: list, slots: list) -> tuple[list, list, list, list]:
    """Positions, ancestors, roots and num_rows."""
    new_positions, bits, roots, num_rows = list(positions), [0] * len(positions), [], []
    end = 0
    for (rows, count), slot in zip(STEPS[name], slots):
        end += rows
        roots.append(end - count)
        num_rows.append(count)
        for node in range(count):
            new_positions[roots[-1] + node] = positions[roots[-1]] + len(node_path(trees[slot], node))
            bits[roots[-1] + node] = ancestor_bits(trees[slot], node)
    return new_positions, bits, roots, num_rows


def assert_layout(run, name: str, padding: int, device: str) -> None:
    inputs, trees, slots = step(name, 64, seed=len(name) + padding)
    num_tokens, num_requests = len(inputs[0]), len(slots)
    outputs = [
        torch.full((length + padding,), JUNK, dtype=dtype, device=device)
        for length, dtype in [(num_tokens, torch.int64)] * 2 + [(num_requests, torch.int32)] * 2
    ]
    on_device = [value.to(device) for value in inputs]
    run(*on_device, *outputs)
    positions, bits, roots, num_rows = expected_layout(name, inputs[0].tolist(), trees, slots)
    assert outputs[0].tolist() == positions + [0] * padding
    assert outputs[1].tolist() == bits + [0] * padding
    assert outputs[2].tolist() == roots + [JUNK] * padding
    assert outputs[3].tolist() == num_rows + [0] * padding
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
    outputs = [torch.full((5,), JUNK, dtype=torch.int64, device=device) for _ in range(2)]
    rows = [torch.full((5,), JUNK, dtype=torch.int32, device=device) for _ in range(2)]
    run(positions, *rest, *outputs, *rows)
    assert outputs[0].tolist() == [11, 12, 13, 0, 0]
    assert outputs[1].tolist() == [0] * 5
