"""Boxes: which frames, rows and columns the blocks of a token sequence lie in."""

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


@dataclass(frozen=True)
class Outlines:
    """How the video tokens of each block of a sequence lie, and where.

    Attributes:
        shape: int64 `(blocks,)`: blocks of equal number hold the same tokens but for a shift in
            time and space, and text in the same places.
        first, end: int64 `(blocks, 3)`: the first frame, row and column of any of them, and those
            past the last; of a block of text alone, those of some token.
    """

    shape: torch.Tensor
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
    position = _positions(grid, device, order)
    index = (~grid.is_text(position)).nonzero().flatten()
    block = index // block_size
    frame, row, column = grid.coordinates(position[index])
    place = torch.stack([block, frame, row, column], 1)
    # Tokens side by side join to runs of a row, runs to rectangles of rows, and those to boxes.
    low, high = place, place + 1
    for axis in (3, 2, 1):
        low, high = _joined(low, high, axis)
    return Boxes(low[:, 0], low[:, 1:], high[:, 1:])


def outlines_of(
    grid: TokenGrid, block_size: int, device: torch.device, order: TileOrder | None = None
) -> Outlines:
    """Tell the blocks of a sequence apart by their outlines; arguments as for `boxes_of`."""
    position = _positions(grid, device, order)
    place = torch.stack(grid.coordinates(position), 1)
    is_text = grid.is_text(position)
    padding = (0, -grid.tokens % block_size)
    is_text = torch.nn.functional.pad(is_text, padding, value=True).view(-1, block_size, 1)
    place = torch.nn.functional.pad(place, (0, 0, *padding)).view(-1, block_size, 3)
    sizes = place.new_tensor([grid.frames, grid.height, grid.width])
    first = place.where(~is_text, sizes).amin(1)
    last = place.where(~is_text, -1).amax(1)
    inside = (place - first[:, None]).where(~is_text, -1)
    numbered = (inside[..., 0] * sizes[1] + inside[..., 1]) * sizes[2] + inside[..., 2]
    _, shape = numbered.unique(dim=0, return_inverse=True)
    nowhere = is_text.all(1)
    return Outlines(shape, first.where(~nowhere, 0), (last + 1).where(~nowhere, 1))


def _positions(grid: TokenGrid, device: torch.device, order: TileOrder | None) -> torch.Tensor:
    return torch.arange(grid.tokens, device=device) if order is None else order.positions(device)


def _joined(low: torch.Tensor, high: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join neighbours of a list of (block, frame, row, column) ranges that are one along `axis`."""
    others = [i for i in range(4) if i != axis]
    same = (low[1:, others] == low[:-1, others]) & (high[1:, others] == high[:-1, others])
    joins = same.all(1) & (low[1:, axis] == high[:-1, axis])
    starts = torch.nn.functional.pad(~joins, (1, 0), value=True)
    ends = torch.nn.functional.pad(~joins, (0, 1), value=True)
    return low[starts], high[ends]
