"""What to draft at each batch size: arithmetic on measured step times and acceptance lengths, and nothing else.

A step takes the same time whatever is accepted of its drafts. A batch of B requests with the acceptance length L makes
B * L tokens in a step, so that L / step_time is to be as large as it can be, at every batch size by itself.
"""

import re
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple

NONE = "none"
MERGED = "ctc+cache"  # trees of the drafter and of the request's own tokens, by their name in `ctc_sources`
KINDS = ("chain", "tree", MERGED)
"""Fixed when a server starts; vLLM varies the number of drafted tokens alone by batch size."""
SERVED = "plan"  # in measured step times: a server that follows the plan
UNBOUNDED = 2**20  # a batch size that no server reaches

StepTimes = Mapping[int, Mapping[str, float]]
"""Milliseconds by batch size and draft: "chain:5", "tree:16", "ctc+cache:16", and NONE, which every batch size has."""
Lengths = Mapping[str, float]
"""Acceptance length by draft."""
Schedule = list[tuple[int, int, int]]
"""(first batch size, last, drafted tokens), as vLLM's `num_speculative_tokens_per_batch_size`."""


class Draft(NamedTuple):
    kind: str  # one of KINDS
    size: int  # labels of a chain, nodes of a tree

    @property
    def options(self) -> dict[str, Any]:
        """Of `ServingOptions`."""
        return {"draft": "tree", "sources": MERGED} if self.kind == MERGED else {"draft": self.kind}

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}"

    @classmethod
    def parse(cls, text: str) -> "Draft | None":
        """None where the text is none, such as "chain:5"."""
        match = re.fullmatch(rf"({'|'.join(map(re.escape, KINDS))}):([1-9][0-9]{{0,3}})", text, re.ASCII)
        return cls(match[1], int(match[2])) if match else None


class Choice(NamedTuple):
    """What is drafted at one batch size, and what is expected of it."""

    batch_size: int
    draft: str  # or NONE
    step_ms: float
    acceptance_length: float  # 1 without drafts
    speedup: float  # against no speculation

    @property
    def size(self) -> int:
        """Drafted tokens."""
        draft = Draft.parse(self.draft)
        return draft.size if draft else 0

    @property
    def none_ms(self) -> float:
        """Milliseconds of a step without speculation."""
        return self.step_ms * self.speedup / self.acceptance_length

    @property
    def tokens_a_second(self) -> float:
        return 1e3 * self.batch_size * self.acceptance_length / self.step_ms


class Expected(NamedTuple):
    """What was measured of one size of draft at one batch size."""

    batch_size: int
    tokens: int
    acceptance_length: float
    speedup: float  # against no speculation


def choose(steps: StepTimes, lengths: Lengths, kind: str, min_speedup: float) -> tuple[Choice, ...]:
    """By batch size the draft of this kind that makes most tokens a second, the smallest among equals; none where none
    reaches `min_speedup` times no speculation."""
    drafts = sorted(draft for text in lengths if (draft := Draft.parse(text)) and draft.kind == kind)
    choices = []
    for batch, times in sorted(steps.items()):
        expected = [_expected(batch, str(draft), times, lengths) for draft in drafts]
        paying = [choice for choice in expected if choice.speedup >= min_speedup]
        choices.append(max(paying, key=lambda choice: choice.speedup, default=_nothing(batch, times)))
    return tuple(choices)


def _expected(batch: int, draft: str, times: Mapping[str, float], lengths: Lengths) -> Choice:
    return Choice(batch, draft, times[draft], lengths[draft], lengths[draft] * times[NONE] / times[draft])


def _nothing(batch: int, times: Mapping[str, float]) -> Choice:
    return Choice(batch, NONE, times[NONE], 1.0, 1.0)


def mean_speed(choices: Sequence[Choice]) -> float:
    """Geometric mean of the tokens a second over the batch sizes."""
    return geometric_mean(choice.tokens_a_second for choice in choices)


def better_kind(choices: Mapping[str, Sequence[Choice]]) -> str:
    """The first of the kinds among equals."""
    return max(choices, key=lambda kind: mean_speed(choices[kind]))


def needs_confirmation(choices: Sequence[Choice]) -> bool:
    """Whether a server that follows these choices does anything that the candidates' own times do not say."""
    return len({choice.size for choice in choices}) > 1


def confirmed(choices: Sequence[Choice], steps: StepTimes, min_speedup: float) -> tuple[Choice, ...]:
    """The same with the times of a server that follows them, without the drafts that do not reach `min_speedup` there.

    steps: by batch size, SERVED and NONE. Such a server drafts its largest draft at every batch size and verifies the
    first rows of it, which takes longer than a smaller draft alone; and where nothing is drafted, the drafter still
    reads what the target computes.
    """
    kept = []
    for choice in choices:
        times = steps[choice.batch_size]
        speedup = choice.acceptance_length * times[NONE] / times[SERVED]
        if choice.size and speedup < min_speedup:
            kept.append(_nothing(choice.batch_size, {NONE: choice.none_ms}))
        else:
            step_ms = choice.none_ms * times[SERVED] / times[NONE]  # the machine may be slower or faster by now
            kept.append(choice._replace(step_ms=step_ms, speedup=speedup))
    return tuple(kept)


def schedule(choices: Sequence[Choice]) -> Schedule:
    """A batch size between measured ones takes the next larger one's draft; beyond the largest nothing is drafted."""
    ranges: Schedule = []
    first = 1
    for last, size in [*((choice.batch_size, choice.size) for choice in choices), (UNBOUNDED, 0)]:
        if ranges and ranges[-1][2] == size:
            ranges[-1] = (ranges[-1][0], last, size)
        else:
            ranges.append((first, last, size))
        first = last + 1
    return ranges


def expected(choices: Sequence[Choice], steps: StepTimes, lengths: Lengths) -> list[Expected]:
    """Every size of the choices' schedule at every batch size, the chosen ones as they are expected there."""
    drafts = {choice.size: choice.draft for choice in choices if choice.size}
    rows = []
    for choice in choices:
        for size, draft in sorted(drafts.items()):
            if choice.draft == draft:
                of_size = choice
            else:
                of_size = _expected(choice.batch_size, draft, steps[choice.batch_size], lengths)
            rows.append(Expected(choice.batch_size, size, of_size.acceptance_length, of_size.speedup))
    return rows
