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
import vllm_ctc_spec.serving.proposer
import vllm_ctc_spec.serving.tree.model_state
import vllm_ctc_spec.serving.tree.verification
from vllm_ctc_spec.drafter.lattice import TransitionHead
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.kernels import prefix_search
from vllm_ctc_spec.serving.metrics import CounterFile, DraftMeter
from vllm_ctc_spec.serving.model import CTCDraftModel
from vllm_ctc_spec.serving.proposer import CTCProposer
from vllm_ctc_spec.serving.tree.model_state import TreeModelState
from vllm_ctc_spec.serving.tree.state import TreeStep, TreeTable
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
    monkeypatch.setattr(prefix_search.cpu, "prefix_search_cpu", prefix_search.gpu.prefix_search_triton)
    return names


def make_proposer(
    draft: str, search: str, lattice: str, sampled: bool, folder, draft_vocabulary: bool = False
) -> CTCProposer:
    proposer = object.__new__(CTCProposer)
    config = SimpleNamespace(hidden_size=HIDDEN, transition_rank=RANK, num_frames=FRAMES)
    with META:
        head = TransitionHead(config) if lattice == "transitions" else None
        blank = torch.nn.Linear(HIDDEN, 1) if lattice == "ctc" else None
    inner = SimpleNamespace(blank_head=blank, transition_head=head)
    model = SimpleNamespace(
        model=inner,
        compute_logits=lambda hidden: empty(hidden.shape[0], VOCABULARY, dtype=torch.bfloat16),
        markov_tables=(empty(VOCABULARY, RANK), empty(VOCABULARY, RANK)) if search == "prefix" else None,
        vocabulary=None, draft_head=None,
    )  # fmt: skip
    if draft_vocabulary:
        ids = empty(LABELS, dtype=torch.int64)
        model.vocabulary = DraftVocabulary(ids, empty(VOCABULARY, dtype=torch.int64))
        model.draft_head = lambda hidden: empty(hidden.shape[0], LABELS, dtype=torch.bfloat16)
        model.markov_tables = empty(LABELS + 1, RANK), empty(LABELS, RANK)
    model.compute_frames = lambda slots: CTCDraftModel.compute_frames(model, slots)
    is_tree = draft == "tree"
    vars(proposer).update(
        _idle=False, num_frames=FRAMES, num_query_per_req=1 + FRAMES, num_labels=NODES, model=model,
        options=SimpleNamespace(draft=draft, search=search, tree_width=None, tree_depth=8),
        trees=TreeTable(REQUESTS, NODES, META) if is_tree else None,
        tree_step=TreeStep.allocate(REQUESTS, TOKENS, NODES, META) if is_tree else None,
        meter=DraftMeter(CounterFile(str(folder), ("m", "0")), REQUESTS, NODES, FRAMES, META),
        input_buffers=SimpleNamespace(input_ids=empty(REQUESTS * (1 + FRAMES), dtype=torch.int32)),
        sample_idx_mapping=empty(REQUESTS * FRAMES, dtype=torch.int64),
        sample_pos=empty(REQUESTS * FRAMES, dtype=torch.int64),
        draft_tokens=empty(REQUESTS, NODES, dtype=torch.int64),
        draft_logits=empty(REQUESTS, NODES, VOCABULARY) if sampled else None,
        label_logits=empty(REQUESTS, NODES, LABELS) if sampled and draft_vocabulary else None,
        temperature=empty(REQUESTS), seeds=empty(REQUESTS, dtype=torch.int64),
        _run_model=lambda *args: empty(REQUESTS * (1 + FRAMES), HIDDEN),
    )  # fmt: skip
    return proposer


@pytest.mark.parametrize(
    ("draft", "search", "lattice", "sampled", "kernel"),
    [
        ("chain", "prefix", "ctc", False, "search_kernel"),
        ("chain", "prefix", "transitions", False, "search_kernel"),
        ("chain", "prefix", "slots", True, "score_kernel"),
        ("chain", "argmax", "ctc", False, "_collapse_kernel"),
        ("tree", "prefix", "ctc", False, "search_kernel"),
        ("tree", "prefix", "transitions", False, "search_kernel"),
        ("tree", "transform", "ctc", False, "beam_kernel"),
    ],
)
def test_a_draft_is_made_without_the_host(draft, search, lattice, sampled, kernel, launched, tmp_path):
    proposer = make_proposer(draft, search, lattice, sampled, tmp_path)
    proposer._generate_draft(REQUESTS, REQUESTS * (1 + FRAMES), None, None, None)
    assert {"_frame_stats_kernel", kernel} <= set(launched)


@pytest.mark.parametrize(
    ("draft", "sampled", "kernel"),
    [("chain", False, "search_kernel"), ("chain", True, "score_kernel"), ("tree", False, "search_kernel")],
)
def test_a_draft_of_a_draft_vocabulary_is_made_without_the_host(draft, sampled, kernel, launched, tmp_path):
    proposer = make_proposer(draft, "prefix", "transitions", sampled, tmp_path, draft_vocabulary=True)
    proposer._generate_draft(REQUESTS, REQUESTS * (1 + FRAMES), None, None, None)
    assert {"_frame_stats_kernel", kernel} <= set(launched)


def test_a_tree_is_laid_out_verified_and_counted_without_the_host(launched, tmp_path, monkeypatch):
    proposer = make_proposer("tree", "prefix", "transitions", False, tmp_path)
    trees, step = proposer.trees, proposer.tree_step
    proposer.meter._timer = object()  # the thread that copies counters out is none of the step's business
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda self, *args, **kwargs: {})
    state = object.__new__(type("State", (TreeModelState,), {"trees": trees, "step": step, "compaction": None}))
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
    vars(sampler).update(trees=trees, step=step, sampler=vllms, _paths=[])
    tokens = empty(num_tokens, dtype=torch.int64)
    monkeypatch.setattr(vllm_ctc_spec.serving.tree.verification, "gumbel_sample", lambda *args, **options: tokens)
    _, sampled, num_sampled = sampler._verify(
        logits=empty(num_tokens, VOCABULARY), draft_logits=None, draft_sampled=tokens, pos=tokens, cu_num_logits=starts,
        idx_mapping=slots, idx_mapping_np=np.arange(REQUESTS), expanded_idx_mapping=tokens,
        expanded_local_pos=tokens.int(), seq_lens_upper_bound_np=rows[1:], verify_draft_sampled=tokens,
    )  # fmt: skip
    step.path, step.num_sampled = sampler._paths[-1], num_sampled
    assert sampled.shape == (REQUESTS, 1 + NODES)
    step.put_path_first([empty(num_tokens, HIDDEN)])
    proposer.meter._host = empty(*proposer.meter.totals.shape, dtype=torch.int64)  # a copy that nobody waits for
    proposer.meter.observe(slots.long(), num_sampled)
    assert {"_tree_layout_kernel", "_tree_walk_kernel"} <= set(launched)
