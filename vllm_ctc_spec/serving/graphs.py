"""Sizes of CUDA graphs: vLLM has one list of them, in rows, for the target's passes and the draft's alike."""

import copy
from collections.abc import Callable

from vllm.config import VllmConfig
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

LARGEST_GRAPH = 1024
"""Rows of the largest graph that is added. vLLM ends at 512, and at 1024 on Blackwell, which is 78 drafts of 12 frames
and 40 of 24. Beyond it arithmetic hides the launches, and memory grows with it: the logits of all frames, and on Hopper
FlashAttention's 32 partial outputs of each row and head, 0.5 MB a row for 32 heads of 128."""


def num_drafted_by_batch(config: VllmConfig, max_num_reqs: int) -> list[int]:
    """`[b]` is the number of tokens that each of b requests may draft, for b up to `max_num_reqs`."""
    speculative = config.speculative_config
    schedule, most = speculative.num_speculative_tokens_per_batch_size, speculative.num_speculative_tokens
    if schedule is None:
        return [most] * (1 + max_num_reqs)
    return build_dynamic_sd_schedule_lookup(schedule, max_num_reqs, most)


def choose_sizes(config: VllmConfig, set_default_sizes: Callable[[VllmConfig], None]) -> None:
    """Choose `cudagraph_capture_sizes` where nobody has, before vLLM does by `set_default_sizes`, its own method."""
    compilation = config.compilation_config
    if compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None:
        return
    by_default = copy.copy(config)
    by_default.compilation_config = copy.copy(compilation)
    set_default_sizes(by_default)
    default = by_default.compilation_config.cudagraph_capture_sizes
    if default:
        compilation.cudagraph_capture_sizes = capture_sizes(config, default)


def capture_sizes(config: VllmConfig, default: list[int]) -> list[int]:
    """`default`, vLLM's own sizes in ascending order, and beyond them what drafts and their verification need.

    A pass has 1 + T rows a request (a SpecFormer's draft has one), or 1 + K for the K tokens that its batch drafts. Up
    to LARGEST_GRAPH rows are added, and for each kind of pass at most 8 sizes while the number of requests doubles, so
    that no more than an eighth of a pass is padding. vLLM captures no size of more requests than may run, so the
    largest batch of drafts with one row a request is a size of its own.
    """
    scheduler = config.scheduler_config
    # Without a drafter a draft is no pass.
    draft_rows = getattr(config.speculative_config.draft_model_config.hf_config, "num_query_rows", None)
    max_num_reqs = min(
        scheduler.max_num_active_seqs or scheduler.max_num_seqs, scheduler.max_num_batched_tokens // (draft_rows or 1)
    )
    most_requests: dict[int, int] = {}  # by rows a request; larger batches come later
    for requests, drafted in enumerate(num_drafted_by_batch(config, max_num_reqs)):
        if requests and drafted:
            most_requests[1 + drafted] = requests
            if draft_rows is not None:
                most_requests[draft_rows] = requests
    largest = min(LARGEST_GRAPH, scheduler.max_num_batched_tokens)
    sizes = set(default)
    if draft_rows == 1 and most_requests:
        sizes.add(min(most_requests[1], largest))
    for rows, requests in most_requests.items():
        sizes.update(rows * count for count in _counts(default[-1] // rows + 1, min(requests, largest // rows)))
    return sorted(sizes)


def _counts(first: int, last: int) -> list[int]:
    """Numbers of requests from `first` to `last`, both among them; a step is at most an eighth of its number."""
    counts = []
    while first < last:
        counts.append(first)
        step = 2 ** max(first.bit_length() - 4, 0)
        first += step - first % step
    return [*counts, last] if counts or first == last else []
