"""Between the target's forward and the next draft nothing is read on the host: it all runs on tensors without data.

A tensor on the device "meta" has a shape and no values, so that whatever would wait for a GPU's result (`.item()`,
`.tolist()`, `.cpu()`, `nonzero`, a boolean index, an `if` on a tensor) fails there. Kernels launch and compute nothing.
"""

import importlib
import pkgutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

import vllm_ctc_spec.kernels
import vllm_ctc_spec.serving.tree.model_state
import vllm_ctc_spec.serving.tree.verification
from vllm_ctc_spec.accept.pivot import Classifier
from vllm_ctc_spec.accept.rule import Rows, make_rule
from vllm_ctc_spec.accept.walk import walk
from vllm_ctc_spec.draft.cache import CacheSource
from vllm_ctc_spec.draft.client import ClientSource
from vllm_ctc_spec.draft.ctc import CTCSource, default_width, read_frames
from vllm_ctc_spec.draft.merged import MergedSource
from vllm_ctc_spec.draft.source import DraftStep, RequestTokens
from vllm_ctc_spec.drafter.lattice import FrameOutputs, TransitionHead, read_lattice
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.kernels import kv_compaction
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, Frames
from vllm_ctc_spec.kernels.frame_stats import FrameStats
from vllm_ctc_spec.serving.hidden import hidden_rows
from vllm_ctc_spec.serving.metrics import CounterFile, DraftMeter
from vllm_ctc_spec.serving.proposer import spread_label_logits
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict
from vllm_ctc_spec.serving.tree.model_state import TreeModelState
from vllm_ctc_spec.serving.tree.table import TreeTable
from vllm_ctc_spec.serving.tree.verification import TreeRejectionSampler

META = torch.device("meta")
REQUESTS, FRAMES, NODES, VOCABULARY, LABELS, HIDDEN, RANK, TOKENS = 4, 24, 16, 1000, 300, 32, 8, 256
ON_GPU = "frame_stats", "collapse", "prefix_chain", "prefix_search", "ctc_transform", "tree_layout", "tree_walk"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


READS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "branch": lambda x: 1 if x.any() else 0,
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "tensor as an index's end": lambda x: x[: x.sum()],
    "repetitions": lambda x: torch.repeat_interleave(x, x.long()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_on_the_host_fails_here(read):
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        read(empty(3))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that are launched, by the functions that a GPU gets.

    A kernel that is not told the strides of a tensor takes it for contiguous.
    """
    names: list[str] = []

    class Recorder:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *args, **options) -> None:
            names.append(self.name)
            told = {1, *(arg for arg in args if isinstance(arg, int))}
            for arg in args:
                if isinstance(arg, Tensor) and not arg.is_contiguous():
                    strides = {stride for stride, size in zip(arg.stride(), arg.shape) if size > 1}
                    assert strides <= told, f"{self.name} is not told the strides {strides} of {arg.shape}"

    for found in pkgutil.walk_packages(vllm_ctc_spec.kernels.__path__, "vllm_ctc_spec.kernels."):
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction):
                monkeypatch.setattr(module, name, Recorder(name))
    for function in ON_GPU:  # tensors without a device get what a CPU gets
        module = importlib.import_module(f"vllm_ctc_spec.kernels.{function}")
        if function != "prefix_search":
            monkeypatch.setattr(module, f"{function}_reference", getattr(module, f"{function}_triton"))
    monkeypatch.setattr(kv_compaction, "compact_kv_reference", kv_compaction.compact_kv_triton)
    for function in ("prefix_search", "tree_merge", "history_tree"):
        of_cpu, of_gpu = (
            importlib.import_module(f"vllm_ctc_spec.kernels.{function}.{part}") for part in ("cpu", "gpu")
        )
        monkeypatch.setattr(of_cpu, f"{function}_cpu", getattr(of_gpu, f"{function}_triton"))
    return names


@pytest.fixture
def meter(tmp_path) -> DraftMeter:
    return DraftMeter(CounterFile(str(tmp_path), ("m", "0", "exact")), REQUESTS, NODES, FRAMES, META)


def emitted(lattice: str, num_labels: int) -> tuple[Frames, FrameStats]:
    """As the drafter's module and its heads give them to the proposer."""
    config = SimpleNamespace(hidden_size=HIDDEN, transition_rank=RANK, num_frames=FRAMES)
    with META:
        transitions = TransitionHead(config) if lattice == "transitions" else None
        blank = torch.nn.Linear(HIDDEN, 1) if lattice == "ctc" else None
    logits = empty(REQUESTS, FRAMES, num_labels, dtype=torch.bfloat16)
    outputs = FrameOutputs(logits, read_lattice(empty(REQUESTS, 1 + FRAMES, HIDDEN), blank, transitions))
    markov = empty(num_labels + 1, RANK), empty(num_labels, RANK)
    return read_frames(outputs, empty(REQUESTS, dtype=torch.int64), markov)


def slots_of_requests() -> Tensor:
    """Every T-th element, as the proposer has them."""
    return empty(REQUESTS * FRAMES, dtype=torch.int64)[::FRAMES]


@pytest.mark.parametrize(
    ("search", "lattice", "sampled", "kernel"),
    [
        ("prefix", "ctc", False, "search_kernel"),
        ("prefix", "transitions", False, "search_kernel"),
        ("prefix", "slots", True, "chain_kernel"),
        ("argmax", "ctc", False, "_collapse_kernel"),
    ],
)
def test_a_chain_is_drafted_and_counted_without_the_host(search, lattice, sampled, kernel, launched, meter):
    requests = slots_of_requests()
    frames, stats = emitted(lattice, VOCABULARY)
    sampling = ChainSampling(
        empty(REQUESTS), empty(REQUESTS, dtype=torch.int64), requests, requests, empty(REQUESTS, NODES, VOCABULARY)
    )
    labels, lengths = CTCSource(search).chain(frames, stats, NODES, sampling if sampled else None)
    meter.record(requests, lengths, frames=frames)
    assert labels.shape == (REQUESTS, NODES)
    assert kernel in launched and launched.count("_frame_stats_kernel") == 1  # one pass over the vocabulary


@pytest.mark.parametrize(
    ("search", "lattice", "kernel"),
    [
        ("prefix", "ctc", "search_kernel"),
        ("prefix", "transitions", "search_kernel"),
        ("transform", "ctc", "beam_kernel"),
    ],
)
def test_a_tree_is_drafted_kept_and_counted_without_the_host(search, lattice, kernel, launched, meter):
    table, requests = TreeTable(REQUESTS, NODES, META), slots_of_requests()
    frames, _ = emitted(lattice, VOCABULARY)
    step = DraftStep(requests, frames.anchor, table.chain_only[requests], frames)
    tree = CTCSource(search).draft(step, Budget(NODES, default_width(NODES), 8))
    table.store(requests, tree)
    meter.record(requests, tree, most=torch.where(step.chain_only, 8, NODES), frames=frames)
    assert tree.tokens.shape == (REQUESTS, 1 + NODES)
    assert kernel in launched and launched.count("_frame_stats_kernel") == 1  # one pass over the vocabulary


def test_sources_are_asked_merged_and_told_without_the_host(launched, tmp_path):
    """As the proposer has them: every T-th slot, and vLLM's own tensors behind a verification."""
    words = empty(REQUESTS, dtype=torch.int32)
    tokens, size = RequestTokens(empty(REQUESTS, 512, dtype=torch.int32), words), (REQUESTS, NODES)
    frozen = empty(VOCABULARY, 8, 3, dtype=torch.int32)
    sources = (
        CTCSource("prefix"), CacheSource(tokens, *size, frozen),
        ClientSource(tokens, tokens.token_ids, words, words, NODES),
    )  # fmt: skip
    merged = MergedSource(sources, tokens, *size)
    frames, _ = emitted("transitions", LABELS)
    vocabulary = DraftVocabulary(empty(LABELS, dtype=torch.int64), empty(VOCABULARY, dtype=torch.int64))
    anchor, chain_only = empty(REQUESTS, dtype=torch.int64), empty(REQUESTS, dtype=torch.bool)
    step = DraftStep(slots_of_requests(), anchor, chain_only, frames, vocabulary)
    tree = merged.draft(step, Budget(NODES, default_width(NODES), 8))
    merged.prepare(words, words, words)
    merged.reset(1)
    meter = DraftMeter(
        CounterFile(str(tmp_path), ("m", "0", "exact"), ("a", "b")), REQUESTS, NODES, 0, META, merged.counts
    )
    meter._timer, meter._host = object(), empty(len(meter._host), dtype=torch.int64)
    meter.record(step.requests, tree, most=words.long())
    meter.observe(words, words.long())
    assert tree.tokens.shape == (REQUESTS, 1 + NODES)
    assert {"_scan_kernel", "_grow_kernel", "_tree_merge_kernel", "search_kernel"} <= set(launched)


def test_a_rule_is_walked_without_the_host(launched):
    class Everything:
        exact = False

        def loose(self, rows: Rows) -> Tensor:
            return torch.ones_like(rows.parent, dtype=torch.bool)

    tokens, parents = empty(TOKENS, dtype=torch.int64), TreeTable(REQUESTS, NODES, META).parents
    requests, starts = empty(REQUESTS, dtype=torch.int32), empty(REQUESTS + 1, dtype=torch.int32)
    sampled, num_sampled, path = walk(
        Everything(), empty(TOKENS, VOCABULARY), tokens, tokens, parents, requests, starts
    )
    assert sampled.shape == path.shape == (REQUESTS, 1 + NODES) and num_sampled.shape == (REQUESTS,)


def test_labels_become_tokens_without_the_host(launched):
    vocabulary = DraftVocabulary(empty(LABELS, dtype=torch.int64), empty(VOCABULARY, dtype=torch.int64))
    anchor = vocabulary.to_labels(empty(REQUESTS * (1 + FRAMES), dtype=torch.int32)[:: 1 + FRAMES].long())
    assert vocabulary.to_tokens(empty(REQUESTS, NODES, dtype=torch.int64)).shape == (REQUESTS, NODES)
    draft_logits = empty(REQUESTS, NODES, VOCABULARY)
    spread_label_logits(empty(REQUESTS, NODES, LABELS), vocabulary.token_ids, slots_of_requests(), draft_logits)
    assert anchor.shape == (REQUESTS,)


CLASSIFIER = Classifier(torch.ones(64, HIDDEN + 2), torch.ones(64), torch.ones(64), torch.tensor(0.0))
PIVOT = make_rule("pivot", threshold=0.3, min_probability=1e-4, digest="", classifier=CLASSIFIER)


@pytest.mark.parametrize("rule", [make_rule("exact"), make_rule("fly", window=6), PIVOT], ids=str)
def test_a_tree_is_laid_out_verified_and_counted_without_the_host(launched, meter, monkeypatch, rule):
    trees, layout = TreeTable(REQUESTS, NODES, META), TreeLayout.allocate(REQUESTS, TOKENS, [NODES], META)
    meter._timer = object()  # the thread that copies counters out is none of the step's business
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda self, *args, **kwargs: {})
    state = object.__new__(type("State", (TreeModelState,), {"trees": trees, "layout": layout, "compaction": None}))
    rows = np.arange(REQUESTS + 1, dtype=np.int32) * (1 + NODES)
    num_tokens, starts = int(rows[-1]), empty(REQUESTS + 1, dtype=torch.int32)
    slots = empty(REQUESTS, dtype=torch.int32)
    input_batch = SimpleNamespace(
        num_reqs=REQUESTS, num_tokens=num_tokens, num_draft_tokens=REQUESTS * NODES, query_start_loc=starts,
        positions=empty(num_tokens, dtype=torch.int64), query_start_loc_np=rows, cu_num_logits=starts,
        cu_num_logits_np=rows, idx_mapping=slots,
    )  # fmt: skip
    state.prepare_attn(input_batch, CUDAGraphMode.NONE, (), empty(1, num_tokens, dtype=torch.int64), [], None)

    sampler = object.__new__(TreeRejectionSampler)
    states = SimpleNamespace(temperature=SimpleNamespace(gpu=empty(REQUESTS)), seeds=SimpleNamespace(gpu=slots.long()))
    vllms = SimpleNamespace(
        apply_sampling_params=lambda logits, *args: logits, sampling_states=states, use_fp64_gumbel=False
    )
    target = SimpleNamespace(compute_logits=lambda hidden: empty(len(hidden), VOCABULARY))
    hidden = hidden_rows(target, rule)
    logits = target.compute_logits(empty(num_tokens, HIDDEN))
    vars(sampler).update(trees=trees, layout=layout, sampler=vllms, rule=rule.to(META), hidden=hidden, _paths=[])
    tokens = empty(num_tokens, dtype=torch.int64)
    monkeypatch.setattr(vllm_ctc_spec.serving.tree.verification, "gumbel_sample", lambda *args, **options: tokens)
    _, sampled, num_sampled = sampler._verify(
        logits=logits, draft_logits=None, draft_sampled=tokens, pos=tokens, cu_num_logits=starts,
        idx_mapping=slots, idx_mapping_np=np.arange(REQUESTS), expanded_idx_mapping=tokens,
        expanded_local_pos=tokens.int(), seq_lens_upper_bound_np=rows[1:], verify_draft_sampled=tokens,
    )  # fmt: skip
    assert sampled.shape == (REQUESTS, 1 + NODES)
    layout.put_path_first(Verdict(sampler._paths[-1], num_sampled), [empty(num_tokens, HIDDEN)] * 5)
    assert launched.count("_compact_kv_kernel") == 1  # for all states
    meter._host = empty(*meter.totals.shape, dtype=torch.int64)  # a copy that nobody waits for
    meter.observe(slots.long(), num_sampled)
    assert {"_tree_layout_kernel", "_tree_walk_kernel"} <= set(launched)
