"""Every Triton kernel against fp64 or exact integers. On a GPU at served shapes, elsewhere in Triton's interpreter."""

import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import check_trees
import torch
from frames64 import chain_gap, random_frames, row_of, sampled_rows, search_certificate
from outcome import FAILED, OK, Outcome, Settings

from vllm_ctc_spec.draft.ctc import default_width
from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels.collapse import collapse_triton
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling, Frames
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform_reference, ctc_transform_triton
from vllm_ctc_spec.kernels.frame_stats import frame_stats_triton
from vllm_ctc_spec.kernels.prefix_chain import prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_search import prefix_search_triton

PART = "kernels"
# Triton's interpreter multiplies matrices of bf16 as if they were integers.
DTYPES = {"cuda": (torch.bfloat16, torch.float32, torch.float16), "cpu": (torch.float32, torch.float16)}
LOG = 1e-3  # of a log probability: the bias of a head in 16 bits is summed in fp32
# The search takes the mass outside of its candidates as a difference in fp32, and a head may leave little beside it;
# more is lost where nearly the whole vocabulary, and not all of it, are candidates.
LOG_OF_SEARCH = 5e-3


class Shape(NamedTuple):
    vocabulary: int
    frames: int
    batch: int
    nodes: int
    rank: int


SMALL = (Shape(600, 5, 2, 8, 16),)
SERVED = (
    Shape(32_000, 12, 4, 16, 64), Shape(151_936, 12, 6, 64, 64), Shape(128_256, 24, 3, 32, 64),
    Shape(999, 8, 64, 64, 32), Shape(256_000, 12, 2, 8, 256),
)  # fmt: skip


class Case(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator


Error = tuple[float, float]  # what was found, and how much is right


def check(settings: Settings) -> Iterator[Outcome]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    served = device.type == "cuda" and not settings.quick
    # Memory of torch.empty then starts as NaN or as the largest integer: what a kernel leaves out is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
    if not torch.empty(8, device=device).isnan().all():
        yield Outcome(PART, "poison", FAILED, "uninitialised memory is not NaN")
        return
    checks: dict[str, Callable[[Case], Error]] = {
        "frame_stats": frame_stats_error,
        "collapse": collapse_error,
        "prefix_chain": chain_error,
        "prefix_chain, transitions": lambda case: chain_error(case, transitions=True),
        "prefix_chain, sampled": sampled_chain_error,
        "prefix_search": search_error,
        "prefix_search, transitions": lambda case: search_error(case, transitions=True),
        "ctc_transform": transform_error,
        **check_trees.CHECKS,
    }
    for name, run in checks.items():
        yield run_check(name, run, SERVED if served else SMALL, device, settings.seed)


def run_check(
    name: str, run: Callable[[Case], Error], shapes: tuple[Shape, ...], device: torch.device, seed: int
) -> Outcome:
    worst, cases = (0.0, 0.0), 0
    for shape in shapes:
        for dtype in DTYPES[device.type]:
            case = Case(shape, dtype, device, torch.Generator().manual_seed(seed + cases))
            try:
                error = run(case)
            except Exception as problem:  # the next kernels are checked all the same
                traceback.print_exc()
                return Outcome(PART, name, FAILED, f"{shape}, {dtype}: {type(problem).__name__}: {problem}"[:300])
            cases += 1
            # NaN is no number that is right.
            if not error[0] <= error[1]:
                return Outcome(PART, name, FAILED, f"{shape}, {dtype}: off by {error[0]:.2g}, not {error[1]:.2g}")
            worst = max(worst, error, key=lambda e: e[0] / (e[1] or 1))
    detail = f"{cases} cases, worst {worst[0]:.2g} of {worst[1]:.2g}" if worst[1] else f"{cases} cases, exact"
    return Outcome(PART, name, OK, detail, {"cases": cases, "error": worst[0], "tolerance": worst[1]})


def frames_of(case: Case, transitions: bool = False) -> Frames:
    shape = case.shape
    sizes = shape.vocabulary, shape.frames, shape.batch, shape.rank
    return random_frames(*sizes, case.dtype, case.generator, transitions).to(case.device)


def frame_stats_error(case: Case) -> Error:
    logits = frames_of(case).logits
    logsumexp, best, best_logit = frame_stats_triton(logits)
    exact = logits.double()
    largest = exact.max(-1)
    if not (torch.equal(best_logit.double(), largest.values) and torch.equal(best, first_of(exact, largest.values))):
        return torch.inf, 0.0
    return (logsumexp - exact.logsumexp(-1)).abs().max().item(), 1e-5 * logsumexp.abs().max().item()


def first_of(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    place = torch.arange(values.shape[-1], device=values.device)
    return torch.where(values == wanted[..., None], place, values.shape[-1]).min(-1).values


def collapse_error(case: Case) -> Error:
    shape, blank = case.shape, case.shape.vocabulary
    alignment = torch.randint(blank - 3, blank + 1, (shape.batch, shape.frames), generator=case.generator)
    anchor = torch.randint(shape.vocabulary, (shape.batch,), generator=case.generator).to(case.device)
    labels, lengths = collapse_triton(alignment.to(case.device), blank, anchor, shape.nodes)
    wrong = 0
    for row, symbols in enumerate(alignment.tolist()):
        expected = oracle.collapse(symbols, blank)[: shape.nodes]
        filler = expected[-1] if expected else int(anchor[row])
        wrong += labels[row].tolist() != expected + [filler] * (shape.nodes - len(expected))
        wrong += int(lengths[row]) != len(expected)
    return wrong, 0.0


def chain_error(case: Case, transitions: bool = False) -> Error:
    frames = frames_of(case, transitions)
    labels, lengths = prefix_chain_triton(frames, case.shape.frames)
    gaps = [
        chain_gap(row_of(frames, row), labels[row, : lengths[row]].tolist(), case.shape.frames)
        for row in range(case.shape.batch)
    ]
    return max(gaps), LOG


def sampled_chain_error(case: Case) -> Error:
    shape, device, frames = case.shape, case.device, frames_of(case)
    num_labels = min(4, shape.frames)
    sampling = ChainSampling(
        temperature=(torch.rand(shape.batch, generator=case.generator) + 0.3).to(device),
        seeds=torch.randint(2**62, (shape.batch,), generator=case.generator).to(device),
        positions=torch.randint(2**20, (shape.batch,), generator=case.generator).to(device),
        requests=torch.randperm(shape.batch, generator=case.generator).to(device),
        draft_logits=torch.full((shape.batch, num_labels, shape.vocabulary), torch.nan, device=device),
    )
    labels, lengths = prefix_chain_triton(frames, num_labels, sampling)
    return max(sampled_rows(frames, labels, lengths, sampling)), LOG


def budget_of(case: Case) -> Budget:
    shape = case.shape
    return Budget(shape.nodes, min(default_width(shape.nodes), shape.vocabulary), min(8, shape.frames))


def search_error(case: Case, transitions: bool = False) -> Error:
    shape, frames, budget = case.shape, frames_of(case, transitions), budget_of(case)
    tree = prefix_search_triton(frames, budget)
    tree.check(shape.vocabulary)
    candidates = frames.logits.topk(budget.width, dim=2, sorted=False).indices.flatten(1)  # the kernel's own call
    rows = range(min(shape.batch, 4))
    errors = [
        search_certificate(row_of(frames, row), tree, row, candidates[row].unique(), budget.depth) for row in rows
    ]
    return max(errors), LOG_OF_SEARCH


def transform_error(case: Case) -> Error:
    """Scores are those of the reference, and no score is above the prefix's exact probability."""
    shape, frames, budget = case.shape, frames_of(case), budget_of(case)
    tree = ctc_transform_triton(frames, budget)
    tree.check(shape.vocabulary)
    reference = ctc_transform_reference(frames.to("cpu"), budget)
    scores, expected = tree.scores.cpu(), reference.scores
    if not torch.equal(scores.isneginf(), expected.isneginf()):
        return torch.inf, LOG
    used = ~expected.isneginf()
    errors = [(scores - expected)[used].abs().max().item()]
    for row in range(min(shape.batch, 2)):
        one = row_of(frames, row)
        for node in range(1, 1 + min(8, int(tree.num_nodes[row]))):
            prefix = one.root()
            for label in tree.path(row, node):
                prefix = prefix.extend(one.log_probs, label)
            errors.append(scores[row, node].item() - prefix.log_prob.item())
    return max(errors), LOG
