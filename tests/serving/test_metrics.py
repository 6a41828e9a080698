"""The draft meter against a count on the host, its file against Prometheus' own reader, and its one warning."""

import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_ctc_spec.kernels.contract import DraftTree, Frames
from vllm_ctc_spec.kernels.tree_mask import tree_mask
from vllm_ctc_spec.serving import metrics

REQUESTS, NODES, FRAMES = 5, 6, 9
CPU = torch.device("cpu")


@pytest.fixture
def meter(tmp_path, monkeypatch) -> Iterator[metrics.DraftMeter]:
    monkeypatch.setattr(metrics, "PUBLISH_SECONDS", 0.01)
    meter = metrics.DraftMeter(metrics.CounterFile(str(tmp_path), ("m", "0", "exact")), REQUESTS, NODES, FRAMES, CPU)
    yield meter
    wait_for_timers()


def wait_for_timers() -> None:
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def exposed(folder) -> dict[str, float]:
    """Samples on `/metrics` of a server whose workers write into `folder`."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    return {sample.name: sample.value for metric in registry.collect() for sample in metric.samples}


def wait_until(holds, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


def random_tree(rng: random.Random, used: int, chain: bool) -> list[int]:
    """Parents of row 0 to N."""
    parents = [-1] + [node - 1 if chain else rng.randrange(node) for node in range(1, used + 1)]
    return parents + [-1] * (NODES - used)


def as_draft_tree(parents: list[list[int]]) -> DraftTree:
    rows = torch.tensor(parents, dtype=torch.int32)
    depths, ancestors = tree_mask(rows)
    return DraftTree(torch.zeros_like(rows).long(), rows, depths, torch.zeros(rows.shape), ancestors)


def count(parents: list[int], scheduled: int, most: int = NODES) -> list[int]:
    """drafts, nodes, labels, stopped drafts of one verified draft."""
    if scheduled <= 0:
        return [0, 0, 0, 0]
    depth, nodes = [0], 0
    for parent in parents[1 : 1 + scheduled]:
        if parent >= 0:
            nodes += 1
            depth.append(depth[parent] + 1)
    return [1, nodes, max(depth), int(nodes < min(scheduled, most))]


def test_trees_count_as_what_was_scheduled_of_them(meter):
    rng = random.Random(0)
    total = torch.zeros(4, dtype=torch.int64)
    for _ in range(100):
        requests = rng.sample(range(REQUESTS), 3)
        chain_only = [rng.random() < 0.3 for _ in requests]
        most = [4 if is_chain else NODES for is_chain in chain_only]
        parents = [random_tree(rng, rng.randint(0, limit), chain) for chain, limit in zip(chain_only, most)]
        meter.record(torch.tensor(requests), as_draft_tree(parents), torch.tensor(most))
        # vLLM's batch has another order; a request in the middle of its prefill has no logits (0), one that has not
        # drafted has the anchor's (1).
        order = rng.sample(range(3), 3)
        logits = [rng.randint(0, 1 + NODES) for _ in order]
        meter.observe(torch.tensor([requests[i] for i in order], dtype=torch.int32), torch.tensor(logits).int())
        for i, rows in zip(order, logits):
            total += torch.tensor(count(parents[i], rows - 1, most[i]))
    assert total[3] > 20 and torch.equal(meter.totals[:4], total)


def test_chains_count_as_what_was_scheduled_of_them(meter):
    rng = random.Random(1)
    total = torch.zeros(4, dtype=torch.int64)
    for _ in range(100):
        length, rows = rng.randint(0, NODES), rng.randint(0, 1 + NODES)
        request = torch.tensor([rng.randrange(REQUESTS)])
        meter.record(request, torch.tensor([length], dtype=torch.int32))
        meter.observe(request.int(), torch.tensor([rows]).int())
        total += torch.tensor(count(random_tree(rng, length, chain=True), rows - 1))
    assert total[3] > 20 and torch.equal(meter.totals[:4], total)


def test_padding_rows_of_a_batch_reach_no_request(meter):
    meter.record(torch.tensor([2, -1, -1]), torch.tensor([3, 5, 6], dtype=torch.int32))
    meter.observe(torch.arange(REQUESTS, dtype=torch.int32), torch.full((REQUESTS,), 1 + NODES))
    assert meter.totals[1] == 3


def test_prometheus_reads_zeros_before_the_first_draft(meter, tmp_path):
    assert exposed(tmp_path) == {f"{name}_total": 0 for name in metrics.COUNTERS}


def test_the_last_step_is_published_without_another_one(meter, tmp_path):
    request, lengths = torch.tensor([1]), torch.tensor([4], dtype=torch.int32)
    for steps in (1, 2, 3):
        meter.record(request, lengths)
        meter.observe(request, torch.tensor([1 + NODES]))
        wait_until(lambda steps=steps: exposed(tmp_path)["vllm_ctc_spec:drafts_total"] == steps)
        expected = {"drafts": 1, "draft_nodes": 4, "draft_labels": 4, "stopped_drafts": 1, "draft_frames": FRAMES}
        expected["broken_frames"] = 0
        assert exposed(tmp_path) == {f"vllm_ctc_spec:{name}_total": steps * each for name, each in expected.items()}


def test_sources_are_published_by_name_and_forgotten_with_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "PUBLISH_SECONDS", 0.01)
    counts, names = torch.tensor([[5, 7], [2, 3]]), ("ctc", "cache")
    file = metrics.CounterFile(str(tmp_path), ("m", "0", "exact"), names)
    meter = metrics.DraftMeter(file, REQUESTS, NODES, FRAMES, CPU, counts)

    def published() -> dict[tuple[str, str], float]:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(tmp_path))
        samples = [sample for metric in registry.collect() for sample in metric.samples]
        return {(s.name, s.labels["source"]): s.value for s in samples if "source" in s.labels}

    meter.observe(torch.tensor([1]), torch.tensor([1 + NODES]))
    nodes, accepted = (f"{name}_total" for name in metrics.SOURCE_COUNTERS)
    expected = {(nodes, "ctc"): 5, (nodes, "cache"): 7, (accepted, "ctc"): 2, (accepted, "cache"): 3}
    wait_until(lambda: published() == expected)
    meter.reset()
    wait_until(lambda: published() == dict.fromkeys(expected, 0))
    assert not counts.any()
    wait_for_timers()


class SlowCopy:
    """Counts on the host that arrive when the test says so."""

    def __init__(self):
        self.sent = self.arrived = [0] * len(metrics.COUNTERS)

    def copy_(self, totals: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.sent = totals.tolist()

    def tolist(self) -> list[int]:
        return self.arrived


def test_a_copy_that_arrives_late_is_waited_for_without_the_device(meter, tmp_path):
    """CUDA may not be called by the thread, not even to ask whether a copy is done: vLLM may be capturing graphs."""
    meter._host = slow = SlowCopy()
    meter.record(torch.tensor([1]), torch.tensor([4], dtype=torch.int32))
    meter.observe(torch.tensor([1]), torch.tensor([1 + NODES]))
    meter.totals = None
    time.sleep(5 * metrics.PUBLISH_SECONDS)
    assert exposed(tmp_path)["vllm_ctc_spec:drafts_total"] == 0
    slow.arrived = slow.sent
    wait_until(lambda: exposed(tmp_path)["vllm_ctc_spec:drafts_total"] == 1)
    wait_until(lambda: meter._timer is None)


def test_what_was_counted_is_forgotten(meter, tmp_path):
    request, lengths = torch.tensor([1]), torch.tensor([4], dtype=torch.int32)
    for drafts in (3, 2):
        for _ in range(drafts):
            meter.record(request, lengths)
            meter.observe(request, torch.tensor([1 + NODES]))
        wait_until(lambda drafts=drafts: exposed(tmp_path)["vllm_ctc_spec:drafts_total"] == drafts)
        meter.reset()
        wait_until(lambda: exposed(tmp_path)["vllm_ctc_spec:draft_nodes_total"] == 0)


def frames(broken: list[tuple[int, int, float]], transitions: torch.Tensor | None = None) -> Frames:
    """Of two requests, with (request, frame, value) in place of numbers."""
    log_scale = torch.full((2, FRAMES), -3.0)
    for request, frame, value in broken:
        log_scale[request, frame] = value
    logits, log_blank = torch.zeros(2, FRAMES, 1), torch.zeros(2, FRAMES)
    return Frames(logits, log_scale, log_blank, torch.tensor([0, 0]), transitions=transitions)


def test_broken_frames_are_counted_where_a_draft_is_verified(meter):
    requests, lengths = torch.tensor([3, 1]), torch.tensor([2, 2], dtype=torch.int32)
    nan, inf = float("nan"), float("inf")
    transitions = torch.zeros(2, 1 + FRAMES, FRAMES)
    transitions[1, 4, [5, 6]] = nan
    for given, logits, counted in (
        (frames([]), [2, 2], 0),
        (frames([(0, 0, nan), (0, 3, inf), (1, 8, -inf)]), [2, 1 + NODES], 3),
        (frames([(0, 0, nan), (0, 3, inf), (1, 8, -inf)]), [1, 2], 1),  # no draft of the first was scheduled
        (frames([(0, 0, nan), (1, 5, nan)], transitions), [2, 2], 3),
        (frames([]), [2, 2], 0),
    ):
        before = int(meter.totals[metrics.BROKEN])
        meter.record(requests, lengths, frames=given)
        meter.observe(requests.int(), torch.tensor(logits).int())
        assert meter.totals[metrics.BROKEN] - before == counted
        assert meter.totals[1] > 0


@pytest.mark.parametrize("with_file", [True, False])
def test_one_sentence_says_that_frames_are_broken(with_file, meter, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(metrics.logger, "warning", lambda text, *values: said.append(text % values))
    if not with_file:
        meter._counter_file = None
    requests, lengths = torch.tensor([0, 1]), torch.tensor([0, 0], dtype=torch.int32)
    for step, broken in enumerate(([], [(0, 2, float("nan"))], [(1, 2, float("nan"))])):
        meter.record(requests, lengths, frames=frames(broken))
        meter.observe(requests, torch.tensor([2, 2]))
        wait_for_timers()
        assert len(said) == min(step, 1)
    (text,) = said
    assert "emits frames that are not numbers (1 so far)" in text and text.endswith(".") and "\n" not in text
    if with_file:
        assert exposed(tmp_path)["vllm_ctc_spec:broken_frames_total"] == 2


def test_engines_keep_their_labels_and_workers_of_one_engine_add_up(tmp_path):
    for engine, drafts in (("0", 1), ("0", 2), ("1", 5)):
        metrics.CounterFile(str(tmp_path), ("m", engine, "exact")).write([drafts, 0, 0, 0, 0])
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    text = generate_latest(registry).decode()
    assert "# TYPE vllm_ctc_spec:drafts_total counter" in text
    assert 'vllm_ctc_spec:drafts_total{acceptance="exact",engine="0",model_name="m"} 3.0' in text
    assert 'vllm_ctc_spec:drafts_total{acceptance="exact",engine="1",model_name="m"} 5.0' in text


def test_several_api_servers_read_the_folder_that_vllm_made(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert metrics.folder() == str(tmp_path)
