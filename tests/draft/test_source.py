"""Sources are found by name, and CTC's drafts what its searches draft."""

import dataclasses

import pytest
import torch

from vllm_ctc_spec.draft.ctc import CHAINS, TREES, CTCSource, draft_chain, draft_tree, read_frames
from vllm_ctc_spec.draft.source import SOURCES, DraftStep, source_class
from vllm_ctc_spec.drafter.lattice import FrameOutputs, Lattice
from vllm_ctc_spec.kernels.contract import Budget

B, T, V, N = 3, 8, 20, 5


@pytest.fixture
def emitted():
    generator = torch.Generator().manual_seed(0)
    blank = Lattice(blank_odds=torch.randn(B, T, generator=generator))
    return read_frames(FrameOutputs(3 * torch.randn(B, T, V, generator=generator), blank), torch.arange(B), None)


@pytest.mark.parametrize("name", SOURCES)
def test_sources_have_the_name_that_they_are_found_by(name):
    source = source_class(name)
    assert source.name == name and source.reads <= {"frames"}


@pytest.mark.parametrize("search", TREES)
def test_ctc_drafts_the_trees_of_its_search_and_chains_where_they_have_to_be(search, emitted):
    frames, _ = emitted
    chain_only, budget = torch.tensor([False, True, False]), Budget(N, 8, T)
    step = DraftStep(torch.arange(B), frames.anchor, chain_only, frames)
    given, expected = CTCSource(search).draft(step, budget), draft_tree(search, frames, budget, chain_only)
    for field in dataclasses.fields(expected):
        assert torch.equal(getattr(given, field.name), getattr(expected, field.name))
    is_chain = (given.parents[:, 1:] == torch.arange(N)) | (given.parents[:, 1:] < 0)
    assert is_chain.all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("search", CHAINS)
def test_ctc_drafts_the_chains_of_its_search(search, emitted):
    for given, expected in zip(CTCSource(search).chain(*emitted, N, None), draft_chain(search, *emitted, N)):
        assert torch.equal(given, expected)
