"""Counts of drafts that only the worker knows, on vLLM's `/metrics`: how many rows of a draft are labels, not padding.

vLLM's scheduler counts scheduled and accepted tokens (vllm/v1/spec_decode/metrics.py). Only the device knows how much
of a draft the drafter filled. So the device counts, by tensor operations of fixed shape, and every step copies the
counts out behind itself without waiting. Once a second a thread writes down the counts that have arrived. The thread
calls nothing of CUDA: while vLLM captures graphs, such a call from any thread spoils the capture. The same thread says,
once, that frames are not numbers: their drafts are rejected, so only the speed would show it.

The counts reach the API server by Prometheus' own multiprocess mode (prometheus_client/multiprocess.py): a small
memory-mapped file, which is read when somebody asks for `/metrics`. With more than one API server vLLM sets that mode
up itself (vllm/v1/metrics/prometheus.py), and the file goes where vLLM's are. With one, `folder` gives Prometheus'
collector a second folder. docs/metrics.md says why.
"""

import functools
import logging
import os
import tempfile
import threading
from collections.abc import Sequence

import torch
from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from torch import Tensor

from vllm_ctc_spec.kernels.contract import DraftTree, Frames

logger = logging.getLogger("vllm.ctc_spec")

COUNTERS = {
    "vllm_ctc_spec:drafts": "Drafts that the target verified.",
    "vllm_ctc_spec:draft_nodes": "Nodes of verified trees, or labels of verified chains, padding not counted.",
    "vllm_ctc_spec:draft_labels": "Labels on the longest path of verified drafts.",
    "vllm_ctc_spec:stopped_drafts": "Verified drafts that the drafter ended before the tokens scheduled for them.",
    "vllm_ctc_spec:broken_frames": "Frames of verified drafts that were not numbers: the drafter is broken.",
    "vllm_ctc_spec:draft_frames": "Frames from which verified drafts were made.",
}
"""Prometheus' names: on `/metrics` each ends in `_total`. The device counts all but the last, in this order."""
SOURCE_COUNTERS = {
    "vllm_ctc_spec:source_nodes": "Nodes of verified trees that this source has drafted, alone or with others.",
    "vllm_ctc_spec:source_accepted": "Those of them that the target accepted.",
}
"""The same by source of drafts, where a tree is merged of several."""
BROKEN = list(COUNTERS).index("vllm_ctc_spec:broken_frames")
# The column of verified requests. The host counts them too, and so knows whether the last copy has arrived.
SEEN = BROKEN + 1
LABELS = ("model_name", "engine", "acceptance")
"""Those of PrometheusStatLogger (vllm/v1/metrics/loggers.py), and the name of the rule of acceptance."""
FOLDER = "ctc_metrics_folder"  # the attribute of vLLM's ObservabilityConfig that tells workers `folder`
PUBLISH_SECONDS = 1.0


def folder() -> str:
    """Where the workers of this API server leave their counters."""
    return os.environ.get("PROMETHEUS_MULTIPROC_DIR") or _own_folder().name


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends, as vLLM's own is."""
    own = tempfile.TemporaryDirectory(prefix="vllm_ctc_spec_")
    MultiProcessCollector(REGISTRY, path=own.name)
    return own


class CounterFile:
    """The counters of one engine, in a file of Prometheus' multiprocess mode. The file's name says their type."""

    def __init__(self, where: str, label_values: tuple[str, str, str], sources: Sequence[str] = ()):
        handle, path = tempfile.mkstemp(prefix="counter_", suffix=".db", dir=where)
        os.close(handle)
        self._file = MmapedDict(path)
        self._keys = [mmap_key(name, f"{name}_total", LABELS, label_values, text) for name, text in COUNTERS.items()]
        self._keys += [
            mmap_key(name, f"{name}_total", (*LABELS, "source"), (*label_values, source), text)
            for name, text in SOURCE_COUNTERS.items()
            for source in sources
        ]
        self.write([0] * len(self._keys))

    def write(self, values: list[int]) -> None:
        for key, value in zip(self._keys, values):
            self._file.write_value(key, value, 0.0)


class DraftMeter:
    """Counts drafts when they are verified. A draft that nobody verifies (of a request that has ended, or is still in
    its prefill) does not count, and a draft of which fewer rows are scheduled counts as those rows.

    A draft leaves in its request slot one row of counts for each number of scheduled tokens. The verification picks
    a row and adds it up. Without a file the counts only serve to find broken frames.
    """

    def __init__(
        self,
        file: CounterFile | None,
        max_num_reqs: int,
        num_drafted: int,
        num_frames: int,
        device: torch.device,
        source_counts: Tensor | None = None,
    ):
        """num_frames: T, 0 without a drafter; source_counts: [2, S] int64, SOURCE_COUNTERS as `MergedSource` counts
        them, None for one source."""
        self._source_counts = source_counts
        self._counter_file = file
        self._num_frames = num_frames
        self._rows = torch.arange(1 + num_drafted, dtype=torch.int32, device=device)
        chains = torch.minimum(self._rows[:, None], self._rows)  # labels by length and number of scheduled tokens
        self._chains = self._figures(chains, chains, self._rows)
        num_counts = len(COUNTERS)  # those of the device and SEEN
        # One slot more than vLLM has, for the inert rows of a padded batch, slot -1. Column 0 is for requests without
        # a row of logits, column 1 for those with the anchor's only: both stay 0.
        self._by_num_logits = torch.zeros(
            max_num_reqs + 1, 2 + num_drafted, num_counts, dtype=torch.int32, device=device
        )
        self._by_num_logits[..., SEEN] = 1
        self._by_num_drafted = self._by_num_logits[:, 1:]
        self.totals = torch.zeros(num_counts, dtype=torch.int64, device=device)
        num_copied = num_counts + (0 if source_counts is None else source_counts.numel())
        self._host = torch.zeros(num_copied, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._num_seen = 0  # the device's SEEN will be this when it has done all that was asked of it
        self._timer: threading.Timer | None = None
        self._publishing = threading.Lock()
        self._warned = False

    def record(
        self, requests: Tensor, draft: DraftTree | Tensor, most: Tensor | None = None, frames: Frames | None = None
    ) -> None:
        """A step's drafts, for the request slots `[B]`. Fixed shapes: part of the drafter's CUDA graph.

        draft: trees of at most `most` [B] nodes, or the lengths `[B]` of chains, with None for `most`. frames: those
        that the drafts were made of; None where no source has read any.
        """
        if isinstance(draft, DraftTree):
            nodes = (draft.parents >= 0).cumsum(1, dtype=torch.int32)
            labels = draft.depths.cummax(1).values
            figures = self._figures(nodes, labels, torch.minimum(most[:, None], self._rows))
        else:
            figures = self._chains[draft]
        self._by_num_drafted[requests, :, :BROKEN] = figures
        if frames is None:
            return
        broken = ~frames.log_scale.isfinite()  # [B, T]
        if frames.transitions is not None:
            broken |= frames.transitions.isnan().any(1)
        self._by_num_drafted[requests, 1:, BROKEN] = broken.sum(1, dtype=torch.int32)[:, None]

    def _figures(self, nodes: Tensor, labels: Tensor, budget: Tensor) -> Tensor:
        """[B, 1 + N, 4] int32: the counts, for each number of scheduled tokens."""
        return torch.stack(((self._rows > 0).expand_as(nodes), nodes, labels, nodes < budget), 2)

    def observe(self, requests: Tensor, num_logits: Tensor) -> None:
        """The target has verified `num_logits` [R] rows, the anchor's included, of the drafts of `requests` [R]."""
        self.totals += self._by_num_logits[requests, num_logits].sum(0)
        self._copy_out()
        self._num_seen += requests.shape[0]
        self._start_timer()

    def reset(self) -> None:
        """Forget what was counted."""
        self.totals.zero_()
        if self._source_counts is not None:
            self._source_counts.zero_()
        self._copy_out()
        self._num_seen = 0
        self._start_timer()

    def _copy_out(self) -> None:
        """Those of the sources first: whoever finds SEEN up to date finds all of it so."""
        if self._source_counts is None:
            self._host.copy_(self.totals, non_blocking=True)
            return
        counts = len(self.totals)
        self._host[counts:].copy_(self._source_counts.flatten(), non_blocking=True)
        self._host[:counts].copy_(self.totals, non_blocking=True)

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(PUBLISH_SECONDS, self._publish)
            self._timer.daemon = True
            self._timer.start()

    def _publish(self) -> None:
        """In the timer's thread. The timer is cleared first, so a step that is too late for this look starts the next
        one. A copy that has not arrived does so too."""
        self._timer = None
        with self._publishing:
            copied = self._host.tolist()
            counts, seen, of_sources = copied[:SEEN], copied[SEEN], copied[SEEN + 1 :]
            if counts[BROKEN] and not self._warned:
                self._warned = True
                logger.warning(
                    "The CTC drafter emits frames that are not numbers (%d so far): the target rejects their drafts, "
                    "so that output stays right and speed is lost; train the drafter again or serve it as float32.",
                    counts[BROKEN],
                )
            if self._counter_file is not None:
                self._counter_file.write([*counts, counts[0] * self._num_frames, *of_sources])
        if seen != self._num_seen:
            self._start_timer()
