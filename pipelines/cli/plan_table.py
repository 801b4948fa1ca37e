"""`diffattn plan`: what a method costs, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffattn._checks import whole

from ..errors import UserError
from ..run.method_settings import MethodOptions, attention_settings, make_method
from ..run.model_shape import shape_of
from ..run.request import check_option
from .grid_text import read_grid, with_references

if TYPE_CHECKING:
    from diffattn import Plan
    from diffattn.planning.costs import Estimate

_SIZES = ("height", "width", "num_frames", "text")


@dataclass(frozen=True)
class PlanOptions:
    """The options of `diffattn plan`.

    Attributes:
        method: the attention method.
        model, grid, references: as the user wrote them.
        numbers: further arguments of `diffattn.plan` that the user gave.
    """

    method: MethodOptions
    model: str | None
    grid: str | None
    references: tuple[str, ...]
    numbers: Mapping[str, int]


def plan_lines(options: PlanOptions, as_json: bool) -> Iterator[str]:
    """Plan, and yield the lines to print."""
    result = make_plan(options)
    if as_json:
        yield json.dumps(result.to_dict(), indent=2)
    else:
        yield from _table(result)


def make_plan(options: PlanOptions) -> Plan | Estimate:
    """The plan of the options.

    Raises:
        UserError: for bad options, in the library's own words.
    """
    import diffattn

    if (options.model is None) == (options.grid is None):
        raise UserError("give exactly one of --model and --grid")
    method = make_method(attention_settings(options.method, None))
    numbers: dict[str, Any] = dict(options.numbers)
    for name, value in numbers.items():
        check_option(name, value, whole(0 if name == "text" else 1))
    target: Any
    if options.grid is not None:
        target = with_references(read_grid(options.grid), options.references)
    else:
        target = shape_of(options.model or "")
    try:
        if options.model is not None and options.references:
            sizes = {name: numbers.pop(name, None) for name in _SIZES}
            numbers["grid"] = with_references(target.grid(**sizes), options.references)
        return diffattn.plan(target, method, **numbers)
    except ValueError as error:
        raise UserError(error) from None


def _table(plan: Plan | Estimate) -> Iterator[str]:
    from rich.console import Console
    from rich.table import Table

    from diffattn.planning.table import rows

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows(plan):
        table.add_row(name, value)
    console = Console(markup=False, highlight=False, width=100)
    with console.capture() as capture:
        console.print(table)
    yield from (line.rstrip() for line in capture.get().splitlines())
