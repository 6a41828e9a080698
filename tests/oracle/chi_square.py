"""Pearson's chi-square: whether counts follow a law."""

from collections import Counter
from collections.abc import Hashable, Mapping

import torch


def chi_square(seen: Counter, law: Mapping[Hashable, float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom. Cells with fewer than five expected draws are pooled. The statistic is
    infinite if something was seen that cannot happen."""
    total = seen.total()
    if any(law[cell] == 0 for cell in seen):
        return torch.inf, len(law) - 1
    large = [cell for cell, p in law.items() if total * p >= 5]
    cells = [(seen[cell], total * law[cell]) for cell in large]
    rest = total - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((total - sum(count for count, _ in cells), rest))
    return sum((count - expected) ** 2 / expected for count, expected in cells), len(cells) - 1


def upper_tail(statistic: float, freedom: int) -> float:
    """The probability of a statistic that is at least as large."""
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))


def p_value(seen: Counter, law: Mapping[Hashable, float]) -> float:
    """Near 0 if the counts are too far from the law, near 1 if they are too close to it."""
    return upper_tail(*chi_square(seen, law))
