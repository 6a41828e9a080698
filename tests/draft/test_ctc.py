"""Frames to drafts: what the searches are of, and that a chain of the best alignment is its collapse."""

import pytest
import torch

from vllm_ctc_spec.draft.ctc import CHAINS, TREES, default_width, draft_chain, draft_tree, read_frames
from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.drafter.lattice import FrameOutputs, Lattice, transition_log_probs
from vllm_ctc_spec.kernels.contract import Budget
from vllm_ctc_spec.serving.options import SEARCHES

B, T, V, N = 3, 8, 20, 5


def outputs(lattice: str, seed: int = 0) -> FrameOutputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator) * 3
    if lattice == "ctc":
        return FrameOutputs(logits, Lattice(blank_odds=torch.randn(B, T, generator=generator)))
    query, key = (torch.randn(B, size, 4, generator=generator) for size in (1 + T, T))
    return FrameOutputs(logits, Lattice(log_transitions=transition_log_probs(query, key, torch.zeros(T))))


def test_every_search_is_an_option_and_every_option_a_search():
    assert {"chain": tuple(CHAINS), "tree": tuple(TREES)} == SEARCHES


def test_small_trees_have_more_candidates_than_nodes():
    assert [default_width(nodes) for nodes in (1, 8, 16, 24, 32, 64)] == [32, 32, 32, 48, 64, 64]


@pytest.mark.parametrize("lattice", ["ctc", "transitions"])
def test_chain_and_tree_follow_the_oracle_of_the_outputs(lattice):
    emitted = outputs(lattice)
    frames, stats = read_frames(emitted, torch.arange(B), None)
    labels, lengths = draft_chain("prefix", frames, stats, N)
    tree = draft_tree("prefix", frames, Budget(N, default_width(N), T))
    for row in range(B):
        odds, steps = (None if x is None else x[row] for x in emitted.lattice)
        log_p = oracle.frame_log_probs(emitted.logits[row], odds)
        chain = oracle.chain(log_p, N, anchor=row, log_transitions=steps)
        assert labels[row, : lengths[row]].tolist() == list(chain.labels)
        best = oracle.best_prefixes(log_p, N, depth=T, anchor=row, log_transitions=steps)
        assert [tuple(tree.path(row, node)) for node in range(1, 1 + N)] == [prefix for prefix, _ in best]


def test_the_argmax_chain_is_the_collapse_of_the_best_alignment():
    emitted = outputs("ctc", seed=1)
    frames, stats = read_frames(emitted, torch.arange(B), None)
    labels, lengths = draft_chain("argmax", frames, stats, N)
    for row in range(B):
        alignment = oracle.frame_log_probs(emitted.logits[row], emitted.lattice.blank_odds[row]).argmax(-1).tolist()
        assert labels[row, : lengths[row]].tolist() == oracle.collapse(alignment, V)[:N]
