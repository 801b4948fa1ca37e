"""Paired tests: the sign test, Student's t of the differences, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Test:
    """How the values of one case differ from those of another case on the same samples.

    Attributes:
        pairs: samples that both cases have.
        higher, lower: samples on which the first case has the higher value, or the lower one.
        mean: mean difference, first less second; None where a value is infinite.
        sign_p: two-sided probability of the sign test; ties count for neither side.
        t_p: two-sided probability of the paired t-test; None for fewer than two pairs, and where a
            value is infinite.
    """

    pairs: int
    higher: int
    lower: int
    mean: float | None
    sign_p: float
    t_p: float | None


def paired_test(first: Sequence[float], second: Sequence[float]) -> Test:
    """Test whether two cases differ, by their values on the same samples."""
    pairs = list(zip(first, second, strict=True))
    higher = sum(a > b for a, b in pairs)
    lower = sum(a < b for a, b in pairs)
    differences = [0.0 if a == b else a - b for a, b in pairs]
    finite = bool(differences) and all(math.isfinite(x) for x in differences)
    return Test(
        pairs=len(pairs),
        higher=higher,
        lower=lower,
        mean=sum(differences) / len(differences) if finite else None,
        sign_p=sign_test(higher, lower),
        t_p=t_test(differences) if finite else None,
    )


def sign_test(higher: int, lower: int) -> float:
    """The two-sided probability of a split at least as uneven, of fair coins."""
    tosses = higher + lower
    tail = sum(math.comb(tosses, k) for k in range(min(higher, lower) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def t_test(differences: Sequence[float]) -> float | None:
    """The two-sided probability of differences whose mean is 0; None for fewer than two."""
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    variance = sum((x - mean) ** 2 for x in differences) / (count - 1)
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    t = mean / math.sqrt(variance / count)
    free = count - 1
    return incomplete_beta(free / 2, 0.5, free / (free + t * t))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities corrected for their number (Holm 1979), in the same order."""
    order = sorted(range(len(probabilities)), key=lambda index: probabilities[index])
    corrected = [0.0] * len(probabilities)
    largest = 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * probabilities[index]))
        corrected[index] = largest
    return corrected


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function, by its continued fraction."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    # The fraction converges fast on this side of the mean.
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x)) / a
    return front * _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """Lentz' evaluation of the continued fraction of the incomplete beta function."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for step in range(1, 500):
        even = step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step))
        odd = -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1))
        change = 1.0
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            change = c * d
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value


def _away_from_zero(x: float, tiny: float) -> float:
    return tiny if abs(x) < tiny else x
