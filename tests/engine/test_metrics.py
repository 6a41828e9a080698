"""`/metrics` of real servers against a count on the host, in an engine that drafts the same in this process."""

import json
import re
import time
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from server import Server
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_ctc_spec.draft.source import DraftStep
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, DraftTree, Frames
from vllm_ctc_spec.kernels.frame_stats import FrameStats
from vllm_ctc_spec.serving import metrics, plugin

QUESTIONS = (
    "Mira picks 12 plums and eats 4 of them. How many plums are left?",
    "A box holds 6 eggs. How many eggs are in 7 boxes?",
    "Omar walks 3 miles a day for 2 weeks. How many miles does he walk?",
)
MAX_TOKENS = 40
ROOT = Path(__file__).resolve().parents[2]
OURS = [f"{name}_total" for name in metrics.COUNTERS]
VLLM = "vllm:spec_decode_num_"


class HostCount:
    """A source of drafts that counts, row by row, what the one in its place has drafted, when vLLM verifies it."""

    def __init__(self, llm, patch: pytest.MonkeyPatch):
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        self.proposer = executor.driver_worker.worker.model_runner.speculator
        self.source = source = self.proposer.source
        self.name, self.reads, self.prepare, self.reset = source.name, source.reads, source.prepare, source.reset
        self.parents: dict[int, list[int]] = {}  # by request slot, of rows 1 to N
        self.counts: Counter[str] = Counter()
        self.propose = self.proposer.propose
        self.proposer.source = self
        patch.setattr(self.proposer, "propose", self.after_a_verification)

    def chain(self, frames: Frames, stats: FrameStats, num_labels: int, sampling: ChainSampling | None):
        labels, lengths = self.source.chain(frames, stats, num_labels, sampling)
        requests = self.proposer.sample_idx_mapping[:: self.proposer.num_frames].tolist()
        for request, length in zip(requests, lengths.tolist()):
            self.parents[request] = [*range(length), *[-1] * (num_labels - length)]
        return labels, lengths

    def draft(self, step: DraftStep, budget: Budget) -> DraftTree:
        tree = self.source.draft(step, budget)
        self.parents.update(zip(step.requests.tolist(), tree.parents[:, 1:].tolist(), strict=True))
        return tree

    def after_a_verification(self, input_batch, *args, **kwargs):
        verified = input_batch.num_draft_tokens_per_req
        for slot, scheduled in zip(input_batch.idx_mapping_np.tolist(), [] if verified is None else verified.tolist()):
            if scheduled:
                self.count(self.parents[slot][:scheduled], self.most(slot, scheduled))
        return self.propose(input_batch, *args, **kwargs)

    def most(self, slot: int, scheduled: int) -> int:
        drafter = self.proposer
        is_chain_in_tree = drafter.trees is not None and bool(drafter.trees.chain_only[slot])
        return min(scheduled, drafter.options.tree_depth) if is_chain_in_tree else scheduled

    def count(self, parents: list[int], most: int) -> None:
        depths = [0]
        for parent in parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        nodes = sum(parent >= 0 for parent in parents)
        self.counts.update(
            drafts=1,
            draft_nodes=nodes,
            draft_labels=max(depths),
            stopped_drafts=int(nodes < most),
            draft_frames=self.proposer.num_frames,
        )


def scrape(server: Server) -> dict[str, float]:
    """Samples by name, summed over labels; accepted labels also by depth, and by engine."""
    with urllib.request.urlopen(f"{server.base_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] += sample.value
            if sample.name == f"{VLLM}accepted_tokens_per_pos_total":
                sums[f"depth {int(sample.labels['position']) + 1}"] += sample.value
            if sample.name in OURS:
                assert (sample.labels["model_name"], sample.labels["acceptance"]) == (server.model, "exact")
                sums[f"{sample.name} of engine {sample.labels['engine']}"] += sample.value
    return dict(sums)


def ask(server: Server, question: str) -> None:
    server.client().chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
    )


def scrape_when_complete(server: Server) -> dict[str, float]:
    """Ours come up to a second after vLLM's."""
    deadline = time.monotonic() + 5 * metrics.PUBLISH_SECONDS
    while True:
        sums = scrape(server)
        if sums["vllm_ctc_spec:drafts_total"] == sums[f"{VLLM}drafts_total"] or time.monotonic() > deadline:
            return sums
        time.sleep(0.1)


def start_server(pair, speculative: dict, log_path, *args: str) -> Server:
    """With a user's environment: no setting of the tests reaches the server."""
    with pytest.MonkeyPatch.context() as environment:
        for name in (plugin.V2_VARIABLE, "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
            environment.delenv(name, raising=False)
        return Server(pair.target, speculative, log_path=log_path, extra_args=("--max-model-len", "512", *args))


def drafting(pair, kind: str) -> dict:
    """The paper's chains, which end early now and then, and trees that fill their budget."""
    if kind == "chain":
        drafter = {"model": str(pair.drafter.with_name("drafter-ctc")), "num_speculative_tokens": 8}
        return {"method": "ctc", "ctc_draft": "chain", "ctc_search": "argmax", **drafter}
    return {"method": "ctc", "ctc_draft": "tree", "model": str(pair.drafter), "num_speculative_tokens": 16}


# Trees are counted against the same oracle in the batch below; their server takes another 40 s.
@pytest.mark.parametrize("kind", ["chain", pytest.param("tree", marks=pytest.mark.slow)])
def test_metrics_of_a_server_are_what_was_drafted(kind, engine, demo_pair, monkeypatch, tmp_path):
    speculative = drafting(demo_pair, kind)
    llm = engine(demo_pair.target, speculative, max_model_len=512, max_num_seqs=4)
    on_host = HostCount(llm, monkeypatch)
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for question in QUESTIONS:
        llm.chat([{"role": "user", "content": question}], sampling, use_tqdm=False)

    with start_server(demo_pair, speculative, tmp_path / "server.log") as server:
        seen = [scrape(server)]
        assert all(seen[0][name] == 0 for name in OURS)
        for question in QUESTIONS:
            ask(server, question)
            seen.append(scrape(server))
        after = scrape_when_complete(server)
        check_dashboard(after)
    for before, now in zip(seen, [*seen[1:], after]):
        assert all(before[name] <= now[name] for name in OURS)

    assert {name: after[f"vllm_ctc_spec:{name}_total"] for name in on_host.counts} == on_host.counts
    drafts, accepted = after[f"{VLLM}drafts_total"], after[f"{VLLM}accepted_tokens_total"]
    assert 1 + accepted / drafts == llm.acceptance_length > 1.5
    budget = speculative["num_speculative_tokens"]
    assert sum(after[f"depth {depth}"] for depth in range(1, budget + 1)) == accepted
    size = after["vllm_ctc_spec:draft_nodes_total"] / drafts
    stop_share = after["vllm_ctc_spec:stopped_drafts_total"] / drafts
    if kind == "chain":
        assert 1 < size < budget and 0 < stop_share < 1
        assert after["vllm_ctc_spec:draft_labels_total"] == after["vllm_ctc_spec:draft_nodes_total"]
    else:
        assert size == after[f"{VLLM}draft_tokens_total"] / drafts > 15 and stop_share == 0
    assert 0 < after["vllm_ctc_spec:draft_labels_total"] / after["vllm_ctc_spec:draft_frames_total"] < 1


def check_dashboard(samples: dict[str, float]) -> None:
    board = json.loads((ROOT / "docs/grafana.json").read_text(encoding="utf-8"))
    assert {panel["title"] for panel in board["panels"]} >= {"Acceptance length", "Collapse ratio", "Stop share"}
    names = set(re.findall(r"\bvllm\w*:\w+", json.dumps(board)))
    assert set(OURS) < names
    assert names - set(samples) == set()


@pytest.mark.slow
def test_data_parallel_engines_and_several_api_servers(demo_pair, tmp_path):
    """Two engines, two API servers (vLLM's default then): whichever answers knows the counters of both engines."""
    speculative = drafting(demo_pair, "tree")
    with start_server(demo_pair, speculative, tmp_path / "server.log", "--data-parallel-size", "2") as server:
        for question in QUESTIONS * 2:
            ask(server, question)
        after = scrape_when_complete(server)
        again = [scrape(server) for _ in range(6)]
    assert after["vllm_ctc_spec:drafts_total"] == after[f"{VLLM}drafts_total"] > 0
    for engine in "01":
        assert after[f"vllm_ctc_spec:drafts_total of engine {engine}"] > 0
    assert all(sums[name] == after[name] for sums in again for name in OURS)


@pytest.mark.slow
@pytest.mark.skipif(
    not current_platform.is_cpu() and torch.cuda.device_count() < 2, reason="two ranks need two GPUs, or none"
)
def test_ranks_that_draft_the_same_count_once(engine, tiny_pair):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter)}
    llm = engine(tiny_pair.target, speculative, tensor_parallel_size=2, distributed_executor_backend="mp")
    llm.generate(["A plum", "A box of eggs"], SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
    time.sleep(2 * metrics.PUBLISH_SECONDS)
    labels = {"model_name": str(tiny_pair.target), "engine": "0", "acceptance": "exact"}
    drafts = REGISTRY.get_sample_value("vllm_ctc_spec:drafts_total", labels)
    assert drafts == llm.counters["drafts"] > 0


def test_batches_with_chains_among_trees(engine, demo_pair, monkeypatch):
    """Requests with penalties draft chains of another length; batches verify smaller trees."""
    llm = engine(demo_pair.target, drafting(demo_pair, "tree"), max_model_len=512, max_num_seqs=4)
    on_host = HostCount(llm, monkeypatch)
    before = on_host.proposer.meter.totals.clone()
    settings = [{}, {"frequency_penalty": 0.5}, {}, {"temperature": 0.7, "seed": 1}, {"repetition_penalty": 1.1}]
    sampling = [SamplingParams(**{"temperature": 0, "max_tokens": MAX_TOKENS, **setting}) for setting in settings]
    prompts = [f"{question} " * 3 for question in (*QUESTIONS, *QUESTIONS[:2])]
    llm.generate(prompts, sampling, use_tqdm=False)
    counted = dict(zip(metrics.COUNTERS, (on_host.proposer.meter.totals - before)[: metrics.SEEN].tolist()))
    assert {name.removeprefix("vllm_ctc_spec:"): value for name, value in counted.items()} == {
        name: on_host.counts[name]
        for name in ("drafts", "draft_nodes", "draft_labels", "stopped_drafts", "broken_frames")
    }
    assert on_host.counts["draft_nodes"] < 16 * on_host.counts["drafts"]


@pytest.mark.parametrize("disabled", [False, True])
def test_without_statistics_nothing_is_counted(disabled, demo_pair):
    speculative = drafting(demo_pair, "tree")
    config = EngineArgs(
        model=str(demo_pair.target), dtype="float32", speculative_config=speculative, disable_log_stats=disabled
    ).create_engine_config()
    assert hasattr(config.observability_config, metrics.FOLDER) is not disabled
