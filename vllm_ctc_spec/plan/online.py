"""What to draft while a server runs: what the plan says, or less while less is accepted than the plan expects."""

import logging
from collections.abc import Sequence

from vllm_ctc_spec.plan.solve import Expected, Schedule

logger = logging.getLogger("vllm.ctc_spec")

MEMORY = 256  # drafts after which an observation weighs 1 / e
PROBE = 24  # drafts that decide whether drafting pays again
WAITS = (512, 8192)  # steps without drafts before the first look whether they pay again, and at most


class FollowedPlan:
    """Tokens to draft by batch size, `followed[b]`, as vLLM's scheduler looks them up once a step.

    One number says how the served requests differ from those of the plan: `share`, their accepted tokens divided by
    those that the plan expects of the same drafts, over the last MEMORY drafts or so. A draft with the acceptance
    length L in the plan then has 1 + share * (L - 1), and a step takes as long as in the plan. Of the plan's sizes up
    to the one for this batch, the one with the largest speedup is drafted, and none where none reaches `min_speedup`.
    Without drafts nothing is learned. So from time to time PROBE drafts are made anyway, less often each time that they
    do not pay: while nothing pays, at most PROBE / WAITS[0] of the drafting steps are slower than they need to be.

    Larger drafts than the plan's are never chosen: graphs and buffers have its sizes.
    """

    def __init__(self, schedule: Schedule, expected: Sequence[Expected], min_speedup: float = 1.0):
        self._schedule = schedule
        self._by_batch: dict[int, list[Expected]] = {}
        for row in sorted(expected):
            self._by_batch.setdefault(row.batch_size, []).append(row)
        self._min_speedup = min_speedup
        self._accepted_in_plan = {row.tokens: row.acceptance_length - 1 for row in expected}
        mean = sum(self._accepted_in_plan.values()) / max(len(self._accepted_in_plan), 1)
        self._accepted = self._expected = MEMORY / 4 * mean  # until the server has its own: as in the plan
        self._wait, self._waited = WAITS[0], 0
        self._probing = 0  # drafts still to be seen
        self._paused = False

    @property
    def share(self) -> float:
        return self._accepted / self._expected if self._expected > 0 else 1.0

    def __getitem__(self, batch_size: int) -> int:
        """Tokens that each of `batch_size` requests drafts in this step. Called once a step: steps are counted."""
        planned = next((size for _, last, size in self._schedule if batch_size <= last), 0)
        best = self._best(batch_size, planned)
        if best is None:
            return planned  # nothing is known about this size: as the plan says
        if self._probing:
            return best.tokens
        self._pause(self._speedup(best) < self._min_speedup)
        if not self._paused:
            self._wait, self._waited = WAITS[0], 0
            return best.tokens
        self._waited += 1
        if self._waited < self._wait:
            return 0
        self._wait, self._waited = min(2 * self._wait, WAITS[1]), 0
        self._probing = PROBE
        # What was seen long ago must not outweigh what is seen now.
        kept = PROBE / 2 * self._accepted_in_plan[best.tokens]
        if self._expected > kept:
            self._accepted, self._expected = self._accepted * kept / self._expected, kept
        return best.tokens

    def observe(self, drafted: int, accepted: int) -> None:
        """A request's draft of `drafted` tokens was verified; drafts of other sizes than the plan's do not count."""
        expected = self._accepted_in_plan.get(drafted)
        if expected is None:
            return
        keep = 1 - 1 / MEMORY
        self._accepted, self._expected = self._accepted * keep + accepted, self._expected * keep + expected
        self._probing = max(self._probing - 1, 0)

    def _pause(self, paused: bool) -> None:
        if paused != self._paused:
            logger.info(
                "%.2f of the tokens that the plan expects are accepted: drafts %s.",
                self.share, "do not pay, and pause" if paused else "pay again",
            )  # fmt: skip
        self._paused = paused

    def _best(self, batch_size: int, planned: int) -> Expected | None:
        measured = next((batch for batch in self._by_batch if batch >= batch_size), None)
        if not planned or measured is None:
            return None
        rows = [row for row in self._by_batch[measured] if row.tokens <= planned]
        return max(rows, key=self._speedup, default=None)

    def _speedup(self, row: Expected) -> float:
        return row.speedup * (1 + self.share * (row.acceptance_length - 1)) / row.acceptance_length
