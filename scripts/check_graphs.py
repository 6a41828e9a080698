"""The draft step and the verification of trees: no host synchronisation, and one CUDA graph a batch size that gives
what eager execution gives."""

import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
from check_trees import BLOCK_SIZE
from outcome import FAILED, NOT_RUN, OK, Outcome, Settings

from vllm_ctc_spec.draft.ctc import default_width, draft_chain, draft_tree, read_frames
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, TreeRows
from vllm_ctc_spec.kernels.kv_compaction import CachePointers, compact_kv
from vllm_ctc_spec.kernels.tree_layout import tree_layout
from vllm_ctc_spec.kernels.tree_mask import tree_mask
from vllm_ctc_spec.kernels.tree_walk import tree_walk
from vllm_ctc_spec.serving.tree.state import TreeTable

PART = "graphs"
VOCABULARY, HIDDEN, CONTEXT, FRAMES, NODES, LABELS = 32_000, 512, 256, 12, 64, 8
BATCH_SIZES = {True: (1,), False: (1, 8, 64)}

DRAFTS = ("chain", "sampled chain", "tree")

Step = Callable[[], list[torch.Tensor]]


def check(settings: Settings) -> Iterator[Outcome]:
    if not torch.cuda.is_available():
        yield Outcome(PART, "draft step", NOT_RUN, "needs a GPU; test_host_reads.py finds host reads")
        return
    device = torch.device("cuda")
    torch.manual_seed(settings.seed)
    for batch in BATCH_SIZES[settings.quick]:
        for lattice in ("ctc", "transitions"):
            inputs = draft_inputs(batch, device)
            for draft in DRAFTS:
                step = draft_step(lattice, draft, inputs)
                yield compare(f"{draft}, {lattice}, batch {batch}", step, inputs, partial(draft_inputs, batch, device))
        inputs = verify_inputs(batch, device)
        fresh = partial(verify_inputs, batch, device)
        yield compare(f"verification, batch {batch}", verify_step(inputs), inputs, fresh)


def compare(name: str, step: Step, inputs: list[torch.Tensor], fresh: Callable[[], list[torch.Tensor]]) -> Outcome:
    """Record once, replay with other inputs at the same addresses."""
    try:
        warm_up(step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = step()
        for old, new in zip(inputs, fresh()):
            old.copy_(new)
        kept = [x.clone() for x in inputs]
        graph.replay()
        replayed = [x.clone() for x in recorded]
        for x, value in zip(inputs, kept):
            x.copy_(value)  # what the step itself writes is as it was
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            expected = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    except Exception as problem:
        traceback.print_exc()
        return Outcome(PART, name, FAILED, f"{type(problem).__name__}: {problem}"[:300])
    if not all(torch.equal(a, b) for a, b in zip(replayed, expected)):
        return Outcome(PART, name, FAILED, "the graph's results differ from those of eager execution")
    return Outcome(PART, name, OK, "one graph, equal to eager execution, no host synchronisation")


def warm_up(step: Step) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def draft_inputs(batch: int, device: torch.device) -> list[torch.Tensor]:
    """Hidden states of five layers, anchors, their positions, request slots and seeds, rows that draft chains."""
    return [
        torch.randn(batch, CONTEXT, 5 * HIDDEN, device=device),
        torch.randint(VOCABULARY, (batch, 1), device=device),
        torch.randint(1, CONTEXT, (batch, 1), device=device),
        torch.stack([torch.randperm(batch, device=device)] * FRAMES, 1),  # an entry a frame, as vLLM has them
        torch.randint(2**60, (batch,), device=device),
        torch.rand(batch, device=device) < 0.3,
    ]


def draft_step(lattice: str, draft: str, inputs: list[torch.Tensor]) -> Step:
    """The drafter's forward with random weights, and its chain or tree."""
    config = DrafterConfig(
        hidden_size=HIDDEN, vocab_size=VOCABULARY, target_num_layers=5, aux_hidden_state_layer_ids=(1, 2, 3, 4, 5),
        num_frames=FRAMES, num_labels=LABELS, lattice=lattice, markov_rank=64,
        transition_rank=64 if lattice == "transitions" else 0,
    )  # fmt: skip
    device = inputs[0].device
    tables = (torch.randn(VOCABULARY, HIDDEN) for _ in range(2))
    drafter = CTCDrafter(config, *tables).to(device).requires_grad_(False)
    torch.nn.init.normal_(drafter.markov_head.output.weight, std=0.1)
    states, anchors, positions, slots_of_frames, seeds, chain_only = inputs
    slots = slots_of_frames[:, 0]
    table = TreeTable(len(slots), NODES, device)
    sampling = None
    if draft == "sampled chain":
        draft_logits = torch.empty(len(slots), LABELS, VOCABULARY, device=device)
        sampling = ChainSampling(torch.ones(len(slots), device=device), seeds, positions[:, 0], slots, draft_logits)

    @torch.no_grad()
    def step() -> list[torch.Tensor]:
        outputs = drafter.frames(drafter.hidden_slots(states, anchors, positions)[:, 0])
        frames, stats = read_frames(outputs, anchors[:, 0], drafter.markov_tables)
        if draft != "tree":
            chain = draft_chain("prefix", frames, stats, LABELS, sampling)
            return [*chain] if sampling is None else [*chain, sampling.draft_logits]
        tree = draft_tree("prefix", frames, Budget(NODES, default_width(NODES), LABELS), chain_only)
        table.store(slots, tree)
        return [table.parents, table.depths, table.ancestors, tree.tokens, tree.scores]

    return step


def verify_inputs(batch: int, device: torch.device) -> list[torch.Tensor]:
    """Binary trees with random tokens, what the target drew at their nodes, and a cache."""
    width, node = 1 + NODES, torch.arange(1 + NODES, device=device)
    parents = torch.where(node > 0, (node - 1) // 2, -1).int().repeat(batch, 1)
    blocks = batch * -(-width // BLOCK_SIZE)
    return [
        parents,
        torch.where(node % 2 == 1, 0, 1).repeat(batch),  # draft tokens: siblings differ
        torch.randint(2, (batch * width,), device=device),
        torch.randperm(blocks * BLOCK_SIZE, device=device)[: batch * width],
        torch.randint(100, (batch * width,), device=device),
        *(torch.randn(blocks, 2, BLOCK_SIZE, 64, device=device) for _ in range(2)),
    ]


def verify_step(inputs: list[torch.Tensor]) -> Step:
    parents, draft, target, slot_mapping, positions, *caches = inputs
    (batch, width), device = parents.shape, parents.device
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * width
    slots, pointers = torch.arange(batch, dtype=torch.int32, device=device), CachePointers(caches)
    rows = torch.zeros(2, batch * width, dtype=torch.int64, device=device)
    requests = torch.zeros(2, batch, dtype=torch.int32, device=device)

    def step() -> list[torch.Tensor]:
        depths, ancestors = tree_mask(parents)
        tree_layout(positions, starts, starts, slots, depths, ancestors, rows[0], TreeRows(*requests, rows[1]))
        sampled, num_sampled, path = tree_walk(target, draft, parents, slots, starts)
        compact_kv(pointers, slot_mapping, starts[:-1], path, num_sampled)
        return [rows, requests, sampled, num_sampled, path, *caches]

    return step
