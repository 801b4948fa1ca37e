"""A method in few words, and tables of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.methods.base import Method
from diffattn.schedule import spelled


def method_words(method: Method) -> str:
    """A title: the method's type, and those of its own parameters that differ from the default."""
    own = [f for f in fields(method) if f.init and f.name in type(method).__annotations__]
    words = {f.name: _word(getattr(method, f.name)) for f in own}
    told = [f.name for f in own if getattr(method, f.name) != f.default]
    by_step = {name: spelled(schedule) for name, schedule in method.by_step}
    words |= by_step
    told += [name for name in by_step if name not in told]
    return "  ".join([method.type, *(f"{name}={words[name]}" for name in told)])


def reference_words(method: Method, grid: TokenGrid) -> str:
    """The policy for references on a grid, and the references that it does not apply to."""
    starts = {span.grid.video.start for span in method.spans(grid)}
    dense = [r for r in grid.references if r.start not in starts]
    words = f"{method.references}, {len(grid.references) - len(dense)} of {len(grid.references)}"
    words += " with pairs left out"
    if dense and method.references != "exact":
        sizes = ", ".join(f"{r.frames}x{r.height}x{r.width}" for r in dense)
        words += f" ({sizes}: as text)"
    return words


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
