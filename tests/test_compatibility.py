"""The table of features is what the tests declare."""

from types import SimpleNamespace

import pytest

from . import compatibility
from .compatibility import BEGIN, END, SAME, features, table, with_table


def item(*marks: pytest.MarkDecorator) -> SimpleNamespace:
    """As much of a collected test as is read."""
    return SimpleNamespace(
        nodeid="test_it",
        iter_markers=lambda name: (mark.mark for mark in marks if mark.name == name),
        get_closest_marker=lambda name: next((mark for mark in marks if mark.name == name), None),
    )


feature, slow = pytest.mark.feature, pytest.mark.slow


def test_the_table_in_readme_is_the_one_of_the_tests(collected_features):
    text = compatibility.PAGE.read_text(encoding="utf-8")
    wanted = with_table(text, table(collected_features))
    assert text == wanted, "write it anew: pytest --collect-only -q --write-compatibility"


def test_rows_of_the_table():
    items = [
        item(feature("stop", "`n`")),
        item(feature("Ray", chain=SAME), slow),
        item(feature("Ray", tree=SAME), slow),
        item(feature("Ray", tree=SAME)),
        item(feature("MLA", tree="refused: no kernel")),
        item(slow),
    ]
    assert table(features(items)).splitlines() == [
        "| feature | chain | tree |",
        "|---|---|---|",
        "| MLA | not tested | refused: no kernel |",
        "| `n` | same tokens | same tokens |",
        "| Ray | same tokens * | same tokens |",
        "| stop | same tokens | same tokens |",
    ]


@pytest.mark.parametrize(
    ("outcomes", "says"),
    [
        ({"tree": "refused"}, "another test 'same tokens'"),
        ({"tree": "fine"}, "outcomes are same tokens"),
        ({"forest": SAME}, "outcomes are same tokens"),
    ],
    ids=str,
)
def test_marks_that_cannot_be_a_row(outcomes, says):
    with pytest.raises(pytest.UsageError, match=f"test_it marks 'MLA'.*{says}"):
        features([item(feature("MLA")), item(feature("MLA", **outcomes))])


def test_only_the_table_of_the_text_is_written():
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
