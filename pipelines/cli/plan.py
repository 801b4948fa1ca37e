"""`diffattn plan`: its arguments; `plan_table` does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options
from .say import say

# Parameters that `plan` reads itself; all other options are arguments of `diffattn.plan`.
_NOT_OF_A_PLAN = ("method", "arg", "model", "grid", "as_json")


def plan(
    context: typer.Context,
    method: options.MethodName = "radial",
    arg: options.MethodArg = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id of a well-known model, or a pipeline's folder.")
    ] = None,
    grid: options.Grid = None,
    height: options.Pixels = None,
    width: options.Pixels = None,
    num_frames: options.Count = None,
    text: Annotated[
        int | None, typer.Option(help="Text tokens in the model's sequence (default: the model's).")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="With --grid (default: 1).")] = None,
    head_dim: Annotated[int | None, typer.Option(help="With --grid (default: 128).")] = None,
    layers: Annotated[int | None, typer.Option(help="With --grid (default: 1).")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, not a table.")] = False,
) -> None:
    """Say what a method costs on a model or grid, without running or downloading anything."""
    from .plan_table import PlanOptions, plan_lines

    numbers = options.given_options(context, _NOT_OF_A_PLAN)
    for line in plan_lines(PlanOptions(method, tuple(arg or ()), model, grid, numbers), as_json):
        say(line)
