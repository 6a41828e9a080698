"""Every barrier that a GPU needs is there, and no program touches what another one of its launch writes."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl

from vllm_ctc_spec.kernels.contract import Budget
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform_triton
from vllm_ctc_spec.kernels.history_tree import CLASSES, RANKS, Growth, Texts
from vllm_ctc_spec.kernels.history_tree.gpu import history_tree_triton
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv_triton
from vllm_ctc_spec.kernels.prefix_chain import candidates, prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_search import prefix_search_triton
from vllm_ctc_spec.kernels.tree_merge.gpu import tree_merge_triton

from ..oracle.frames import markov_head, random_frames, sampling_for, transitions_between
from .conflicts import watched
from .conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU's memory cannot be watched")
FRAMES, BUDGET = random_frames(2, 4, 20, seed=0), Budget(6, 8, 3)
WITH_HEAD = FRAMES._replace(markov=markov_head(20, 5))


def chain() -> None:
    prefix_chain_triton(candidates(WITH_HEAD, 8), WITH_HEAD, 3, sampling_for(2, 3, 20, [1.0, 0.0]))


def search() -> None:
    prefix_search_triton(WITH_HEAD, BUDGET)


def search_with_transitions() -> None:
    frames = FRAMES._replace(transitions=transitions_between("spread", 2, 4))
    prefix_search_triton(frames, BUDGET, torch.tensor([True, False]))


def transform() -> None:
    ctc_transform_triton(FRAMES, BUDGET, torch.tensor([True, False]))


def compaction() -> None:
    caches = [torch.randn(4, 2, 4, 16) for _ in range(2)]  # kept until the end of the launch
    slots, anchor_rows = torch.arange(16), torch.tensor([0, 8], dtype=torch.int32)
    path = torch.tensor([[0, 2, 3, 7], [0, 1, 4, 6]], dtype=torch.int32)
    compact_kv_triton(CachePointers(caches), slots, anchor_rows, path, torch.tensor([4, 3], dtype=torch.int32))


def merge() -> None:
    tree = prefix_search_triton(FRAMES, BUDGET)
    fields = (torch.stack([x, x], 1) for x in (tree.tokens, tree.parents, tree.scores))
    tree_merge_triton(*fields, torch.full((2, 2), -0.7))


def history() -> None:
    text = torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5]], dtype=torch.int32)
    lengths, requests = torch.full((2,), 8, dtype=torch.int32), torch.arange(2)
    hazards, growth = torch.full((CLASSES, RANKS), 0.5), Growth(leaders=2, rounds=2, scanned=3, nodes=16)
    history_tree_triton(Texts(text, lengths, text, lengths), requests, requests, hazards, 6, 6, growth=growth)


@pytest.mark.parametrize("run", [chain, search, search_with_transitions, transform, compaction, merge, history])
def test_nothing_is_left_to_chance(run: Callable[[], None], triton_device: str) -> None:
    with watched() as found:
        run()
    assert found == set()


@pytest.mark.parametrize(
    ("run", "kernel"),
    [
        (chain, "chain_kernel"),
        (search, "_best_tokens_kernel"),
        (search, "search_kernel"),
        (transform, "beam_kernel"),
        (transform, "rank_kernel"),
        (merge, "_tree_merge_kernel"),
        (history, "_grow_kernel"),
    ],
)
def test_missing_barriers_are_found(run: Callable[[], None], kernel: str, triton_device: str) -> None:
    with watched(with_barriers=False) as found:
        run()
    assert [text for text in found if text.startswith(f"{kernel}: ")]


@triton.jit
def _shift_kernel(x_ptr, STEP: tl.constexpr):
    """Each program moves one element to the place of the next."""
    at = tl.program_id(0)
    tl.store(x_ptr + at + STEP, tl.load(x_ptr + at))


def test_programs_that_share_what_they_write_are_found(triton_device: str) -> None:
    with watched() as found:
        _shift_kernel[(3,)](torch.zeros(9), STEP=1)
        assert len(found) == 1 and "reads what another program writes" in found.pop()
        _shift_kernel[(3,)](torch.zeros(9), STEP=5)
    assert found == set()
