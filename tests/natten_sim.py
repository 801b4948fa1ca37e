"""How many tiles of keys the worst tile of queries visits under GNA, for tiles of any shape.

NATTEN's own model of its kernels, NATTENSim: the golden counts check GNA's windows and classes, and
the predictions of the paper's tables follow from them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffattn.grid import TokenGrid
from diffattn.masks.neighbourhood import AxisWindow
from diffattn.methods.gna import GNAAttn, Tile, is_block_sparse


@dataclass(frozen=True)
class TileCounts:
    """Tiles of keys that attention visits.

    Attributes:
        total: tiles that the keys make.
        worst: the most that a tile of queries visits where tiles of keys lie on a fixed grid.
        worst_dynamic: the same where each tile of queries cuts the box of keys that it sees into
            tiles of its own, as NATTEN's kernels for Ampere do.
        token_pairs: share of all pairs of tokens that attend.
        is_block_sparse: whether every tile that is visited is full.
    """

    total: int
    worst: int
    worst_dynamic: int
    token_pairs: float
    is_block_sparse: bool

    @property
    def speedup(self) -> float:
        """Upper bound of the speed-up of attention over dense attention."""
        return self.total / self.worst

    @property
    def flop_speedup(self) -> float:
        """What it would be if no work were done on pairs that do not attend."""
        return 1 / self.token_pairs


def count_tiles(
    method: GNAAttn, grid: TokenGrid, q_tile: Tile, kv_tile: Tile | None = None
) -> TileCounts:
    """Count the tiles that attention under `method` visits on the video tokens of `grid`.

    Args:
        q_tile: frames, rows and columns of a tile of queries; tiles at the ends may be short.
        kv_tile: the same for keys; `q_tile` when None. Each class of a dilated axis is cut into
            tiles by itself, and its longest is counted.

    Raises:
        ValueError: if the method does not fit the grid, or a tile has sides below 1.
    """
    kv_tile = kv_tile or q_tile
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if len(tile) != 3 or any(side < 1 for side in tile):
            raise ValueError(
                f"{name} is {tile}, but must be frames, rows and columns, each at least 1"
            )
    axes = method.axes(grid)
    worst = worst_dynamic = total = pairs = 1
    for axis, q_side, kv_side in zip(axes, q_tile, kv_tile, strict=True):
        fixed, dynamic = _worst(axis.classes()[-1], q_side, kv_side)
        worst, worst_dynamic = worst * fixed, worst_dynamic * dynamic
        total *= -(-axis.size // kv_side)
        whole = axis.tiles(axis.size)
        pairs *= int(axis.pairs(whole, whole))
    return TileCounts(
        total,
        worst,
        worst_dynamic,
        pairs / math.prod(axis.size for axis in axes) ** 2,
        is_block_sparse(method, grid, q_tile, kv_tile, within_classes=True),
    )


def _worst(axis: AxisWindow, q_side: int, kv_side: int) -> tuple[int, int]:
    """Tiles of keys that the worst tile of queries along an undilated axis visits."""
    query = axis.tiles(q_side)
    # Windows never move back from one query to the next.
    first = axis.bounds(query[:, 0])[0]
    end = axis.bounds(query[:, 1] - 1)[1]
    fixed = -(-end // kv_side) - first // kv_side
    return int(torch.max(fixed)), int(torch.max(-(-(end - first) // kv_side)))
