"""What the proposer tells vLLM's CUDA graphs of the draft, which no test here can capture."""

from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from vllm_ctc_spec.serving.options import tree_schedule
from vllm_ctc_spec.serving.proposer import CTCProposer, most_verified_rows


def config(num_drafted: int, max_num_seqs: int, schedule: list | None) -> SimpleNamespace:
    speculative = SimpleNamespace(num_speculative_tokens=num_drafted, num_speculative_tokens_per_batch_size=schedule)
    return SimpleNamespace(speculative_config=speculative, scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs))


@pytest.mark.parametrize(
    ("schedule", "rows"),
    [
        (None, [0, 5, 10, 15, 20, 25, 30]),
        ([(1, 2, 4), (3, 4, 1), (5, 9, 0)], [0, 5, 10, 10, 10, 10, 10]),
        ([(1, 1, 4), (4, 9, 3)], [0, 5, 10, 15, 16, 20, 24]),  # vLLM fills a gap with what comes before it
        ([(1, 2, 9), (3, 3, 2)], [0, 5, 10, 10, 12, 15, 18]),  # and cuts at N
    ],
)
def test_the_draft_graph_stores_as_many_rows_as_up_to_so_many_requests_verify(schedule, rows):
    assert most_verified_rows(config(4, 6, schedule)) == rows


def test_larger_batches_store_no_more_rows_than_trees_may_have():
    assert most_verified_rows(config(31, 1000, tree_schedule(31, 256)))[1000] == 1000  # anchors alone
    assert most_verified_rows(config(31, 32, tree_schedule(31, 256)))[32] == 256


def test_a_captured_draft_always_drafts_and_the_warm_up_counts_nothing(monkeypatch):
    proposer = object.__new__(CTCProposer)
    seen = []
    monkeypatch.setattr(DFlashSpeculator, "capture", lambda self: seen.append(("captured", self._idle)))
    vars(proposer).update(_idle=True, meter=SimpleNamespace(reset=lambda: seen.append("reset")))
    proposer.capture()
    proposer.meter = None
    proposer.capture()
    assert seen == [("captured", False), "reset", ("captured", False)]
