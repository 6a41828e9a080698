"""After a tree the drafter sees what it would see after a chain: frames for equal contexts are equal."""

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

import vllm_ctc_spec.serving.proposer
from vllm_ctc_spec.serving.proposer import CTCProposer
from vllm_ctc_spec.serving.tree.state import TreeStep, TreeTable

from .conftest import TREE

PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 =", "Once there were seven dwarfs", "abcabcabcabcabc", "The end of"]
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


class Recorder(CTCProposer):
    """Keeps the frames of every context that it drafted for."""

    instances: list["Recorder"] = []
    request_states = None

    def __init__(self, *args):
        super().__init__(*args)
        self.frames: dict[tuple[int, ...], torch.Tensor] = {}
        self.instances.append(self)

    def _search_tree(self, frames, requests):
        if self.request_states is not None:
            log_label = frames.logits + frames.log_scale[:, :, None]
            for of_request, slot in zip(log_label, requests.tolist(), strict=True):
                length = int(self.request_states.total_len.gpu[slot])
                context = self.request_states.all_token_ids.gpu[slot][:length]
                self.frames[tuple(context.tolist())] = of_request.clone()
        return super()._search_tree(frames, requests)


@pytest.fixture
def record(engine, tiny_pair, monkeypatch):
    """record(): the frames by context of an engine that drafts trees for PROMPTS, under the patches of the moment."""

    def run() -> dict[tuple[int, ...], torch.Tensor]:
        monkeypatch.setattr(vllm_ctc_spec.serving.proposer, "CTCProposer", Recorder)
        llm = engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), **TREE})
        recorder = Recorder.instances.pop()
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        recorder.request_states = runner.req_states
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return recorder.frames

    return run


def chains_only(monkeypatch):
    reset = TreeTable.reset
    monkeypatch.setattr(TreeTable, "reset", lambda self, slot, chain_only: reset(self, slot, True))


def largest_difference(one: dict, other: dict) -> float:
    common = one.keys() & other.keys()
    assert len(common) > 50
    return max((one[context] - other[context]).abs().max().item() for context in common)


def test_frames_after_trees_are_frames_after_chains(record, monkeypatch):
    after_trees = record()
    with monkeypatch.context() as patch:
        patch.setattr(TreeStep, "put_path_first", lambda self, states: None)
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
