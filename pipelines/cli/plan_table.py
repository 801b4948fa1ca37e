"""`diffattn plan`: what a method costs, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

from diffattn._checks import whole

from ..errors import UserError
from ..run.method_settings import MethodOptions, make_method
from ..run.model_shape import shape_of
from ..run.origin import SIZES, Origin, read_origin
from ..run.request import check_option
from .grid_text import read_grid, with_references

if TYPE_CHECKING:
    from diffattn import Plan, PlanBySteps
    from diffattn.planning.costs import Estimate

_SIZES = (*SIZES, "text")


@dataclass(frozen=True)
class PlanOptions:
    """The options of `diffattn plan`.

    Attributes:
        method: the attention method.
        model, grid, references: as the user wrote them.
        numbers: further arguments of `diffattn.plan` that the user gave.
        origin: files that say what the options leave open.
    """

    method: MethodOptions
    model: str | None
    grid: str | None
    references: tuple[str, ...]
    numbers: Mapping[str, int]
    origin: Origin = field(default_factory=Origin)


def plan_lines(options: PlanOptions, as_json: bool) -> Iterator[str]:
    """Plan, and yield the lines to print."""
    result = make_plan(options)
    if as_json:
        yield json.dumps(result.to_dict(), indent=2)
    else:
        yield from _table(result)


def make_plan(options: PlanOptions) -> Plan | Estimate | PlanBySteps:
    """The plan of the options.

    Raises:
        UserError: for bad options, in the library's own words.
    """
    import diffattn

    for name, value in options.numbers.items():
        check_option(name, value, whole(0 if name == "text" else 1))
    known = read_origin(options.origin, options.method, options.model, options.numbers)
    both = options.model is not None and options.grid is not None
    if both or (known.model is None and options.grid is None):
        raise UserError("give exactly one of --model and --grid")
    method = make_method(known.attention)
    if options.grid is None:
        assert known.model is not None
        target: Any = shape_of(known.model)
        numbers: dict[str, Any] = dict(known.numbers_for(target))
    else:
        # A grid takes the place of the model and the size of a record.
        target = with_references(read_grid(options.grid), options.references)
        numbers = {name: known.numbers[name] for name in known.numbers if name not in SIZES}
        numbers |= options.numbers
    try:
        if options.grid is None and options.references:
            sizes = {name: numbers.pop(name, None) for name in _SIZES}
            numbers["grid"] = with_references(target.grid(**sizes), options.references)
        return diffattn.plan(target, method, **numbers)
    except ValueError as error:
        raise UserError(error) from None


def _table(plan: Plan | Estimate | PlanBySteps) -> Iterator[str]:
    from rich.console import Console
    from rich.table import Table

    from diffattn.planning.table import rows

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows(plan):
        table.add_row(name, value)
    text = StringIO()
    Console(file=text, markup=False, highlight=False, width=100).print(table)
    yield from (line.rstrip() for line in text.getvalue().splitlines())
