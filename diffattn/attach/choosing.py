"""What a user may give to `set_attn_processor`, and the method that each site gets by it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from diffattn._checks import did_you_mean
from diffattn.methods.base import Method
from diffattn.methods.registry import as_method

_EXAMPLE = "{'blocks.*': RadialAttn()}"


def methods_by_pattern(processor: Any) -> dict[str, Method | None] | None:
    """The methods in what a user gives to `set_attn_processor`, by patterns of module names.

    Args:
        processor: a method or the name of one, or a dict of patterns to methods, names and None.

    Returns:
        The methods; None where a site is to stay as it is. The result itself is None if `processor`
        holds no method of diffattn: it is None, or of diffusers.

    Raises:
        TypeError: for a class in place of an instance, a dict that mixes methods with other values,
            and values of any other type.
        ValueError: for an unknown name of a method, and a dict that names no method.
    """
    if isinstance(processor, Method | str):
        return {"*": as_method("processor", processor)}
    if isinstance(processor, type):
        as_method("processor", processor)
    if not isinstance(processor, Mapping):
        if processor is None or callable(processor):
            return None
        raise TypeError(
            f"processor is a {type(processor).__name__}, but must be a method of diffattn, a dict"
            f" of them, None, or attention processors of diffusers"
        )
    if not processor:
        raise ValueError(
            f"processor is an empty dict: give a pattern of module names and a method, such as"
            f" {_EXAMPLE}, or None to restore the processors from before"
        )
    for pattern, value in processor.items():
        if isinstance(value, type):
            as_method(f"the value for {pattern!r}", value)
    if all(value is None for value in processor.values()):
        raise ValueError(
            "every value of the dict is None, which leaves the sites of a pattern as they are:"
            " give a method for some, or None instead of the dict to restore all processors"
        )
    if not any(isinstance(value, Method | str) for value in processor.values()):
        return None
    return {
        _pattern(pattern): _method_or_none(pattern, value) for pattern, value in processor.items()
    }


def choose(names: Collection[str], methods: Mapping[str, Method | None]) -> dict[str, Method]:
    """The method of each site: that of the first pattern that matches the site's name.

    Sites that no pattern matches are left out, and so are sites whose pattern has None.
    """
    winners = {name: _winner(name, methods) for name in names}
    chosen = {name: methods[won] for name, won in winners.items() if won is not None}
    return {name: method for name, method in chosen.items() if method is not None}


def check_patterns(names: Collection[str], patterns: Collection[str]) -> None:
    """Check that every pattern decides about a site.

    Args:
        names: the sites of all denoisers.
        patterns: in the order in which they are tried.

    Raises:
        ValueError: for a pattern that matches no site, with the nearest spelling that matches, and
            for a pattern whose sites all belong to earlier patterns.
    """
    winners = {name: _winner(name, patterns) for name in names}
    for pattern in patterns:
        if pattern in winners.values():
            continue
        taken = dict.fromkeys(won for name, won in winners.items() if _matches(name, pattern))
        if not taken:
            hint = did_you_mean(pattern, dict.fromkeys(_spellings(names)))
            there = ", ".join(dict.fromkeys(map(_starred, names)))
            raise ValueError(
                f"no attention site matches the pattern {pattern!r}"
                + (hint or f"; the sites are {there}")
            )
        earlier = ", ".join(map(repr, taken))
        raise ValueError(
            f"the pattern {pattern!r} decides about no site: the first pattern that matches a site"
            f" wins, and {earlier} comes before it; put {pattern!r} first"
        )


def _method_or_none(pattern: Any, value: Any) -> Method | None:
    if value is None:
        return None
    if not isinstance(value, Method | str):
        raise TypeError(
            f"the value for {pattern!r} is a {type(value).__name__}, but the others are methods of"
            f" diffattn: use one kind"
        )
    return as_method(f"the value for {pattern!r}", value)


def _pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise TypeError(
            f"the key {pattern!r} of the dict is a {type(pattern).__name__}, but must be a pattern"
            f" of module names, such as 'blocks.*'"
        )
    return pattern


def _winner(name: str, patterns: Collection[str]) -> str | None:
    return next((pattern for pattern in patterns if _matches(name, pattern)), None)


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches the name of a module, or of a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")


def _spellings(names: Collection[str]) -> Iterator[str]:
    """What a user may have meant: every site and every module around it, with and without stars."""
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            around = ".".join(parts[:end])
            yield around
            yield _starred(around)


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+", "*", name)
