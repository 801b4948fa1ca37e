"""The table of a comparison: means of each case, and its paired tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from .case import DENSE, FLOORS, Case
from .measures import BY_NAME
from .paired import Test, holm, paired_test
from .sample_table import Row

# Of times the median: other load on a machine makes single clips much slower.
_MEDIANS = ("seconds", "loop_seconds")
# Columns before and after the measures: name, title, digits.
_BEFORE = (("density", "pairs computed", 3), ("seconds", "s a clip, median", 2))
_AFTER = (("loop_seconds", "s denoising, median", 2), ("memory_gib", "peak GiB", 2))


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: as in the CSV.
        title: for people.
        better: as `Measure.better`.
        digits: after the point.
    """

    name: str
    title: str
    better: Literal["high", "low", "near"]
    digits: int


@dataclass(frozen=True)
class Cell:
    """The values of a case in one column.

    Attributes:
        mean: of the finite values, of times their median; infinity if none is finite; None without
            a value.
        deviation: standard deviation of the finite values; None for fewer than two and for times.
        infinite: how many values are infinite: frames equal to the dense model's.
        reason: why there is no value; "" if there is one.
    """

    mean: float | None
    deviation: float | None
    infinite: int
    reason: str


@dataclass(frozen=True)
class Line:
    """A case in the table.

    Attributes:
        case: the case.
        samples: how many it has.
        cells: by the names of the columns.
    """

    case: Case
    samples: int
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Compared:
    """A paired test of two cases in one measure.

    Attributes:
        first, second: names of the cases.
        measure: name of the measure.
        test: the test.
        sign_holm, t_holm: probabilities corrected for the number of tests of this measure against
            the same second case, or of all pairs of methods.
    """

    first: str
    second: str
    measure: str
    test: Test
    sign_holm: float
    t_holm: float | None


def columns(measures: Sequence[str]) -> list[Column]:
    """The columns of the table, in order."""
    found = [BY_NAME[name] for name in measures]
    before, after = (
        [Column(name, title, "low", digits) for name, title, digits in costs]
        for costs in (_BEFORE, _AFTER)
    )
    return [*before, *(Column(m.name, m.title, m.better, m.digits) for m in found), *after]


def lines(cases: Sequence[Case], rows: Sequence[Row], measures: Sequence[str]) -> list[Line]:
    """The lines of the cases that have samples."""
    found = []
    for case in cases:
        own = [row for row in rows if row.case == case.name]
        if own:
            cells = {column.name: _cell(own, column.name) for column in columns(measures)}
            found.append(Line(case, len(own), cells))
    return found


def against_floors(
    cases: Sequence[Case], rows: Sequence[Row], measures: Sequence[str]
) -> list[Compared]:
    """Each case against each floor, in each measure that compares with the dense model.

    A floor of FlexAttention is that of its own case alone.
    """
    names = [case.name for case in _compared(cases)]
    own = [(case.flex_of, case.name) for case in cases if case.flex_of is not None]
    found: list[Compared] = []
    for measure in measures:
        if BY_NAME[measure].against_dense:
            for floor in FLOORS:
                found += _corrected([(name, floor) for name in names], rows, measure)
            found += _corrected(own, rows, measure)
    return found


def _compared(cases: Sequence[Case]) -> list[Case]:
    """The cases that are neither the dense model nor floors."""
    return [case for case in cases if case.name != DENSE and not case.is_floor]


def between(cases: Sequence[Case], rows: Sequence[Row], measures: Sequence[str]) -> list[Compared]:
    """Each pair of cases that are no floors, in each measure that compares with the dense model.

    Cases of a study are paired with those that share a group with them.
    """
    own = _compared(cases)
    pairs = [
        (a.name, b.name)
        for a, b in itertools.combinations(own, 2)
        if not a.groups or not b.groups or {*a.groups} & {*b.groups}
    ]
    found: list[Compared] = []
    for measure in measures:
        if BY_NAME[measure].against_dense:
            found += _corrected(pairs, rows, measure)
    return found


def shown(cell: Cell, digits: int) -> str:
    """A cell as text."""
    if cell.mean is None:
        return "-"
    if math.isinf(cell.mean):
        return "equal"
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.{digits}f}"
    equal = f" ({cell.infinite} equal)" if cell.infinite else ""
    return f"{cell.mean:.{digits}f}{spread}{equal}"


def missing(found: Sequence[Line], measures: Sequence[str]) -> dict[str, str]:
    """The measures without any value, and why."""
    reasons = {}
    for name in measures:
        cells = [line.cells[name] for line in found]
        if all(cell.mean is None for cell in cells):
            reasons[name] = next((cell.reason for cell in cells if cell.reason), "not compared yet")
    return reasons


def as_markdown(found: Sequence[Line], tests: Sequence[Compared], measures: Sequence[str]) -> str:
    """The table, and what has no values, in Markdown."""
    without = missing(found, measures)
    kept = [column for column in columns(measures) if column.name not in without]
    head = ["case", "samples", *(column.title for column in kept)]
    out = [_row(head), _row(["---"] * len(head))]
    for line in found:
        cells = [shown(line.cells[column.name], column.digits) for column in kept]
        out.append(_row([line.case.name, str(line.samples), *cells]))
    by_reason: dict[str, list[str]] = {}
    for name, reason in without.items():
        by_reason.setdefault(reason, []).append(BY_NAME[name].title)
    out += ["", *(f"{', '.join(titles)}: {reason}." for reason, titles in by_reason.items())]
    psnr = [one for one in tests if one.measure == "psnr"]
    if psnr:
        out += ["", "PSNR against the floors (sign test and paired t-test, Holm-corrected):", ""]
        head = ["case", "floor", "lower in", "difference, dB", "sign p", "t p"]
        out += [_row(head), _row(["---"] * len(head))]
        for one in psnr:
            mean = "-" if one.test.mean is None else f"{one.test.mean:.2f}"
            t = "-" if one.t_holm is None else f"{one.t_holm:.2g}"
            split = f"{one.test.lower} of {one.test.pairs}"
            out.append(_row([one.first, one.second, split, mean, f"{one.sign_holm:.2g}", t]))
    return "\n".join(out) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cell(rows: Sequence[Row], name: str) -> Cell:
    values = [value for row in rows if (value := row.number(name)) is not None]
    if not values:
        words = [row.measures.get(name, getattr(row, name, "")) for row in rows]
        return Cell(None, None, 0, next((str(word) for word in words if word), ""))
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Cell(math.inf, None, len(values), "")
    if name in _MEDIANS:
        return Cell(median(finite), None, len(values) - len(finite), "")
    mean = sum(finite) / len(finite)
    deviation = None
    if len(finite) > 1:
        deviation = math.sqrt(sum((x - mean) ** 2 for x in finite) / (len(finite) - 1))
    return Cell(mean, deviation, len(values) - len(finite), "")


def _corrected(
    pairs: Sequence[tuple[str, str]], rows: Sequence[Row], measure: str
) -> list[Compared]:
    """The tests of pairs of cases in one measure, corrected for their number."""
    values: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        value = row.number(measure)
        if value is not None:
            values.setdefault(row.case, {})[row.sample] = value
    tests = []
    for first, second in pairs:
        a, b = values.get(first, {}), values.get(second, {})
        common = [sample for sample in a if sample in b]
        if common:
            test = paired_test([a[sample] for sample in common], [b[sample] for sample in common])
            tests.append((first, second, test))
    signs = holm([test.sign_p for _, _, test in tests])
    t_values = iter(holm([test.t_p for _, _, test in tests if test.t_p is not None]))
    return [
        Compared(a, b, measure, test, sign, None if test.t_p is None else next(t_values))
        for (a, b, test), sign in zip(tests, signs, strict=True)
    ]
