"""Times beside floors and budgets, on a CPU with a stopwatch that runs a stage once and says a second."""

from types import SimpleNamespace

import budgets
import pytest
import torch
from kernel_cases import Model

from vllm_ctc_spec.kernels.prefix_chain.reference import prefix_chain_reference
from vllm_ctc_spec.kernels.prefix_search.cpu import prefix_search_cpu

RUN = {"vllm": None, "torch": "2", "python": "3", "gpu": "NVIDIA H200", "date": "2026-01-01", "command": "python x"}


@pytest.fixture
def measured(monkeypatch):
    """measured(batches): rows and failures of small shapes; searches and compaction are those of a CPU."""

    def once(run):
        run()
        return 1e6

    for name, value in dict(
        VOCABULARY=100, NODES=8, FRAMES=4, PATH=4, LABELS=3, SEARCH_MICROSECONDS={1: 40.0, 2: 120.0},
        CANDIDATES_MICROSECONDS={1: 15.0, 2: 80.0}, CHAIN_MICROSECONDS={1: 60.0, 2: 2e6}, graph_microseconds=once,
        MODEL=Model(context=32, heads=2, kv_heads=1, head_size=16, layers=2),
        stock_attention=lambda arguments: (2e6, "stock"), copy_bandwidth=lambda device, seconds: 1e6,
        search_candidates=lambda tokens, frames, budget: prefix_search_cpu(frames, budget),
        prefix_chain_triton=prefix_chain_reference,
    ).items():  # fmt: skip
        monkeypatch.setattr(budgets, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return lambda *batches: budgets.measure(torch.device("cpu"), batches)


def test_time_beside_floors_and_budget(measured) -> None:
    rows, failures = measured(1, 2)
    assert len(rows) == 10 and failures == []
    assert [(row.stage, row.batch) for row in rows if not row.within] == [
        ("log-softmax and candidates", 1), ("log-softmax and candidates", 2),
        ("prefix search and mask", 1), ("prefix search and mask", 2),
        ("sampled chain of 8 labels", 1), ("compaction", 1),
    ]  # fmt: skip
    table = budgets.to_markdown(RUN, rows, failures)
    assert table.count("| OVER |") == 6
    # 1 x 4 x 100 logits of 2 bytes at 1 MB/s
    assert "| log-softmax and candidates | 1 | 1000000.0 | 15.0 | OVER | 800.0 |" in table
    assert "| compaction | 2 | 1000000.0 | - |  |" in table and "0.50 x stock" in table


def test_a_stage_that_fails_leaves_the_others(measured, monkeypatch) -> None:
    def broken(setting):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(budgets.STAGES, "tree attention", broken)
    rows, failures = measured(1)
    assert [row.stage for row in rows] == [stage for stage in budgets.STAGES if stage != "tree attention"]
    assert failures == ["tree attention, batch 1: RuntimeError: no kernel image"]
    assert f"- failed: {failures[0]}" in budgets.to_markdown(RUN, rows, failures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys) -> None:
    assert budgets.main([]) == 1
    assert "budgets are of a GPU, and there is none" in capsys.readouterr().err
