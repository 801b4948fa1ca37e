"""The methods by their names: methods of diffattn, of the running program, and of plug-ins.

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

# The registered methods. The method of a plug-in joins them when its name is first looked up.
METHODS: dict[str, type[Method]] = {}

AnyMethod = TypeVar("AnyMethod", bound=type[Method])

# A method with weights uses its name for a submodule, too.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def register_method(cls: AnyMethod) -> AnyMethod:
    """Make a method known by its `type`.

    From then on `from_dict`, configuration files, LoRA settings and the command line of the same
    process accept the name, and `METHODS` lists the class. The function also works as a decorator
    above `@dataclass(frozen=True, kw_only=True)`. Registering a class again does nothing. A class
    that is defined anew in the same place, as by a notebook's cell that runs again, replaces the
    old class.

    Args:
        cls: a dataclass derived from `Method` or `StaticMaskMethod`, with a name in `type` and a
            default for each parameter.

    Returns:
        The class.

    Raises:
        TypeError: if `cls` is no such class.
        ValueError: if the name is missing, not allowed, or taken by another class.
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
    """The class of the method called `name`, loaded from a plug-in if need be.

    Raises:
        ValueError: if no method has this name, or its plug-in cannot be loaded.
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
        UserWarning: for each plug-in that cannot be loaded; the result leaves it out.
    """
    for name, plugins in _plugins().items():
        try:
            _load(plugins)
        except ValueError as error:
            warnings.warn(f"left out method {name!r}: {error}", stacklevel=2)
    return dict(METHODS)


def from_dict(entry: Mapping[str, Any]) -> Method:
    """A method from the mapping that `Method.to_dict` gives.

    Args:
        entry: the method's `type`, and any of its parameters; the others keep their defaults.

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


def as_method(what: str, value: Any) -> Method:
    """A method that a caller gives as an instance or by its name.

    Args:
        what: the name of the argument, for messages.
        value: the method, or its name.

    Raises:
        TypeError: if `value` is neither; a class is named with the parentheses that it lacks.
        ValueError: if no method has this name.
    """
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        return from_dict({"type": value})
    if isinstance(value, type):
        raise TypeError(
            f"{what} is the class {value.__name__}, but must be an instance: pass"
            f" {value.__name__}()"
        )
    raise TypeError(
        f"{what} is a {type(value).__name__}, but must be a method of diffattn, such as"
        f" RadialAttn(), or the name of one"
    )


def _plugins() -> dict[str, list[EntryPoint]]:
    """The entry points of the installed distributions, by the names of the methods."""
    found: dict[str, list[EntryPoint]] = {}
    for entry_point in entry_points(group=GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def _load(plugins: list[EntryPoint]) -> None:
    """Load and register the method of the entry points that share one name.

    Raises:
        ValueError: if there are several entry points, or the method cannot be loaded; names the
            distributions.
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
    # Code of other authors may raise anything. Ctrl-C and exits are no failures and pass.
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
    # Without the decorator a subclass of a dataclass has the inherited fields, but not its own.
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
    return (f for f in fields(cls) if f.init and f.name != "by_step")


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
