"""plan.json: written and read back; everything that is no plan is refused in one sentence."""

import json
import math
from pathlib import Path

import pytest

from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.plan.file import FIELDS, Plan
from vllm_ctc_spec.plan.solve import Expected

HERE = {
    "vllm": "0.32.0", "torch": "2.13.0", "device": "a GPU", "cores": None, "threads": None, "dtype": "bfloat16",
    "target": "00ff", "drafter": "11ee", "tensor_parallel_size": 1,
}  # fmt: skip
PLAN = Plan(
    "tree", [(1, 2, 16), (3, 8, 4), (9, 100, 0)], HERE, [Expected(2, 16, 3.5, 1.5), Expected(2, 4, 2.0, 1.2)], 1.1,
    {"step_ms": {"1": {"none": 3.0}}},
)  # fmt: skip


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert Plan.load(path) == PLAN
    assert PLAN.num_speculative_tokens == 16
    assert Plan("none", [(1, 100, 0)], HERE).num_speculative_tokens == 1  # vLLM knows no fewer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has the format 1, and this release reads 2"),
        ({"draft": "bush"}, "drafts 'bush', which is none of chain, tree, ctc.cache and none"),
        ({"draft": None}, "drafts None"),
        ({"draft": "none"}, r"has the schedule .* which is none for 'none'"),
        ({"schedule": [[1, 9, 0]]}, r"has the schedule .* which is none for 'tree'"),
        ({"schedule": []}, "has the schedule"),
        ({"schedule": "all"}, "has the schedule 'all'"),
        ({"schedule": [[2, 3, 4]]}, "has the schedule"),
        ({"schedule": [[1, 3, 4], [5, 9, 1]]}, "has the schedule"),
        ({"schedule": [[1, 0, 4]]}, "has the schedule"),
        ({"schedule": [[1, 3, 65]]}, "has the schedule"),
        ({"schedule": [[1, 3, -1]]}, "has the schedule"),
        ({"schedule": [[1, 3, True]]}, "has the schedule"),
        ({"schedule": [[1, 3]]}, "has the schedule"),
        ({"made_for": {}}, "does not say what it was measured for"),
        ({"made_for": {**HERE, "colour": "red"}}, "does not say what it was measured for"),
        ({"made_for": 3}, "does not say what it was measured for"),
        ({"expected": None}, "does not say what to expect"),
        ({"expected": [[2, 16, 3.5]]}, "does not say what to expect"),
        ({"expected": [[2, 16, 3.5, "fast"]]}, "does not say what to expect"),
        ({"expected": [[2, 5, 3.5, 1.5]]}, "does not say what to expect"),  # a size that is not in the schedule
        ({"expected": [[0, 4, 3.5, 1.5]]}, "does not say what to expect"),
        ({"expected": [[2, 4, 5.5, 1.5]]}, "does not say what to expect"),  # more than the draft has
        ({"expected": [[2, 4, 0.5, 1.5]]}, "does not say what to expect"),
        ({"expected": [[2, 4, 3.5, 0.0]]}, "does not say what to expect"),
        ({"expected": [[2, 4, 3.5, math.nan]]}, "does not say what to expect"),
        ({"min_speedup": 0}, "does not say what to expect"),
        ({"min_speedup": None}, "does not say what to expect"),
    ],
)
def test_a_broken_plan_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(PLAN.to_json()), **changes}))
    with pytest.raises(DrafterConfigError, match=rf"^The plan .*plan\.json {message}.*`vllm-ctc plan`.*\.$"):
        Plan.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, "\xff"])
def test_what_is_no_plan_at_all_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DrafterConfigError, match="^The plan .*; make a new one with `vllm-ctc plan`"):
        Plan.load(path)


@pytest.mark.parametrize("field", FIELDS)
def test_the_first_difference_is_named_with_both_values(field: str) -> None:
    assert PLAN.difference(HERE) is None
    assert PLAN.difference({**HERE, field: "other"}) == (
        f"is for {FIELDS[field]} {HERE[field]!r}, and here it is 'other'"
    )


def test_what_is_not_known_is_not_compared() -> None:
    assert PLAN.difference({name: HERE[name] for name in HERE if name != "threads"}) is None
