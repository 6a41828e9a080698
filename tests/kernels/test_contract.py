"""The contract: a sound tree passes its validator, each rule, broken once, is named, and kernels need nothing else."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

from vllm_ctc_spec.kernels.contract import DTYPES, DraftTree

from .launches import kernel_modules

#   anchor 9 - 3 - 5
#            \ 4 - 3, and an unused row
SOUND = {
    "tokens": [9, 3, 4, 5, 3, 9],
    "parents": [-1, 0, 0, 1, 2, -1],
    "depths": [0, 1, 1, 2, 2, 0],
    "scores": [0.0, -0.5, -0.7, -0.7, -2.0, -torch.inf],
    "ancestors": [0, 0b0001, 0b0010, 0b0101, 0b1010, 0],
}


def tree(**changes) -> DraftTree:
    """SOUND twice; `field=(row, value)` changes the second request."""
    fields = {}
    for name, values in SOUND.items():
        fields[name] = torch.tensor([values, values], dtype=DTYPES[name])
        if name in changes:
            row, value = changes[name]
            fields[name][1, row] = value
    return DraftTree(**fields)


def test_a_sound_tree_passes():
    tree().check(10)
    assert tree().num_nodes.tolist() == [4, 4]
    assert [tree().path(0, node) for node in range(5)] == [[], [3], [4], [3, 5], [4, 3]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": (2, 10)}, "not in the vocabulary"),
        ({"tokens": (2, -1)}, "not in the vocabulary"),
        ({"parents": (0, 0)}, "request 1: row 0 is no anchor"),
        ({"scores": (0, 1.0)}, "row 0 is no anchor"),
        ({"parents": (1, 2)}, "request 1: node 1 stands before its parent 2"),
        ({"parents": (5, 0)}, "node 5 is not one below its parent"),
        ({"parents": (2, -1)}, "node 2 stands before its parent -1"),
        ({"tokens": (2, 3)}, "node 2 repeats its sibling's token"),
        ({"depths": (3, 1)}, "node 3 is not one below its parent"),
        ({"scores": (3, -0.6)}, "node 3 scores above the row before it"),
        ({"ancestors": (3, 0b0111)}, "node 3 has wrong ancestors"),
        ({"scores": (5, -3.0)}, "node 5 is unused but not empty"),
    ],
    ids=str,
)
def test_every_broken_rule_is_named(change, problem):
    with pytest.raises(ValueError, match=problem):
        tree(**change).check(10)


def test_shapes_and_dtypes_are_checked():
    with pytest.raises(ValueError, match="depths is torch.int64"):
        dataclasses.replace(tree(), depths=tree().depths.long()).check(10)
    with pytest.raises(ValueError, match="scores is "):
        dataclasses.replace(tree(), scores=tree().scores[:, 1:]).check(10)
    wide = {name: torch.zeros(1, 66, dtype=dtype) for name, dtype in DTYPES.items()}
    with pytest.raises(ValueError, match="65 nodes do not fit"):
        DraftTree(**wide).check(10)


def test_kernels_import_nothing_of_the_package_that_imports_them() -> None:
    for module in kernel_modules():
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in names if name.partition(".")[0] == "vllm_ctc_spec"]
            assert all(name.startswith("vllm_ctc_spec.kernels.") for name in ours), (module.__name__, ours)
