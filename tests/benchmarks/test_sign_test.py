"""The test of two ways to answer."""

import pytest
from sign_test import sign_test


@pytest.mark.parametrize(("left", "right", "expected"), [
    ("1100", "1100", (0, 0, 1.0)),
    ("1110", "0001", (3, 1, 2 * (1 + 4) / 16)),
    ("11111", "00000", (5, 0, 2 / 32)),
    ("10", "01", (1, 1, 1.0)),
])  # fmt: skip
def test_a_sign_test_counts_the_questions_that_differ(left, right, expected):
    assert sign_test([c == "1" for c in left], [c == "1" for c in right]) == expected
