"""Curves that visit the tokens of a grid so that neighbours on the curve are near in the grid.

Consecutive tokens of a Morton or Hilbert curve fill compact regions. So blocks of any length are
compact in time and space, at any size of the grid: cells outside the grid are left out.
"""

from __future__ import annotations

from typing import Literal

import torch

from diffattn.grid import TokenGrid

Curve = Literal["morton", "morton-frame", "hilbert"]
CURVES: tuple[Curve, ...] = ("morton", "morton-frame", "hilbert")


def along_curve(grid: TokenGrid, curve: Curve) -> torch.Tensor:
    """The video tokens of a grid in the order of a curve.

    Args:
        grid: the tokens; those beside the video do not count.
        curve: "morton" interleaves the bits of frame, row and column, with the column lowest.
            "morton-frame" visits frame after frame, by the bits of row and column. "hilbert" is
            Hilbert's curve on the smallest cube of a power of two around the grid.

    Returns:
        int64 (video tokens,): the place in the grid's own order of each token of the curve.

    Raises:
        ValueError: if there is no such curve.
    """
    if curve not in CURVES:
        raise ValueError(f"curve is {curve!r}, but must be one of {', '.join(CURVES)}")
    place = torch.arange(grid.video_tokens)
    frame, row, column = grid.coordinates(place + grid.video.start)
    bits = max(1, (max(grid.frames, grid.height, grid.width) - 1).bit_length())
    if curve == "morton":
        code = _interleaved((frame, row, column), bits)
    elif curve == "morton-frame":
        code = (frame << 2 * bits) | _interleaved((row, column), bits)
    else:
        code = _interleaved(_transposed((frame, row, column), bits), bits)
    return code.argsort()


def _interleaved(axes: tuple[torch.Tensor, ...], bits: int) -> torch.Tensor:
    """One number of the bits of all axes, the highest bits first, the first axis highest."""
    code = torch.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            code = code << 1 | axis >> bit & 1
    return code


def _transposed(axes: tuple[torch.Tensor, ...], bits: int) -> tuple[torch.Tensor, ...]:
    """Coordinates as the transposed index of Hilbert's curve (Skilling, AIP 707, 2004)."""
    x = [axis.clone() for axis in axes]
    for bit in range(bits - 1, 0, -1):
        low = (1 << bit) - 1
        for i in range(len(x)):
            is_set = (x[i] >> bit & 1).bool()
            swapped = (x[0] ^ x[i]) & low
            first = torch.where(is_set, x[0] ^ low, x[0] ^ swapped)
            if i:
                x[i] = torch.where(is_set, x[i], x[i] ^ swapped)
            x[0] = first
    for i in range(1, len(x)):
        x[i] = x[i] ^ x[i - 1]
    flip = torch.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flip = torch.where((x[-1] >> bit & 1).bool(), flip ^ (1 << bit) - 1, flip)
    return tuple(axis ^ flip for axis in x)
