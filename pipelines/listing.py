"""What there is: the tables behind ``diffattn methods`` and ``diffattn models``."""

import dataclasses
import inspect
from collections.abc import Iterator


def method_lines() -> Iterator[str]:
    """Describe every method: its paper, and its parameters with defaults."""
    from diffattn.methods import METHODS

    for name, method in METHODS.items():
        title = (inspect.getdoc(method) or "").partition("\n")[0].rstrip(".")
        paper = "" if method.paper in title else f" ({method.paper})"
        yield f"{name}: {method.__name__}, {title}{paper}"
        parameters = [item for item in dataclasses.fields(method) if item.init]
        # What the method shares with all others comes last.
        parameters.sort(key=lambda item: item.name not in method.__annotations__)
        width = max(len(item.name) for item in parameters)
        for item in parameters:
            default = "by model" if item.default is None else item.default
            yield f"  {item.name:{width}}  [{default}]  {item.metadata.get('help', '')}".rstrip()


def model_lines() -> Iterator[str]:
    """Describe every model family."""
    from diffattn.models import FAMILIES

    width = max(len(family.name) for family in FAMILIES)
    for family in FAMILIES:
        yield f"{family.name:{width}}  {family.title}: {', '.join(family.model_classes)}"
