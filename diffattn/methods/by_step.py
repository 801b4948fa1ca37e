"""Parameters of methods that differ from step to step: how they are written, checked and kept."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from diffattn.schedule import PerStep, StepValue, step_value_of

if TYPE_CHECKING:
    from diffattn.methods.base import Method

# Methods that are kept, each for the values of a step: so many, and so many bytes of block lists.
_MOST_KEPT = 256
_MOST_BYTES = 1 << 29
# Lengths of runs that schedules are tried on where no list gives the length.
_TRIED_RUNS = (1, 2, 3, 50)
# Parameters that already say which steps are meant.
_ABOUT_STEPS = ("dense_steps", "last_dense_steps")


def schedules_in(method: Method) -> dict[str, StepValue]:
    """The schedules among the values of a method's parameters that have been given.

    Raises:
        ValueError: for a schedule of a parameter that cannot differ from step to step.
    """
    found = {}
    for item in fields(method):
        if not item.init or item.name == "by_step":
            continue
        value = getattr(method, item.name)
        schedule = step_value_of(value)
        if (
            schedule is None
            and isinstance(value, list | tuple)
            and not _kinds(type(method), item.name) & _SEQUENCES
        ):
            try:
                schedule = PerStep(*value)
            except ValueError as error:
                raise ValueError(f"{item.name}: {error}") from None
        if schedule is None:
            continue
        if item.name in _ABOUT_STEPS:
            raise ValueError(
                f"{item.name} is {value!r}, but says itself which steps it is about: give a number"
                f" of steps or a fraction"
            )
        if item.name in method.same_in_every_step:
            raise ValueError(
                f"{item.name} is {value!r}, but cannot differ from step to step: it decides about"
                f" weights or the model's structure under {method.type}. Give one value"
            )
        found[item.name] = schedule
    return found


def check_lengths(schedules: Mapping[str, StepValue]) -> None:
    """Raise ValueError unless all lists have the same number of values."""
    lengths = {name: s.length for name, s in schedules.items() if s.length is not None}
    if len(set(lengths.values())) > 1:
        counts = " and ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(
            f"{counts} values, one a step, but a run has one number of steps: give lists of equal"
            f" length"
        )


def check_run(schedules: Mapping[str, StepValue], steps: int) -> None:
    """Raise ValueError if a list has another number of values than a run has steps."""
    for name, schedule in schedules.items():
        if steps and schedule.length not in (None, steps):
            raise ValueError(
                f"{name} has {schedule.length} values, one a step, but the run has {steps} steps:"
                f" give {steps} values, or a schedule for runs of any length, such as"
                f" ramp(first, last)"
            )


def tried_moments(schedules: Mapping[str, StepValue]) -> Iterator[tuple[int, int]]:
    """Steps, and lengths of runs, that show what values a schedule has."""
    lengths = [s.length for s in schedules.values() if s.length is not None]
    for steps in lengths[:1] or _TRIED_RUNS:
        for step in range(steps):
            yield step, steps


def value_at(cls: type[Method], name: str, schedule: StepValue, step: int, steps: int) -> Any:
    """The value of a parameter in a step; rounded for parameters that are whole numbers."""
    value = schedule.at(step, steps)
    kinds = _kinds(cls, name)
    return (
        round(value) if isinstance(value, float) and int in kinds and float not in kinds else value
    )


def as_json(cls: type[Method], name: str, schedule: StepValue) -> Any:
    """A schedule ready for JSON, a list as a list where that is clear."""
    if isinstance(schedule, PerStep) and not _kinds(cls, name) & _SEQUENCES:
        return list(schedule.values)
    return schedule.to_json()


def forget_oldest(kept: dict[Any, Method]) -> None:
    """Drop the methods that were made first until the others take little memory.

    The newest stays. Methods of a few phases that come again and again are all kept.
    """
    while len(kept) > 1 and (len(kept) > _MOST_KEPT or _kept_bytes(kept) > _MOST_BYTES):
        del kept[next(iter(kept))]


def _kept_bytes(kept: Mapping[Any, Method]) -> int:
    return sum(method.kept_bytes for method in {id(m): m for m in kept.values()}.values())


_SEQUENCES = frozenset((list, tuple))


@cache
def _kinds(cls: type[Method], name: str) -> frozenset[Hashable]:
    """The types of a parameter's values; classes of sequences as `list` or `tuple`."""
    try:
        hint = get_type_hints(cls)[name]
    except NameError:  # a name that only type checkers import
        hint = next(f.type for f in fields(cls) if f.name == name)
    if isinstance(hint, str):
        words = {"tuple": tuple, "list": list, "Sequence": tuple, "int": int, "float": float}
        return frozenset(kind for word, kind in words.items() if word in hint)
    return frozenset(_plain_kinds(hint))


def _plain_kinds(hint: Any) -> Iterator[Hashable]:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _plain_kinds(part)
        return
    kind = origin or hint
    is_sequence = isinstance(kind, type) and kind not in (str, bytes) and hasattr(kind, "__len__")
    yield tuple if is_sequence and not issubclass(kind, Mapping) else kind
