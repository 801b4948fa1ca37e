"""`diffattn plan`: what a method costs, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffattn._checks import whole

from ..errors import UserError
from ..run.loading import find_model, read_defaults
from ..run.method_settings import make_method, read_arguments
from ..run.request import BUNDLED_MODEL, check_option
from .grid_text import read_grid

if TYPE_CHECKING:
    from diffattn import Plan
    from diffattn.planning.costs import Estimate

_FROM_MODEL = ("height", "width", "num_frames", "steps")


@dataclass(frozen=True)
class PlanOptions:
    """The options of `diffattn plan`.

    Attributes:
        method: name of the method.
        arguments: each --arg, as "name=value".
        model, grid: as the user wrote them.
        numbers: further arguments of `diffattn.plan` that the user gave.
    """

    method: str
    arguments: tuple[str, ...]
    model: str | None
    grid: str | None
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
    arguments = read_arguments(options.arguments, "--arg", "--method")
    method = make_method({"type": options.method} | arguments)
    numbers = dict(options.numbers)
    for name, value in numbers.items():
        check_option(name, value, whole(0 if name == "text" else 1))
    target: diffattn.TokenGrid | str | Path
    if options.grid is not None:
        target = read_grid(options.grid)
    else:
        assert options.model is not None
        target = options.model
        if target == BUNDLED_MODEL or Path(target).expanduser().is_dir():
            target = Path(find_model(target) if target == BUNDLED_MODEL else target).expanduser()
            _fill(numbers, options.model, target)
    try:
        return diffattn.plan(target, method, **numbers)
    except ValueError as error:
        raise UserError(error) from None


def _fill(numbers: dict[str, int], model: str, folder: Path) -> None:
    """Fill in the numbers that the user left out, as the folder's model recommends."""
    defaults = read_defaults(model, folder)
    defaults["steps"] = defaults.get("num_inference_steps")
    for name in _FROM_MODEL:
        if name not in numbers and defaults.get(name) is not None:
            numbers[name] = defaults[name]


def _table(plan: Plan | Estimate) -> Iterator[str]:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(plan):
        table.add_row(name, value)
    console = Console(markup=False, highlight=False, width=100)
    with console.capture() as capture:
        console.print(table)
    yield from (line.rstrip() for line in capture.get().splitlines())


def _rows(plan: Plan | Estimate) -> Iterator[tuple[str, str]]:
    from diffattn import Plan
    from diffattn.draw import method_words

    yield "method", method_words(plan.method)
    if plan.model is not None:
        yield "model", plan.model
    yield "grid", f"{plan.grid}, {plan.tokens:,} tokens"
    yield "attention", f"{plan.layers} x {plan.heads} heads of {plan.head_dim}"
    yield from _block_rows(plan) if isinstance(plan, Plan) else _estimated_rows(plan)
    yield (
        "FLOPs of a layer",
        f"{_flops(plan.dense_flops)} dense, {_flops(plan.sparse_flops)} sparse",
    )
    yield (
        "FLOPs of a forward",
        f"{_flops(plan.dense_forward_flops)} dense, {_flops(plan.sparse_forward_flops)} sparse"
        f" ({plan.dense_layers} of {plan.layers} layers stay dense)",
    )
    if plan.linear_flops is not None and plan.attention_share is not None:
        yield (
            "other layers",
            f"{_flops(plan.linear_flops)}; attention is {plan.attention_share:.1%} of the time",
        )
    if plan.steps is not None:
        yield "dense steps", f"{plan.dense_steps} of {plan.steps}"
        yield "attention of a run", f"{plan.run_density:.1%} of dense"
    by_tokens = f" ({plan.flop_speedup:.2f}x by tokens)" if isinstance(plan, Plan) else ""
    yield (
        "speed-up at most",
        f"{plan.attention_speedup:.2f}x of a sparse attention{by_tokens}"
        + ("" if plan.model_speedup is None else f", {plan.model_speedup:.2f}x of the whole model"),
    )


def _estimated_rows(plan: Estimate) -> Iterator[tuple[str, str]]:
    """Rows of a method that has no mask."""
    if plan.density is not None:
        kind = "exact" if plan.is_exact else "an estimate: what attends depends on the data"
        yield "token density", f"{plan.density:.2%} on average over the layers, {kind}"
    if plan.selection_flops:
        yield (
            "selection",
            f"{_flops(plan.selection_flops)} of a layer's FLOPs decide what attends",
        )


def _block_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """Rows of a mask and of the blocks that the mask visits."""
    yield "token density", f"{plan.density:.2%}"
    if plan.extra_keys:
        yield (
            "pooled keys",
            f"{plan.extra_keys:,} more for every token but those of text:"
            f" {plan.extra_share:.2%} as many pairs",
        )
    tiles = "" if plan.tile is None else f" ({'x'.join(map(str, plan.tile))} tiles)"
    yield "blocks", f"{plan.blocks:,} of {plan.block_size} tokens{tiles}"
    yield (
        "visited blocks",
        f"{plan.visited_blocks:,} ({plan.block_density:.2%}):"
        f" {plan.full_blocks:,} full, {plan.partial_blocks:,} partial",
    )
    yield "worst query block", f"visits {plan.worst_blocks:,} of {plan.columns:,} key blocks"
    yield "layout", f"{plan.layout_bytes / 2**10:,.0f} KiB"
    yield "block-sparse", _block_sparse(plan)


def _block_sparse(plan: Plan) -> str:
    if plan.is_block_sparse:
        but = " but those with text or at the end" if plan.partial_blocks else ""
        return f"yes: no block needs a mask{but}"
    if plan.method.type != "gna":
        return "no"
    best = plan.nearest_block_sparse
    if best is None:
        return "no; in whole tiles of this grid only dense attention is"
    nearest = (f"{name}={','.join(map(str, getattr(best, name)))}" for name in ("window", "stride"))
    return f"no; the nearest setting that is: {' '.join(nearest)}"


def _flops(count: float) -> str:
    """A number of FLOPs with its unit."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g} {unit}FLOP"
    return f"{count:.4g} FLOP"
