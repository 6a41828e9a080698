"""The draft step and the verification of trees: no host synchronisation, and one CUDA graph a batch size that gives
what eager execution gives.

On a CPU the step runs where a graph would be replayed: it must be a function of its inputs alone.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from vllm_ctc_spec.draft.ctc import default_width, draft_chain, draft_tree, read_frames
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, TreeRows
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv
from vllm_ctc_spec.kernels.tree_layout import tree_layout
from vllm_ctc_spec.kernels.tree_mask import tree_mask
from vllm_ctc_spec.kernels.tree_walk import tree_walk
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict
from vllm_ctc_spec.serving.tree.table import TreeTable


class Size(NamedTuple):
    vocabulary: int
    hidden: int
    nodes: int
    batches: tuple[int, ...]


ON_GPU = torch.cuda.is_available()
SIZE = Size(32_000, 512, 64, (1, 8, 64)) if ON_GPU else Size(300, 64, 16, (1, 3))
CONTEXT, FRAMES, LABELS, BLOCK_SIZE = 256, 12, 8, 16

Inputs = list[torch.Tensor]
Step = Callable[[], list[torch.Tensor]]


def assert_graph_equals_eager(step: Step, inputs: Inputs, fresh: Inputs) -> None:
    """Record once, replay with other inputs at the same addresses."""
    replay = recorded(step, inputs[0].device)
    first = [x.clone() for x in replay()]
    for old, new in zip(inputs, fresh, strict=True):
        old.copy_(new)
    replayed = [x.clone() for x in replay()]
    assert not all(torch.equal(a, b) for a, b in zip(first, replayed)), "the step does not read its inputs"
    for x, value in zip(inputs, fresh):
        x.copy_(value)  # what the step itself writes is as it was
    with without_synchronisation(inputs[0].device):
        expected = step()
    for number, (a, b) in enumerate(zip(replayed, expected, strict=True)):
        assert torch.equal(a, b), f"output {number}"


def recorded(step: Step, device: torch.device) -> Step:
    """The step as a CUDA graph; on a CPU the step itself."""
    if device.type == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # a graph must not compile
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> list[torch.Tensor]:
        graph.replay()
        return outputs

    return replay


@contextlib.contextmanager
def without_synchronisation(device: torch.device) -> Iterator[None]:
    """Whatever would wait for the device is an error. On a CPU test_host_reads.py finds host reads."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def draft_inputs(batch: int, device: torch.device) -> Inputs:
    """Hidden states of five layers, anchors, their positions, request slots and seeds, rows that draft chains."""
    return [
        torch.randn(batch, CONTEXT, 5 * SIZE.hidden, device=device),
        torch.randint(SIZE.vocabulary, (batch, 1), device=device),
        torch.randint(1, CONTEXT, (batch, 1), device=device),
        torch.stack([torch.randperm(batch, device=device)] * FRAMES, 1),  # an entry a frame, as vLLM has them
        torch.randint(2**60, (batch,), device=device),
        torch.rand(batch, device=device) < 0.3,
    ]


def random_drafter(lattice: str, device: torch.device, architecture: str) -> CTCDrafter:
    config = DrafterConfig(
        hidden_size=SIZE.hidden, vocab_size=SIZE.vocabulary, target_num_layers=5, num_frames=FRAMES, num_labels=LABELS,
        aux_hidden_state_layer_ids=(1, 2, 3, 4, 5), lattice=lattice, markov_rank=64,
        transition_rank=64 if lattice == "transitions" else 0, architecture=architecture,
    )  # fmt: skip
    tables = (torch.randn(SIZE.vocabulary, SIZE.hidden) for _ in range(2))
    drafter = CTCDrafter(config, *tables).to(device).requires_grad_(False)
    torch.nn.init.normal_(drafter.markov_head.output.weight, std=0.1)
    return drafter


def draft_step(lattice: str, draft: str, inputs: Inputs, architecture: str = "adm") -> Step:
    """The drafter's forward with random weights, and its chain or tree."""
    states, anchors, positions, slots_of_frames, seeds, chain_only = inputs
    device, slots = states.device, slots_of_frames[:, 0]
    drafter, table = random_drafter(lattice, device, architecture), TreeTable(len(slots), SIZE.nodes, device)
    sampling = None
    if draft == "sampled chain":
        draft_logits = torch.empty(len(slots), LABELS, SIZE.vocabulary, device=device)
        sampling = ChainSampling(torch.ones(len(slots), device=device), seeds, positions[:, 0], slots, draft_logits)

    @torch.no_grad()
    def step() -> list[torch.Tensor]:
        outputs = drafter.frames(drafter.forward_hidden(states, anchors, positions)[:, 0])
        frames, stats = read_frames(outputs, anchors[:, 0], drafter.markov_tables)
        if draft != "tree":
            chain = draft_chain("prefix", frames, stats, LABELS, sampling)
            return [*chain] if sampling is None else [*chain, sampling.draft_logits]
        tree = draft_tree("prefix", frames, Budget(SIZE.nodes, default_width(SIZE.nodes), LABELS), chain_only)
        table.store(slots, tree)
        return [table.parents, table.depths, table.ancestors, tree.tokens, tree.scores]

    return step


@pytest.mark.parametrize("draft", ["chain", "sampled chain", "tree"])
@pytest.mark.parametrize("lattice", ["ctc", "transitions"])
@pytest.mark.parametrize("batch", SIZE.batches)
def test_a_draft_step_is_one_graph(batch: int, lattice: str, draft: str, input_seed: int, device: torch.device) -> None:
    torch.manual_seed(input_seed)
    inputs = draft_inputs(batch, device)
    assert_graph_equals_eager(draft_step(lattice, draft, inputs), inputs, draft_inputs(batch, device))


@pytest.mark.parametrize("batch", SIZE.batches)
def test_a_draft_of_a_specformer_is_one_graph(batch: int, input_seed: int, device: torch.device) -> None:
    torch.manual_seed(input_seed)
    inputs = draft_inputs(batch, device)
    step = draft_step("transitions", "tree", inputs, "specformer")
    assert_graph_equals_eager(step, inputs, draft_inputs(batch, device))


def verify_inputs(batch: int, device: torch.device) -> Inputs:
    """Binary trees with random tokens, what the target drew at their nodes, and a cache."""
    width, node = 1 + SIZE.nodes, torch.arange(1 + SIZE.nodes, device=device)
    blocks = batch * -(-width // BLOCK_SIZE)
    return [
        torch.where(node > 0, (node - 1) // 2, -1).int().repeat(batch, 1),
        torch.where(node % 2 == 1, 0, 1).repeat(batch),  # draft tokens: siblings differ
        torch.randint(2, (batch * width,), device=device),
        torch.randperm(blocks * BLOCK_SIZE, device=device)[: batch * width],
        torch.randint(100, (batch * width,), device=device),
        *(torch.randn(blocks, 2, BLOCK_SIZE, 64, device=device) for _ in range(2)),
    ]


def verify_step(inputs: Inputs) -> Step:
    parents, draft, target, slot_mapping, positions, *caches = inputs
    (batch, width), device = parents.shape, parents.device
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * width
    slots, pointers = torch.arange(batch, dtype=torch.int32, device=device), CachePointers(caches)
    positions_found, row_ancestors = torch.zeros(2, batch * width, dtype=torch.int64, device=device)
    rows = TreeRows(*torch.zeros(2, batch, dtype=torch.int32, device=device), row_ancestors)

    def step() -> list[torch.Tensor]:
        depths, ancestors = tree_mask(parents)
        tree_layout(positions, starts, starts, slots, depths, ancestors, positions_found, rows)
        sampled, num_sampled, path = tree_walk(target, draft, parents, slots, starts)
        compact_kv(pointers, slot_mapping, starts[:-1], path, num_sampled)
        return [positions_found, *rows, sampled, num_sampled, path, *caches]

    return step


@pytest.mark.parametrize("batch", SIZE.batches)
def test_verification_is_one_graph(batch: int, input_seed: int, device: torch.device) -> None:
    torch.manual_seed(input_seed)
    inputs = verify_inputs(batch, device)
    assert_graph_equals_eager(verify_step(inputs), inputs, verify_inputs(batch, device))


def test_hidden_states_are_reordered_without_synchronisation(input_seed: int, device: torch.device) -> None:
    """Between two graphs: the addresses of the states, which may be new in every step, go to the GPU without a wait."""
    torch.manual_seed(input_seed)
    layout = TreeLayout.allocate(2, 64, [4], device)
    layout.anchor_rows[:] = torch.tensor([3, 20])
    path = torch.tensor([[0, 2, 4, 4, 4], [0, 1, 3, 4, 4]], dtype=torch.int32, device=device)
    verdict = Verdict(path, torch.tensor([3, 4], dtype=torch.int32, device=device))
    before = torch.randn(5, 40, SIZE.hidden, device=device)
    layout.put_path_first(verdict, list(before.clone()))  # compiles
    states = before.clone()
    with without_synchronisation(device):
        layout.put_path_first(verdict, list(states))
    expected = before.clone()
    for to, source in ((4, 5), (5, 7), (22, 23), (23, 24)):
        expected[:, to] = before[:, source]
    assert torch.equal(states, expected)
