"""The methods by their names: those of diffattn, those a program registers, those of plug-ins.

A plug-in is an installed distribution with an entry point of the group `diffattn.methods`. Entry
points are loaded when their name is looked up, or when all methods are listed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from diffattn._checks import did_you_mean
from diffattn.methods.base import Method

GROUP = "diffattn.methods"

METHODS: dict[str, type[Method]] = {}
"""The methods that are registered by now. A plug-in's is among them once its name was looked up."""

AnyMethod = TypeVar("AnyMethod", bound=type[Method])

# The name is also that of a submodule, where a method has weights of its own.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def register_method(cls: AnyMethod) -> AnyMethod:
    """Make a method of one's own known by its `type`, as those of diffattn are known by theirs.

    `from_dict`, configuration files, LoRA settings and the command line of the same process take
    the name from then on. `METHODS` lists the class. May be used as a decorator above
    `@dataclass(frozen=True, kw_only=True)`. To register a class again does nothing; a class that
    was defined anew in the same place (a notebook's cell that is run again) replaces the old one.

    Args:
        cls: a dataclass derived from `Method` or `StaticMaskMethod`, with `type` for its name and a
            default for each parameter.

    Returns:
        The class.

    Raises:
        TypeError: if it is no such class.
        ValueError: if its name is missing, not allowed, or taken by another class.
    """
    _check_class(cls)
    _check_name(cls)
    there = METHODS.get(cls.type)
    if there is not None and _place(there) != _place(cls):
        inherited = "" if "type" in vars(cls) else ", whose `type` it inherits"
        raise ValueError(
            f"{_place(cls)} cannot be registered as {cls.type!r}: the name is taken by"
            f" {_place(there)}{inherited}; give {cls.__name__} a `type` of its own"
        )
    METHODS[cls.type] = cls
    return cls


def method_class(name: str) -> type[Method]:
    """The class of the method that is called `name`; a plug-in with this name is loaded.

    Raises:
        ValueError: if no method is called so, or its plug-in cannot be loaded.
    """
    if name in METHODS:
        return METHODS[name]
    found = _plugins()
    if name not in found:
        hint = did_you_mean(str(name), [*METHODS, *found], or_list=True)
        raise ValueError(f"unknown method {name!r}{hint}")
    _load(found[name])
    return METHODS[name]


def all_methods() -> Mapping[str, type[Method]]:
    """Every method by its name, plug-ins included.

    Warns:
        UserWarning: of each plug-in that cannot be loaded. It is left out.
    """
    for name, plugins in _plugins().items():
        try:
            _load(plugins)
        except ValueError as error:
            warnings.warn(f"left out method {name!r}: {error}", stacklevel=2)
    return dict(METHODS)


def from_dict(entry: Mapping[str, Any]) -> Method:
    """Read a method from what `Method.to_dict` wrote: its `type` and any of its parameters.

    Raises:
        ValueError: if the type or a parameter is unknown, or a value is not allowed.
    """
    parameters = dict(entry)
    name = parameters.pop("type", None)
    cls = method_class(name)
    known = [f.name for f in _parameters(cls)]
    for parameter in parameters:
        if parameter not in known:
            hint = did_you_mean(parameter, known, or_list=True)
            raise ValueError(f"{name} has no parameter {parameter!r}{hint}")
    return cls(**parameters)


def _plugins() -> dict[str, list[EntryPoint]]:
    """The entry points of the installed distributions, by the names they give their methods."""
    found: dict[str, list[EntryPoint]] = {}
    for entry_point in entry_points(group=GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def _load(plugins: list[EntryPoint]) -> None:
    """Register the method of the entry points of one name, of which there must be one.

    Raises:
        ValueError: with the distributions' names, if it cannot be loaded.
    """
    plugin, *others = plugins
    if others:
        raise ValueError(
            f"{len(plugins)} packages have an entry point of this name,"
            f" {', '.join(map(_distribution, plugins))}: uninstall all but one"
        )
    try:
        cls = plugin.load()
        name = getattr(cls, "type", plugin.name)
        if name != plugin.name:
            raise ValueError(
                f"its `type` is {name!r}, but must be the entry point's name, {plugin.name!r}"
            )
        register_method(cls)
    # Anything may go wrong in code of somebody else's, but Ctrl-C and exits are no failures.
    except Exception as error:
        raise ValueError(
            f"the entry point {plugin.name} = {plugin.value} of {_distribution(plugin)} cannot be"
            f" loaded ({type(error).__name__}: {error}); repair, update or uninstall that package"
        ) from error


def _distribution(plugin: EntryPoint) -> str:
    found = plugin.dist
    return "an unknown package" if found is None else f"{found.name} {found.version}"


def _check_class(cls: Any) -> None:
    if isinstance(cls, Method):
        raise TypeError(
            f"register_method was given an instance of {type(cls).__name__}; give it the class"
        )
    if not isinstance(cls, type) or not issubclass(cls, Method):
        raise TypeError(
            f"{cls!r} is no method: derive the class from diffattn.Method, or from"
            f" diffattn.methods.StaticMaskMethod"
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{_place(cls)} is not complete: it lacks {', '.join(missing)}")
    # A class that derives from a dataclass has its fields, but none of those that it writes itself.
    if "__dataclass_fields__" not in vars(cls):
        raise TypeError(
            f"{_place(cls)} is no dataclass: put @dataclass(frozen=True, kw_only=True) above it"
        )
    for parameter in _parameters(cls):
        if parameter.name in ("type", "paper"):
            raise TypeError(
                f"{_place(cls)} has {parameter.name!r} for a parameter: annotate it as"
                f" ClassVar[str]"
            )
        if parameter.default is MISSING and parameter.default_factory is MISSING:
            raise TypeError(
                f"parameter {parameter.name!r} of {_place(cls)} has no default: give it one, None"
                f" where the model decides (`for_model`)"
            )


def _check_name(cls: type[Method]) -> None:
    name = getattr(cls, "type", None)
    if name is None:
        raise ValueError(f'{_place(cls)} has no name: write `type: ClassVar[str] = "..."` in it')
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"the `type` of {_place(cls)} is {name!r}, but must be a name of letters, digits, - and"
            f" _, such as 'my-method'"
        )


def _parameters(cls: type[Method]) -> Iterator[Any]:
    return (f for f in fields(cls) if f.init)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
