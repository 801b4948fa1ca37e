"""The attention methods, by the name that configuration files and the command line use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from diffattn._checks import did_you_mean
from diffattn.methods.agent import AgentAttn
from diffattn.methods.base import Method, Site, StaticMaskMethod
from diffattn.methods.clear import CLEARAttn
from diffattn.methods.dense import DenseAttn
from diffattn.methods.freeswim import FreeSwimAttn
from diffattn.methods.gna import GNAAttn
from diffattn.methods.linfusion import LinFusionAttn
from diffattn.methods.radial import RadialAttn
from diffattn.methods.vmoba import VMoBAAttn

METHODS: dict[str, type[Method]] = {
    m.type: m
    for m in (
        DenseAttn,
        RadialAttn,
        CLEARAttn,
        GNAAttn,
        FreeSwimAttn,
        VMoBAAttn,
        AgentAttn,
        LinFusionAttn,
    )
}


def from_dict(entry: Mapping[str, Any]) -> Method:
    """Read a method from what `Method.to_dict` wrote: its `type` and any of its parameters.

    Raises:
        ValueError: if the type or a parameter is unknown, or a value is not allowed.
    """
    parameters = dict(entry)
    name = parameters.pop("type", None)
    if name not in METHODS:
        hint = did_you_mean(str(name), METHODS, or_list=True)
        raise ValueError(f"unknown method {name!r}{hint}")
    known = [f.name for f in fields(METHODS[name]) if f.init]
    for parameter in parameters:
        if parameter not in known:
            hint = did_you_mean(parameter, known, or_list=True)
            raise ValueError(f"{name} has no parameter {parameter!r}{hint}")
    return METHODS[name](**parameters)


__all__ = [
    "METHODS",
    "AgentAttn",
    "CLEARAttn",
    "DenseAttn",
    "FreeSwimAttn",
    "GNAAttn",
    "LinFusionAttn",
    "Method",
    "RadialAttn",
    "Site",
    "StaticMaskMethod",
    "VMoBAAttn",
    "from_dict",
]
