"""plan.json: what is drafted at which batch size, what it was measured for, and every measured number."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_ctc_spec.errors import DrafterConfigError, shown
from vllm_ctc_spec.kernels.limits import MAX_NODES
from vllm_ctc_spec.plan.solve import KINDS, NONE, Draft, Expected, Schedule

PLAN_NAME = "plan.json"
FORMAT = 2
FIELDS = {
    "vllm": "vLLM",
    "torch": "torch",
    "device": "the device",
    "cores": "a number of CPU cores of",
    "threads": "a number of CPU threads of",
    "dtype": "the dtype",
    "target": "the target's weights",
    "drafter": "the drafter's weights",
    "tensor_parallel_size": "the tensor_parallel_size",
}
"""What a plan is measured for, as a sentence names it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """draft: of `solve.KINDS`, or "none": never draft. made_for: a value for each of FIELDS, None for what this kind of
    device does not have. expected, min_speedup: what a server needs to judge by itself whether its drafts pay
    (`online.py`); without expectations it follows the schedule alone. measured: everything that the plan was chosen
    from; a server does not read it."""

    draft: str
    schedule: Schedule
    made_for: dict[str, Any]
    expected: list[Expected] = dataclasses.field(default_factory=list)
    min_speedup: float = 1.0
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Of `ServingOptions`. A server that never drafts is one of chains."""
        return Draft("chain" if self.draft == NONE else self.draft, self.num_speculative_tokens).options

    @property
    def num_speculative_tokens(self) -> int:
        """The largest draft; vLLM knows no fewer than 1."""
        return max(1, *(size for _, _, size in self.schedule))

    def difference(self, here: Mapping[str, Any]) -> str | None:
        """The first of FIELDS in which what this plan was measured for is not what is served here. A field that `here`
        lacks is not known here, and not compared."""
        for field, name in FIELDS.items():
            if field in here and here[field] != self.made_for[field]:
                return f"is for {name} {shown(self.made_for[field])}, and here it is {shown(here[field])}"
        return None

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """DrafterConfigError where the file is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _broken(path, f"cannot be read ({type(error).__name__})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else content
            raise _broken(path, f"has the format {shown(found)}, and this release reads {FORMAT}")
        draft, made_for, schedule = content.get("draft"), content.get("made_for"), _schedule(content.get("schedule"))
        if draft not in (*KINDS, NONE):
            raise _broken(path, f"drafts {shown(draft)}, which is none of {', '.join(KINDS)} and {NONE}")
        if schedule is None or (draft == NONE) != all(size == 0 for _, _, size in schedule):
            raise _broken(path, f"has the schedule {shown(content.get('schedule'))}, which is none for {draft!r}")
        if not isinstance(made_for, dict) or made_for.keys() != FIELDS.keys():
            raise _broken(path, f"does not say what it was measured for: made_for is {shown(made_for)}")
        expected, min_speedup = _expected(content.get("expected"), schedule), content.get("min_speedup")
        if expected is None or not isinstance(min_speedup, int | float) or not 0 < min_speedup < math.inf:
            raise _broken(path, "does not say what to expect of its drafts")
        return cls(draft, schedule, made_for, expected, min_speedup, content.get("measured", {}))


def _schedule(value: Any) -> Schedule | None:
    """Ranges of batch sizes from 1 on without gaps, and the tokens that each drafts; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    ranges: Schedule = []
    for entry in value:
        if not isinstance(entry, list) or [type(number) for number in entry] != [int, int, int]:
            return None
        first, last, size = entry
        if first != (ranges[-1][1] + 1 if ranges else 1) or last < first or not 0 <= size <= MAX_NODES:
            return None
        ranges.append((first, last, size))
    return ranges


def _expected(value: Any, schedule: Schedule) -> list[Expected] | None:
    """Rows of sizes that the schedule has; None for anything else."""
    sizes = {size for _, _, size in schedule}
    if not isinstance(value, list):
        return None
    rows = []
    for entry in value:
        if not isinstance(entry, list) or [type(number) for number in entry] != [int, int, float, float]:
            return None
        row = Expected(*entry)
        if row.batch_size < 1 or row.tokens not in sizes or not 1 <= row.acceptance_length <= 1 + row.tokens:
            return None
        if not 0 < row.speedup < math.inf:
            return None
        rows.append(row)
    return rows


def _broken(path: Path, why: str) -> DrafterConfigError:
    return DrafterConfigError(f"The plan {path} {why}; make a new one with `vllm-ctc plan`, or serve without it.")
