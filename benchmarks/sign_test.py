"""Whether two ways to answer the same questions differ."""

import math
from collections.abc import Sequence


def sign_test(left: Sequence[bool], right: Sequence[bool]) -> tuple[int, int, float]:
    """Questions that only `left` answers right, those that only `right` does, and the probability of so uneven a split,
    or a more uneven one, if both were equally likely (McNemar's exact test, two-sided)."""
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    split = only_left + only_right
    tail = sum(math.comb(split, k) for k in range(min(only_left, only_right) + 1))
    return only_left, only_right, min(1.0, 2 * tail / 2**split)
