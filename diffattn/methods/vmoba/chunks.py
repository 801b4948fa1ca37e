"""Chunks: the sides of VMoBA's blocks, from the paper or fitted to a grid."""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

from diffattn.grid import TokenGrid

Sides: TypeAlias = tuple[int, ...]

# The paper's chunks by (frames, rows, columns) of the grid, as far as the paper gives their sides.
_PUBLISHED: dict[tuple[int, int, int], dict[str, int | Sides]] = {
    (21, 30, 52): {"1d": 3, "2d": (5, 13), "3d": (7, 5, 13)},
    (21, 45, 80): {"1d": 3, "2d": (9, 10), "3d": (7, 15, 20)},
    (24, 36, 64): {"1d": 3, "2d": (6, 8), "3d": (8, 12, 8)},
    (36, 30, 52): {"1d": 3, "2d": (5, 13), "3d": (12, 10, 13)},
}
# The numbers of blocks that the paper recommends, and the fewest tokens of a block on small grids.
_BLOCKS = {"1d": 8, "2d": 48, "3d": 72}
_SMALLEST_BLOCK = 16
# The largest number of parts of an axis.
_MOST_PARTS = 12


def recommended_chunk(kind: str, grid: TokenGrid) -> int | float | Sides:
    """The recommended chunk of a partition on a grid.

    Args:
        kind: "1d", "2d" or "3d".
        grid: the video tokens.

    Returns:
        Latent frames for "1d", a fraction if there are fewer frames than recommended blocks; rows
        and columns for "2d"; latent frames, rows and columns for "3d".
    """
    sizes = (grid.frames, grid.height, grid.width)
    if sizes in _PUBLISHED:
        return _PUBLISHED[sizes][kind]
    blocks = max(1, min(_BLOCKS[kind], grid.video_tokens // _SMALLEST_BLOCK))
    if kind == "1d":
        return round(grid.frames / blocks) if grid.frames >= blocks else grid.frames / blocks
    cut = sizes if kind == "3d" else sizes[1:]
    return min(itertools.product(*map(_sides, cut)), key=lambda chunk: _unfit(chunk, cut, blocks))


def _sides(size: int) -> list[int]:
    """The candidate sides of blocks along an axis, one for each number of parts."""
    return sorted({-(-size // parts) for parts in range(1, min(size, _MOST_PARTS) + 1)})


def _unfit(chunk: Sides, sizes: Sides, blocks: int) -> float:
    """A penalty for another number of blocks than `blocks`, uneven blocks, and uneven axes.

    Axes are uneven if they are cut into different numbers of parts.
    """
    parts = [-(-size // side) for size, side in zip(sizes, chunk, strict=True)]
    padded = math.prod(n * side for n, side in zip(parts, chunk, strict=True))
    uneven = padded / math.prod(sizes) - 1
    shape = [math.log(n) for n in parts]
    mean = sum(shape) / len(shape)
    stretched = sum((n - mean) ** 2 for n in shape)
    return abs(math.log(math.prod(parts) / blocks)) + uneven + 0.2 * stretched
