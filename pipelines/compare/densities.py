"""Methods at wanted shares of the token pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..run.request import Request
from .case import Case


def at_densities(
    cases: Sequence[Case],
    count: int,
    densities: Sequence[float],
    base: Request,
    say: Callable[[str], None],
) -> list[Case]:
    raise NotImplementedError
