"""After a tree the drafter sees what it would see after a chain: frames for equal contexts are equal."""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from vllm_ctc_spec.draft.source import DraftSource, DraftStep
from vllm_ctc_spec.kernels.contract import Budget, DraftTree
from vllm_ctc_spec.serving.proposer import CTCProposer
from vllm_ctc_spec.serving.tree.layout import TreeLayout
from vllm_ctc_spec.serving.tree.table import TreeTable

from .conftest import TREE

PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 =", "Once there were seven dwarfs", "abcabcabcabcabc", "The end of"]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


class Recorder:
    """The source of an engine, and the frames of every context that it drafted for."""

    def __init__(self, source: DraftSource, request_states):
        self.source, self.request_states = source, request_states
        self.name, self.reads, self.prepare, self.reset = source.name, source.reads, source.prepare, source.reset
        self.frames: dict[tuple[int, ...], torch.Tensor] = {}

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        log_label = step.frames.logits + step.frames.log_scale[:, :, None]
        for of_request, slot in zip(log_label, step.requests.tolist(), strict=True):
            length = int(self.request_states.total_len.gpu[slot])
            context = self.request_states.all_token_ids.gpu[slot][:length]
            self.frames[tuple(context.tolist())] = of_request.clone()
        return self.source.draft(step, budget)


@pytest.fixture
def record(engine, tiny_pair):
    """record(): the frames by context of an engine that drafts trees for PROMPTS, under the patches of the moment."""

    def run() -> dict[tuple[int, ...], torch.Tensor]:
        llm = engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), **TREE})
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        recorder = runner.speculator.source = Recorder(runner.speculator.source, runner.req_states)
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return recorder.frames

    return run


def chains_only(monkeypatch):
    reset = TreeTable.reset
    monkeypatch.setattr(TreeTable, "reset", lambda self, request, chain_only: reset(self, request, True))


def largest_difference(one: dict, other: dict) -> float:
    common = one.keys() & other.keys()
    assert len(common) > 50
    return max((one[context] - other[context]).abs().max().item() for context in common)


def test_frames_after_trees_are_frames_after_chains(record, monkeypatch):
    after_trees = record()
    with monkeypatch.context() as patch:
        patch.setattr(TreeLayout, "put_path_first", lambda self, verdict, states: None)
        out_of_order = record()
    chains_only(monkeypatch)
    after_chains = record()
    assert largest_difference(after_trees, after_chains) < 1e-3
    # A test of the test: without the accepted rows in front, the drafter reads rejected ones.
    assert largest_difference(out_of_order, after_chains) > 0.1


def test_the_draft_module_rests_while_a_batch_is_too_large_for_drafts(engine, tiny_pair, monkeypatch):
    forwards = []
    run_model = CTCProposer._run_model
    monkeypatch.setattr(CTCProposer, "_run_model", lambda self, *a, **k: forwards.append(a) or run_model(self, *a, **k))
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **TREE, "ctc_tree_rows": 17}
    llm = engine(tiny_pair.target, speculative, max_num_batched_tokens=512)
    forwards.clear()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)  # all prompts fit into the first step, and all end together
    assert forwards == []
    llm.counters.clear()
    llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
    assert len(forwards) >= llm.counters["drafts"] > 0


def test_no_schedule_reaches_the_graphs_of_the_draft(monkeypatch):
    """They would be captured for 1 + T rows a request and, for nothing, for every other size of the schedule."""
    seen = []
    monkeypatch.setattr(
        DFlashSpeculator, "init_cudagraph_manager",
        lambda self, mode: seen.append(self.vllm_config.speculative_config.num_speculative_tokens_per_batch_size),
    )  # fmt: skip
    proposer = object.__new__(CTCProposer)
    schedule = [(1, 4, 16), (5, 9, 0)]
    whole = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens_per_batch_size=schedule))
    proposer.vllm_config = whole
    proposer.init_cudagraph_manager(CUDAGraphMode.FULL)
    assert seen == [None]
    assert proposer.vllm_config is whole and whole.speculative_config.num_speculative_tokens_per_batch_size is schedule
