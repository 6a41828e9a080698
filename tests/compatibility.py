"""The table of what works with the drafter, from the marks of the tests that show it.

A test says `@pytest.mark.feature("beam search")`: with chains and with trees the tokens are those without a drafter.
Where the outcome is another one, or the test shows it for one kind of draft only, it says so:
`feature("MLA targets", tree="refused")`. What the mark declares is what the test asserts.

    pytest --collect-only -q --write-compatibility

writes the table; tests/test_compatibility.py compares it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs/compatibility.md"
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
DRAFTS = ("chain", "tree")
SAME = "same tokens"
# A declared outcome is one of these, and a reason after a colon where one helps.
OUTCOMES = (
    SAME, "same law", "not the target's law", "reproducible", "refused", "request refused", "not testable on a CPU",
)  # fmt: skip
UNTESTED = "not tested"


@dataclass
class Feature:
    """A row: what tests declare for each kind of draft, and which kinds a default run shows."""

    outcomes: dict[str, str] = field(default_factory=dict)
    by_default: set[str] = field(default_factory=set)

    def cell(self, draft: str) -> str:
        if draft not in self.outcomes:
            return UNTESTED
        return self.outcomes[draft] + ("" if draft in self.by_default else " *")


def features(items: Iterable[pytest.Item]) -> dict[str, Feature]:
    """All marked features by name. Tests that contradict each other are an error."""
    found: dict[str, Feature] = {}
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        for mark in item.iter_markers("feature"):
            outcomes = mark.kwargs or dict.fromkeys(DRAFTS, SAME)
            for name in mark.args:
                feature = found.setdefault(name, Feature())
                for draft, outcome in outcomes.items():
                    declare(feature, draft, outcome, f"{item.nodeid} marks {name!r}")
                    feature.by_default.update(() if slow else [draft])
    return found


def declare(feature: Feature, draft: str, outcome: str, where: str) -> None:
    if draft not in DRAFTS or outcome.partition(":")[0] not in OUTCOMES:
        raise pytest.UsageError(f"{where} with {draft}={outcome!r}: outcomes are {', '.join(OUTCOMES)}.")
    if feature.outcomes.setdefault(draft, outcome) != outcome:
        raise pytest.UsageError(f"{where} with {draft}={outcome!r}, another test {feature.outcomes[draft]!r}.")


def table(found: dict[str, Feature]) -> str:
    rows = [
        f"| {name} | {' | '.join(found[name].cell(draft) for draft in DRAFTS)} |"
        for name in sorted(found, key=lambda name: name.strip("`").casefold())
    ]
    return "\n".join(["| feature | chain | tree |", "|---|---|---|", *rows])


def with_table(text: str, new_table: str) -> str:
    """The page with the table between its two comments."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{new_table}\n{END}{after}"


def is_everything(config: pytest.Config) -> bool:
    """Whether this run has collected all tests (whatever it deselects afterwards)."""
    asked = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
    everything = {(config.rootpath / path).resolve() for path in config.getini("testpaths")}
    return asked == everything and not config.getoption("ignore") and not config.getoption("ignore_glob")
