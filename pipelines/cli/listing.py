"""The tables that `diffattn methods` and `diffattn models` print."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator


def method_lines() -> Iterator[str]:
    """Describe every method: its paper, and its parameters with defaults.

    A plug-in that cannot be loaded is left out, with a warning.
    """
    from diffattn.methods import all_methods

    for name, method in all_methods().items():
        title = (inspect.getdoc(method) or "").partition("\n")[0].rstrip(".")
        paper = "" if method.paper in title else f" ({method.paper})"
        yield f"{name}: {method.__name__}, {title}{paper}"
        parameters = [item for item in dataclasses.fields(method) if item.init]
        # Parameters that all methods share come last.
        parameters.sort(key=lambda item: item.name not in method.__annotations__)
        width = max(len(item.name) for item in parameters)
        for item in parameters:
            default = "by model" if item.default is None else item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            yield f"  {item.name:{width}}  [{default}]  {item.metadata.get('help', '')}".rstrip()


def model_lines() -> Iterator[str]:
    """Yield the lines of a table of the model families."""
    from diffattn.models import FAMILIES

    head = ("family", "text", "tested on", "attention sites", "models")
    rows = [head]
    for family in FAMILIES:
        rows.append(
            (
                family.name,
                family.text or "apart",
                family.tested,
                _readable(family.sites.pattern),
                f"{family.title}: {', '.join(family.model_classes)}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _readable(pattern: str) -> str:
    """A pattern of module names in the form that people write, with `*` for a number."""
    for regular, plain in ((r"(?P<layer>\d+)", "*"), ("?P<layer>", ""), (r"\d+", "*"), ("?:", "")):
        pattern = pattern.replace(regular, plain)
    return pattern.replace("\\", "")
