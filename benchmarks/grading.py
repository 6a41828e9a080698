"""Answers to questions that have one number as their answer, and whether two ways to answer differ."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
MARK = "####"  # GSM8K's, before the final answer


def final_number(text: str) -> Fraction | None:
    """The number after the last `####`, or else the last number of the text; thousands' commas and dollars aside."""
    _, mark, after = text.rpartition(MARK)
    found = NUMBER.findall(after)
    if not found:
        return None
    return Fraction((found[0] if mark else found[-1]).replace(",", "").replace("$", ""))


def sign_test(left: Sequence[bool], right: Sequence[bool]) -> tuple[int, int, float]:
    """Questions that only `left` answers right, those that only `right` does, and the probability of so uneven a split,
    or a more uneven one, if both were equally likely (McNemar's exact test, two-sided)."""
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    split = only_left + only_right
    tail = sum(math.comb(split, k) for k in range(min(only_left, only_right) + 1))
    return only_left, only_right, min(1.0, 2 * tail / 2**split)
