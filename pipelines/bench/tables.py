"""Measurements and comparisons as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO

from .comparing import Comparison, name_of, shown_device
from .rows import Record, Row

# Wider than terminals: cells are never cut or wrapped, so that files and pipes get all of them.
_WIDTH = 400

_EXPLANATION = (
    "ms: median of the rounds and the range from the 10th to the 90th percentile. x dense: median"
    " of the rounds' ratios. bound: of `diffattn plan`."
)


def record_lines(record: Record) -> Iterator[str]:
    """A table for each shape and direction."""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    yield f"{shown_device(record.device)}; {versions}"
    groups: dict[str, list[Row]] = {}
    for row in record.rows:
        groups.setdefault(_title(row), []).append(row)
    for title, rows in groups.items():
        yield ""
        yield title
        yield from _table(_COLUMNS, [_cells(row) for row in rows if row.rounds])
        yield from (f"{row.label}: failed: {row.failed}" for row in rows if row.failed)
    if groups:
        yield ""
        yield _EXPLANATION


def comparison_lines(comparison: Comparison, percent: float | None) -> Iterator[str]:
    """A line for each case, and what was left out."""
    yield from comparison.versions
    rows = []
    for change in comparison.changes:
        old, new = (spread.median for spread in change.spreads)
        fails = percent is not None and change.fails(percent)
        verdict = f"{change.verdict}, by more than {percent:g} %" if fails else change.verdict
        rows.append(
            [name_of(change.new), f"{old:.4g}", f"{new:.4g}", f"{change.ratio:.3f}",
             f"{change.noise:.3f}", verdict]
        )  # fmt: skip
    unit = " x dense" if comparison.relative else " ms"
    yield from _table(["case", f"old{unit}", f"new{unit}", "new / old", "noise", ""], rows)
    yield from (f"not compared: {line}" for line in comparison.left_out)


_COLUMNS = [
    "attention", "ms", "range", "rounds", "x dense", "bound", "of bound", "density", "selection ms",
    "attention ms", "first ms", "MiB", "by",
]  # fmt: skip


def _title(row: Row) -> str:
    grid = row.shape.grid
    sizes = f"{grid.frames}x{grid.height}x{grid.width}"
    if grid.text_before:
        sizes = f"{grid.text_before}+{sizes}"
    if grid.text_after:
        sizes = f"{sizes}+{grid.text_after}"
    batch = f", batch {row.batch}" if row.batch > 1 else ""
    return (
        f"{sizes} ({grid.tokens:,} tokens), {row.heads} heads of {row.head_dim}{batch},"
        f" {row.dtype}, {row.direction}"
    )


def _cells(row: Row) -> list[str]:
    spread, selection, attention = row.spread, row.selection, row.attention
    return [
        row.label,
        f"{spread.median:.4g}",
        f"{spread.low:.4g}-{spread.high:.4g}",
        str(len(row.rounds)),
        _number(row.speed_up, ".2f"),
        _number(row.bound, ".2f"),
        _number(row.of_bound, ".0%"),
        _number(row.density, ".3f"),
        _number(None if selection is None else selection.median, ".4g"),
        _number(None if attention is None else attention.median, ".4g"),
        _number(row.first_ms, ".4g"),
        _number(row.peak_mib, ".0f"),
        row.backend,
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number in (0, len(columns) - 1) else "right")
    for row in rows:
        table.add_row(*row)
    text = StringIO()
    Console(file=text, markup=False, highlight=False, width=_WIDTH).print(table)
    yield from (line.rstrip() for line in text.getvalue().splitlines())
