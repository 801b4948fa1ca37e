"""Methods at a wanted share of the token pairs: the parameter that sets the share of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from diffattn import TokenGrid
    from diffattn.methods import Method

# Wide enough for every parameter to be at its least.
LEAST = 1e-4


def turned(method: Method, share: float, grid: TokenGrid) -> Method:
    """The method with about a share of the pairs; its work is what counts, and grows with `share`.

    Args:
        method: with the recommended values for the grid.
        share: above 0 and at most 1.
        grid: the tokens of a call.
    """
    return replace(method, **KNOBS[method.type](method, min(1.0, max(LEAST, share)), grid))


def check_knob(method: Method) -> None:
    """Raise UserError for a method that cannot be set to a share of the pairs."""
    if method.type not in KNOBS:
        raise UserError(
            f"--attn {method.type}: calibrate sets methods to a share of the token pairs, and can"
            f" do so with {', '.join(KNOBS)}"
        )
    if method.differs_by_step:
        raise UserError(
            f"--attn {method.type}: a parameter differs from step to step, but calibrate sets the"
            f" steps itself: give one value"
        )


def _block_topk(method: Any, share: float, grid: TokenGrid) -> dict[str, Any]:
    # A share of 1 is another method, dense attention, which policies name themselves.
    blocks = -(-grid.tokens // method.block)
    return {"keep": min(1 - 0.5 / blocks, max(1, round(share * blocks)) / blocks)}


def _gna(method: Any, share: float, grid: TokenGrid) -> dict[str, Any]:
    # Axes that are rounded differently grow one after another, which makes finer steps.
    side = share ** (1 / 3)
    axes = ((grid.frames, 0.75), (grid.height, 0.5), (grid.width, 0.25))
    window = tuple(1 + int(side * (size - 1) + 1 - up_from) for size, up_from in axes)
    return {"window": window, "stride": 1}


def _vmoba(method: Any, share: float, grid: TokenGrid) -> dict[str, Any]:
    blocks = [1, 1, 1]
    for layer in range(len(method.partitions)):
        kind = method.partitions[method.layer_kind(layer)]
        number = len(method.partition(grid, layer).lengths())
        blocks[("1d", "2d", "3d").index(kind)] = max(1, round(share * number))
    return {"topk": tuple(blocks)}


KNOBS: Mapping[str, Callable[[Any, float, Any], dict[str, Any]]] = {
    "block-topk": _block_topk,
    "vmoba": _vmoba,
    "gna": _gna,
}
