"""`diffattn bench`: from options to groups, and a run over all groups."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffattn import TokenGrid
from diffattn.methods import Method
from diffattn.methods.registry import all_methods
from diffattn.planning.plans import check_tokens

from ..errors import RunInterruptedError, UserError
from ..run.loading import choose_device
from ..run.machine import describe_device
from ..run.method_settings import MethodOptions, attention_settings, make_method
from ..run.model_shape import shape_of
from ..run.refusals import is_lack_of_memory
from ..run.sidecar import versions
from .cases import BACKWARD, FORWARD, LAYERS_OF_A_GRID, Case, Shape, cases_of
from .fitting import Group, check_memory, check_time, duration, least_seconds
from .measure import Limits, measure
from .rows import DENSE, Record, Row, write_record
from .timing import describe, timer_for

ALL = "all"
_DEFAULT_HEADS, _DEFAULT_HEAD_DIM = 12, 128
_MODEL_SIZES = ("height", "width", "num_frames", "text")


@dataclass(frozen=True)
class Settings:
    """The options of a measurement.

    Attributes:
        methods: of --attn, such as "gna window=7,15,15"; `ALL` is every method.
        arguments: of --attn-arg, for a single method.
        configs: of --attn-config.
        grids: as read from --grid.
        model: of --model.
        sizes: height, width, num_frames and text, where given.
        heads, head_dim: with grids.
        batch, dtype, backward: of the calls.
    """

    methods: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    configs: tuple[Path, ...] = ()
    grids: tuple[TokenGrid, ...] = ()
    model: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    heads: int | None = None
    head_dim: int | None = None
    batch: int = 1
    dtype: str = "float32"
    backward: bool = False


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        minutes: for everything.
        rounds: the most rounds of a group.
        check_memory: whether to refuse what does not fit.
    """

    minutes: float
    rounds: int
    check_memory: bool


def groups_of(settings: Settings) -> list[Group]:
    """What the options ask to measure.

    Raises:
        UserError: for options that contradict each other, and methods that do not fit.
    """
    if bool(settings.grids) == (settings.model is not None):
        raise UserError("give --grid, once or several times, or --model")
    methods = _methods(settings)
    variant = family = ""
    heads, head_dim = settings.heads, settings.head_dim
    layers, grids = LAYERS_OF_A_GRID, settings.grids
    if settings.model is None:
        _refuse(settings.sizes, "with --grid, which says it all")
    else:
        numbers = {"heads": heads, "head-dim": head_dim}
        _refuse({n: x for n, x in numbers.items() if x is not None}, "with --model, which says it")
        model = shape_of(settings.model)
        try:
            sizes = {name: settings.sizes.get(name) for name in _MODEL_SIZES}
            grids = (model.grid(**sizes),)
        except ValueError as error:
            raise UserError(error) from None
        variant, family = model.variant, model.family
        heads, head_dim = model.heads, model.head_dim
        layers = max(model.block_of_site) + 1
    groups = []
    for grid in grids:
        try:
            check_tokens(grid)
        except ValueError as error:
            raise UserError(error) from None
        shape = Shape(
            grid,
            heads or _DEFAULT_HEADS,
            head_dim or _DEFAULT_HEAD_DIM,
            settings.batch,
            settings.dtype,
        )
        cases = tuple(
            case for method in methods for case in cases_of(method, variant, family, grid, layers)
        )
        for direction in (FORWARD, BACKWARD) if settings.backward else (FORWARD,):
            groups.append(Group(shape, direction, cases))
    return groups


def groups_again(rows: Sequence[Row]) -> list[Group]:
    """The groups that an earlier run has measured.

    Raises:
        UserError: if a method does not exist any more, or no row is there.
    """
    groups: dict[tuple[Shape, str], list[Case]] = {}
    for row in rows:
        cases = groups.setdefault((row.shape, row.direction), [])
        if row.method is not None:
            method = make_method(row.method)
            cases.append(Case(method, row.family, row.layer, row.layers, row.label))
    if not groups:
        raise UserError("the old run has no rows: there is nothing to measure again")
    return [Group(shape, way, tuple(cases)) for (shape, way), cases in groups.items()]


def run_groups(
    groups: Sequence[Group],
    device: str | None,
    budget: Budget,
    output: Path | None,
    tell: Callable[[str], None],
    show: Callable[[Record], None],
) -> Record:
    """Measure, and write the file after every group.

    Args:
        groups: what to measure.
        device: as the user wrote it.
        budget: how long.
        output: the file; None for none.
        tell: takes a line about the progress.
        show: takes what is finished when Ctrl-C ends the run.

    Raises:
        UserError: if the device is not there, what is asked does not fit into memory or time, or
            dense attention fails.
        RunInterruptedError: after Ctrl-C; the finished rows are shown and written.
    """
    chosen = choose_device(device)
    if output is not None:
        _check_writable(output)
    if budget.check_memory:
        check_memory(groups, chosen)
    timer = timer_for(chosen)
    least = least_seconds(groups, chosen, timer)
    check_time(least, budget.minutes, groups, str(chosen))
    if least > 10:
        tell(f"the measurement takes {duration(least)} or more on {chosen}")
    rows: list[Row] = []
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts: dict[str, Any] = {
        "device": describe_device(str(chosen)), "versions": versions_here(), "date": date,
    }  # fmt: skip
    limits = Limits(budget.rounds, 60 * budget.minutes / len(groups))

    def keep() -> Record:
        record = Record(**facts, rows=tuple(rows))
        if output is not None and rows:
            write_record(output, record)
        return record

    try:
        for group in groups:
            before = len(rows)
            try:
                measure(group, chosen, timer, limits, rows)
            except (MemoryError, RuntimeError) as error:
                if is_lack_of_memory(error):
                    tell(f"{_named(group)} left out: out of memory")
                    continue
                raise UserError(f"{_named(group)}: {describe(error)}") from error
            except NotImplementedError as error:
                raise UserError(error) from None
            keep()
            tell(f"measured {_named(group)}: {len(rows) - before} rows")
    except KeyboardInterrupt:
        record = keep()
        if not rows:
            raise RunInterruptedError([]) from None
        show(record)
        kept = [] if output is None else [output]
        if not kept:
            raise RunInterruptedError(
                [Path("the rows above")], "--output FILE keeps them in a file"
            ) from None
        raise RunInterruptedError(kept) from None
    if not rows:
        raise UserError("out of memory: take fewer tokens, fewer heads, or --dtype bfloat16")
    return keep()


def versions_here() -> dict[str, str]:
    """The versions of what computes: those of records, and Triton's and the driver's."""
    found = versions()
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "missing"
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda or f"hip {torch.version.hip}")
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _methods(settings: Settings) -> list[Method]:
    """The methods that the options name, in their order and without repetitions."""
    single = len(settings.methods) + len(settings.configs) <= 1 and settings.methods != (ALL,)
    if settings.arguments and not single:
        raise UserError(
            "--attn-arg is for a single method: write the parameters of several as in"
            ' --attn "gna window=7,15,15" --attn "vmoba preset=training"'
        )
    described: list[dict[str, Any]] = []
    for text in settings.methods or (() if settings.configs else ("radial",)):
        if text == ALL:
            described += [{"type": name} for name in all_methods() if name != "dense"]
            continue
        try:
            name, *words = shlex.split(text)
        except ValueError as error:
            raise UserError(
                f"--attn takes a method, with its parameters as in 'gna window=7,15,15', not"
                f" {text!r} ({error or 'no name'})"
            ) from None
        arguments = (*words, *settings.arguments)
        described.append(attention_settings(MethodOptions(name, arguments, None), None))
    for config in settings.configs:
        options = MethodOptions(None, settings.arguments, config)
        described.append(attention_settings(options, None))
    methods: list[Method] = []
    for entry in described:
        method = make_method(entry)
        if method not in methods:
            methods.append(method)
    return methods


def _refuse(given: Mapping[str, Any], why: str) -> None:
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{names} cannot be given {why}")


def _check_writable(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: give the name of a file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")


def _named(group: Group) -> str:
    labels = [DENSE, *(case.label for case in group.cases)]
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return f"{group.shape.grid.tokens:,} tokens, {group.direction}, {', '.join(labels[:3])}{more}"
