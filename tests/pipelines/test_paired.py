"""Paired tests against published tables and sums written from the definition."""

import itertools
import math
import random

import pytest

from diffattn.pipelines.compare.paired import (
    holm,
    incomplete_beta,
    paired_test,
    sign_test,
    t_test,
)


@pytest.mark.parametrize(("higher", "lower"), [(0, 0), (5, 0), (3, 7), (8, 8), (1, 11)])
def test_the_sign_test_counts_every_toss(higher: int, lower: int) -> None:
    tosses = higher + lower
    uneven = abs(higher - lower)
    outcomes = list(itertools.product((-1, 1), repeat=tosses))
    share = sum(abs(sum(one)) >= uneven for one in outcomes) / len(outcomes)
    assert sign_test(higher, lower) == pytest.approx(share)


# Two-sided critical values of Student's t at 5 % and 1 %.
@pytest.mark.parametrize(
    ("free", "t", "p"),
    [(1, 12.706, 0.05), (4, 2.776, 0.05), (9, 3.250, 0.01), (29, 2.045, 0.05), (120, 2.617, 0.01)],
)
def test_the_t_test_has_the_table_of_critical_values(free: int, t: float, p: float) -> None:
    assert incomplete_beta(free / 2, 0.5, free / (free + t * t)) == pytest.approx(p, rel=2e-3)
    # Differences with that t: +-1 around a mean.
    count = free + 1
    spread = [1.0, -1.0] * (count // 2) + [0.0] * (count % 2)
    error = math.sqrt(sum(x * x for x in spread) / free / count)
    assert t_test([x + t * error for x in spread]) == pytest.approx(p, rel=2e-3)


def test_chance_differences_give_even_probabilities() -> None:
    draw = random.Random(0)
    found = [t_test([draw.gauss(0, 1) for _ in range(6)]) for _ in range(2000)]
    below = sum(p is not None and p < 0.25 for p in found) / len(found)
    assert below == pytest.approx(0.25, abs=0.03)


def test_equal_and_infinite_values() -> None:
    same = paired_test([3.0, math.inf], [3.0, math.inf])
    assert (same.higher, same.lower, same.sign_p, same.mean, same.t_p) == (0, 0, 1.0, 0.0, 1.0)
    apart = paired_test([20.0, 21.0, 22.0], [math.inf, math.inf, 40.0])
    assert (apart.higher, apart.lower, apart.mean, apart.t_p) == (0, 3, None, None)
    assert apart.sign_p == 0.25
    assert paired_test([1.0], [2.0]).t_p is None
    assert t_test([1.0, 1.0]) == 0.0


def test_holm_keeps_the_order_and_never_helps() -> None:
    # Holm 1979: the smallest times 4, the next times 3, ...
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
