"""Checks of settings: one test and one wording for each kind of value, in all packages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypeGuard

# Similarity from which a name counts as misspelt: "decay" for "decay_factor" does, ".avi" for
# ".gif" does not.
_ALIKE = 0.55


@dataclass(frozen=True)
class Allowed:
    """The values that a setting may have.

    Attributes:
        words: the end of a sentence with "must be", such as "an integer of at least 1".
        holds: tells whether a value is allowed.
        names: the allowed values where they are names; messages suggest the nearest.
    """

    words: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number; a bool is not."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


FLAG = Allowed("true or false", lambda value: isinstance(value, bool))


def whole(at_least: int, at_most: int | None = None) -> Allowed:
    """Whole numbers between two bounds, both included; worded for settings of a run."""
    if at_most is None:
        words, most = f"a whole number of at least {at_least}", math.inf
    else:
        words, most = f"a whole number from {at_least} to {at_most}", at_most
    return Allowed(words, lambda value: is_whole(value) and at_least <= value <= most)


def count(at_least: int) -> Allowed:
    """Integers of at least `at_least`; worded for the parameters of methods."""
    return replace(whole(at_least), words=f"an integer of at least {at_least}")


def number(
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> Allowed:
    """Finite numbers between bounds; only `at_least` and `at_most` are themselves allowed."""
    bounds = {"of at least": at_least, "above": above, "at most": at_most, "below": below}
    said = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]

    def holds(value: object) -> bool:
        return is_number(value) and at_least <= value <= at_most and above < value < below

    return Allowed(f"a number {' and '.join(said)}" if said else "a finite number", holds)


def choice(names: Iterable[str]) -> Allowed:
    """The given names."""
    known = tuple(names)
    # A tuple, not a set: a value without a hash, such as a list, is refused too.
    return Allowed(f"one of {', '.join(known)}", lambda value: value in known, known)


def sides(axes: int) -> Allowed:
    """The sides of a box of tokens, a tuple of `axes` integers; `axes` is 2 or 3."""
    names, many = {2: ("rows and columns", "two"), 3: ("frames, rows and columns", "three")}[axes]

    side = whole(1)

    def holds(value: object) -> bool:
        return isinstance(value, tuple) and len(value) == axes and all(map(side.holds, value))

    return Allowed(f"{names} of tokens: {many} integers of at least 1", holds)


def check(name: str, value: object, allowed: Allowed, error: type[Exception] = ValueError) -> None:
    """Raise `error`, with the name, the value and what is allowed, unless the value is allowed."""
    if not allowed.holds(value):
        raise error(f"{name} is {value!r}, but must be {allowed.words}")


def check_fields(
    settings: Any, allowed: Mapping[str, Allowed], error: type[Exception] = ValueError
) -> None:
    """Raise `error` for the first field of a dataclass that `refused` yields."""
    for name in refused(settings, allowed):
        check(name, getattr(settings, name), allowed[name], error)


def refused(settings: Any, allowed: Mapping[str, Allowed]) -> Iterator[str]:
    """The fields of a dataclass whose values are not allowed, in the order of `allowed`.

    A field whose default is None may be None.
    """
    optional = {field.name for field in fields(settings) if field.default is None}
    for name, values in allowed.items():
        value = getattr(settings, name)
        if not (value is None and name in optional) and not values.holds(value):
            yield name


def lists_to_tuples(settings: Any, *names: str) -> None:
    """Turn lists in fields of a frozen dataclass into tuples; JSON and TOML have only lists."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, list):
            object.__setattr__(settings, name, tuple(value))


def did_you_mean(word: str, known: Iterable[str], *, or_list: bool = False) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", or nothing.

    Args:
        word: the unknown name.
        known: the known names.
        or_list: whether to list all known names where none is near.
    """
    names = list(known)
    near = get_close_matches(word, names, n=1, cutoff=_ALIKE)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; choose from {', '.join(sorted(names))}" if or_list else ""
