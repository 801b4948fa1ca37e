"""Boxes: the pieces of frames x rows x columns that the blocks of a token sequence consist of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.grid import TokenGrid
from diffattn.orders import TileOrder


@dataclass(frozen=True)
class Boxes:
    """The video tokens of a grid, block by block, as boxes of frames, rows and columns.

    A block of a tile order is one box where it is one tile; in raster order a block is the end of a
    row, some rows, and the start of a row.

    Attributes:
        block: int64 `(boxes,)`, ascending: block of the sequence that the box lies in.
        first, end: int64 `(boxes, 3)`: its first frame, row and column, and those past its last.
    """

    block: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor


def boxes_of(
    grid: TokenGrid, block_size: int, device: torch.device, order: TileOrder | None = None
) -> Boxes:
    """Take the blocks of `block_size` tokens of a sequence apart into boxes.

    Args:
        grid: the tokens; text tokens are in no box.
        block_size: tokens per block.
        order: what the tokens are in when they are cut into blocks; None is the grid's own order.
    """
    position = torch.arange(grid.tokens, device=device)
    if order is not None:
        position = order.positions(device)
    index = (~grid.is_text(position)).nonzero().flatten()
    block = index // block_size
    frame, row, column = grid.coordinates(position[index])
    place = torch.stack([block, frame, row, column], 1)
    # Tokens side by side join to runs of a row, runs to rectangles of rows, and those to boxes.
    low, high = place, place + 1
    for axis in (3, 2, 1):
        low, high = _joined(low, high, axis)
    return Boxes(low[:, 0], low[:, 1:], high[:, 1:])


def _joined(low: torch.Tensor, high: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join neighbours of a list of (block, frame, row, column) ranges that are one along `axis`."""
    others = [i for i in range(4) if i != axis]
    same = (low[1:, others] == low[:-1, others]) & (high[1:, others] == high[:-1, others])
    joins = same.all(1) & (low[1:, axis] == high[:-1, axis])
    starts = torch.nn.functional.pad(~joins, (1, 0), value=True)
    ends = torch.nn.functional.pad(~joins, (0, 1), value=True)
    return low[starts], high[ends]
