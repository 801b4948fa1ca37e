"""The rules of a policy: which layers attend by which methods, and until which step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffattn._checks import did_you_mean, is_whole
from diffattn.methods.base import Method
from diffattn.methods.registry import from_dict
from diffattn.schedule import check_steps

# The `type` of policies.
POLICY = "policy"


@dataclass(frozen=True)
class Phase:
    """A method, and the step that it gives way to the next phase's method in.

    Attributes:
        method: the method of the phase's steps.
        until: number of steps of the run that are over by then, as a count or as a fraction of the
            run (rounded down). None in the last phase.
    """

    method: Method
    until: int | float | None = None


@dataclass(frozen=True)
class Rule:
    """The phases of some layers.

    Attributes:
        phases: in the order of the steps.
        layers: indices of blocks, from 0; None for all blocks without an earlier rule.
    """

    phases: tuple[Phase, ...]
    layers: tuple[int, ...] | None = None


def rule_of(value: Any) -> Rule:
    """A rule as a user gives it: a `Rule`, or an object of JSON.

    Raises:
        ValueError: for anything else, and for a method that cannot be in a policy.
    """
    if isinstance(value, Rule):
        phases, layers = value.phases, value.layers
    else:
        given = object_of("a rule", value, ("layers", "method", "phases"))
        if ("method" in given) == ("phases" in given):
            raise ValueError('a rule has either "method" or "phases": give one')
        phases = given.get("phases", [{"method": given.get("method")}])
        layers = given.get("layers")
    if not isinstance(phases, list | tuple) or not phases:
        raise ValueError(f"the phases of a rule are {phases!r}, but must be a list of phases")
    made = tuple(map(_phase, phases))
    _check_ends(made)
    if layers is None:
        return Rule(made)
    if not isinstance(layers, list | tuple) or not layers:
        raise ValueError(f"the layers of a rule are {layers!r}, but must be a list of indices")
    for layer in layers:
        if not is_whole(layer) or layer < 0:
            raise ValueError(
                f"a layer of a rule is {layer!r}, but must be the index of a block, from 0"
            )
    return Rule(made, tuple(layers))


def _phase(value: Any) -> Phase:
    if isinstance(value, Phase):
        given: dict[str, Any] = {"method": value.method, "until": value.until}
    else:
        given = object_of("a phase", value, ("method", "until"))
    method, until = given.get("method"), given.get("until")
    if isinstance(method, Mapping):
        method = from_dict(method)
    elif isinstance(method, str):
        method = from_dict({"type": method})
    if not isinstance(method, Method):
        raise ValueError(f"the method of a phase is {method!r}, but must be a method of diffattn")
    if method.type == POLICY:
        raise ValueError("the method of a phase is a policy, but policies hold no policies")
    if method.changes_the_model:
        raise ValueError(
            f"{method.type} cannot be in a policy: it has weights of its own or changes the model."
            f" Attach it by itself"
        )
    return Phase(method, until)


def _check_ends(phases: tuple[Phase, ...]) -> None:
    *first, last = phases
    if last.until is not None:
        raise ValueError(
            f"the last phase has until={last.until!r}, but holds until the end of the run: leave it"
            f" out, or add a phase"
        )
    before: int | float | None = None
    for phase in first:
        if phase.until is None:
            raise ValueError("every phase but the last needs an end: give it until")
        check_steps("until", phase.until)
        if isinstance(before, type(phase.until)) and phase.until <= before:
            raise ValueError(
                f"a phase has until={phase.until}, but the phase before it until={before}: give"
                f" them in the order of the steps"
            )
        before = phase.until


def object_of(what: str, value: Any, names: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """An object of JSON with no other keys than `names`.

    Raises:
        ValueError: for anything else; `what` names the value.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}, but must be an object with {', '.join(names)}")
    for name in value:
        if name not in names:
            hint = did_you_mean(str(name), names, or_list=True)
            raise ValueError(f"{what} has an unknown key {name!r}{hint}")
    return dict(value)
