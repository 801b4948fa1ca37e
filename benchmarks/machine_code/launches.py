"""Launches of kernels, and the work of the kernels' loops with matrix products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

HEADS = 2


@dataclass(frozen=True)
class Tile:
    """The work of one iteration of a loop.

    Attributes:
        loop: the loop's name.
        shape: of the tile, for the table.
        macs: multiplications that its matrix products need.
        trips: number of iterations, where that is a constant: the compiler may unroll the loop.
    """

    loop: str
    shape: str
    macs: int
    trips: int = 1


@dataclass(frozen=True)
class Work:
    """The loops with matrix products of a kernel.

    Attributes:
        kernel: "forward", "queries", "keys", or a kernel of linear attention.
        tiles: in the order of the loops in the code.
        groups: number of groups of four warps that each work on their part of a tile, with loops of
            their own, while further warps copy; 1 where all warps of a program share the loops.
    """

    kernel: str
    tiles: tuple[Tile, ...]
    groups: int = 1


Constants = Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """One call that starts kernels.

    Attributes:
        family: "block_sparse", "clusters", "gather", "linear", "selection", "summary" or
            "tangent".
        variant: of the kernel; "plain" if there is only one.
        case: the arguments, for the table.
        run: the call.
        work: the work of a kernel, from its function's name and its compile-time arguments; None
            for a kernel without matrix products.
    """

    family: str
    variant: str
    case: str
    run: Callable[[], object]
    work: Callable[[str, Constants], Work | None]
