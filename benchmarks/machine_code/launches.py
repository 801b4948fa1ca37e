"""What a launch is, and what its kernels' loops with matrix products work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

HEADS = 2


@dataclass(frozen=True)
class Tile:
    """What a loop works on per iteration.

    Attributes:
        loop: the loop's name.
        shape: for the table.
        macs: multiplications that its matrix products need.
        trips: iterations, where their number is a constant: the compiler may write them all out.
    """

    loop: str
    shape: str
    macs: int
    trips: int = 1


@dataclass(frozen=True)
class Work:
    """The loops with matrix products of a kernel.

    Attributes:
        kernel: "forward", "queries", "keys", or what linear attention has.
        tiles: in the order of the loops in the code.
        groups: of four warps that each work on their part of a tile, with loops of their own, while
            further warps copy; 1 where all warps of a program share the loops.
    """

    kernel: str
    tiles: tuple[Tile, ...]
    groups: int = 1


Constants = Mapping[str, Any]


@dataclass(frozen=True)
class Launch:
    """One call that starts kernels.

    Attributes:
        family: "block_sparse", "gather", "linear" or "tangent".
        variant: of the kernel; "plain" if there is one only.
        case: the arguments, for the table.
        run: the call.
        work: that of a kernel, from its function's name and its compile-time arguments; None for
            one without matrix products.
    """

    family: str
    variant: str
    case: str
    run: Callable[[], object]
    work: Callable[[str, Constants], Work | None]
