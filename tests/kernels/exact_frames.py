"""How far the kernels from frames to drafts are from fp64 or exact integers, at a shape."""

import torch

from vllm_ctc_spec.draft.ctc import SAMPLED_WIDTH, default_width
from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.kernels.best_tokens import best_tokens_reference, best_tokens_triton
from vllm_ctc_spec.kernels.collapse import collapse_triton
from vllm_ctc_spec.kernels.contract import Budget, ChainSampling
from vllm_ctc_spec.kernels.ctc_transform import ctc_transform_reference, ctc_transform_triton
from vllm_ctc_spec.kernels.frame_stats import frame_stats_triton
from vllm_ctc_spec.kernels.prefix_chain import candidates, prefix_chain_triton
from vllm_ctc_spec.kernels.prefix_search import prefix_search_triton

from .exact import Case, chain_gaps, row_of, search_gap, trained_frames

Error = tuple[float, float]  # what was found, and how much is right
LOG = 1e-3  # of a log probability: the bias of a head in 16 bits is summed in fp32
# The search takes the mass outside of its candidates as a difference in fp32, and a head may leave little beside it;
# more is lost where nearly the whole vocabulary, and not all of it, are candidates.
LOG_OF_SEARCH = 5e-3


def frame_stats_error(case: Case) -> Error:
    logits = trained_frames(case).logits
    logsumexp, best, best_logit, _ = frame_stats_triton(logits)
    exact = logits.double()
    largest = exact.max(-1).values
    place = torch.arange(exact.shape[-1], device=exact.device)
    first = torch.where(exact == largest[..., None], place, exact.shape[-1]).min(-1).values
    if not (torch.equal(best_logit.double(), largest) and torch.equal(best, first)):
        return torch.inf, 0.0
    return (logsumexp - exact.logsumexp(-1)).abs().max().item(), 1e-5 * logsumexp.abs().max().item()


def best_tokens_error(case: Case) -> Error:
    logits, width = trained_frames(case).logits, min(default_width(case.shape.nodes), case.shape.vocabulary)
    tokens = best_tokens_triton(logits, width)
    return (tokens.cpu() != best_tokens_reference(logits.cpu(), width)).sum().item(), 0.0


def collapse_error(case: Case) -> Error:
    shape, blank, draw = case.shape, case.shape.vocabulary, case.generator()
    alignment = torch.randint(blank - 3, blank + 1, (shape.batch, shape.frames), generator=draw)
    anchor = torch.randint(shape.vocabulary, (shape.batch,), generator=draw).to(case.device)
    labels, lengths = collapse_triton(alignment.to(case.device), blank, anchor, shape.nodes)
    wrong = 0
    for row, symbols in enumerate(alignment.tolist()):
        expected = oracle.collapse(symbols, blank)[: shape.nodes]
        filler = expected[-1] if expected else int(anchor[row])
        wrong += labels[row].tolist() != expected + [filler] * (shape.nodes - len(expected))
        wrong += int(lengths[row]) != len(expected)
    return wrong, 0.0


def chain_error(case: Case, transitions: bool = False) -> Error:
    shape, device, draw, frames = case.shape, case.device, case.generator(), trained_frames(case, transitions)
    is_greedy = torch.rand(shape.batch, generator=draw) < 0.3
    num_labels = shape.frames
    sampling = ChainSampling(
        temperature=(torch.rand(shape.batch, generator=draw) + 0.3).masked_fill(is_greedy, 0).to(device),
        seeds=torch.randint(2**62, (shape.batch,), generator=draw).to(device),
        positions=torch.randint(2**20, (shape.batch,), generator=draw).to(device),
        requests=torch.randperm(shape.batch, generator=draw).to(device),
        draft_logits=torch.full((shape.batch, num_labels, shape.vocabulary), torch.nan, device=device),
    )
    tokens = candidates(frames, SAMPLED_WIDTH)
    labels, lengths = prefix_chain_triton(tokens, frames, num_labels, sampling)
    return max(chain_gaps(frames, tokens, labels, lengths, sampling)), LOG


def transition_chain_error(case: Case) -> Error:
    return chain_error(case, transitions=True)


def budget_of(case: Case) -> Budget:
    shape = case.shape
    return Budget(shape.nodes, min(default_width(shape.nodes), shape.vocabulary), min(8, shape.frames))


def search_error(case: Case, transitions: bool = False) -> Error:
    shape, frames, budget = case.shape, trained_frames(case, transitions), budget_of(case)
    tree = prefix_search_triton(frames, budget)
    tree.check(shape.vocabulary)
    candidates = best_tokens_triton(frames.logits, budget.width)  # the kernel's own call
    rows = range(min(shape.batch, 4))
    errors = [search_gap(row_of(frames, row), tree, row, candidates[row].unique(), budget.depth) for row in rows]
    return max(errors), LOG_OF_SEARCH


def transition_search_error(case: Case) -> Error:
    return search_error(case, transitions=True)


def transform_error(case: Case) -> Error:
    """Scores are those of the reference, and no score is above the prefix's exact probability."""
    shape, frames, budget = case.shape, trained_frames(case), budget_of(case)
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


CHECKS = {
    "frame_stats": frame_stats_error,
    "best_tokens": best_tokens_error,
    "collapse": collapse_error,
    "prefix_chain": chain_error,
    "prefix_chain, transitions": transition_chain_error,
    "prefix_search": search_error,
    "prefix_search, transitions": transition_search_error,
    "ctc_transform": transform_error,
}
