"""Numbers in answers, and the test of two ways to answer."""

from fractions import Fraction

import pytest
from grading import final_number, sign_test


@pytest.mark.parametrize(("text", "number"), [
    ("She has 3 left.\n#### 18", 18),
    ("#### 7 is not the end: #### $1,234.50 in all, or 9", Fraction("1234.5")),
    ("First 12, then 30. The answer is 42.", 42),
    ("It is -5 degrees", -5),
    ("2.50 dollars", Fraction(5, 2)),
    ("none at all", None),
    ("#### unknown, 5 at most, 4 rather", 5),
    ("5 ####", None),
    ("", None),
])  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == number


def test_numbers_are_compared_as_numbers():
    assert final_number("#### 18.00") == final_number("eighteen, that is 18") == 18


@pytest.mark.parametrize(("left", "right", "expected"), [
    ("1100", "1100", (0, 0, 1.0)),
    ("1110", "0001", (3, 1, 2 * (1 + 4) / 16)),
    ("11111", "00000", (5, 0, 2 / 32)),
    ("10", "01", (1, 1, 1.0)),
])  # fmt: skip
def test_a_sign_test_counts_the_questions_that_differ(left, right, expected):
    assert sign_test([c == "1" for c in left], [c == "1" for c in right]) == expected
