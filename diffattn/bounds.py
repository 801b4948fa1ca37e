"""Bounds: which frames, rows and columns the video tokens of each block of a sequence lie in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.fragments import cut
from diffattn.grid import TokenGrid
from diffattn.orders import TileOrder

_ITS_OWN = {"include_self": False}


@dataclass(frozen=True)
class Bounds:
    """Boxes that enclose all video tokens of a sequence: those of a block, or a part of them.

    Attributes:
        block: int64 `(boxes,)`, the block of the sequence that the tokens lie in.
        low, high: int32 `(boxes, 3)`, their first and their last frame, row and column.
    """

    block: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor


def bounds_of(
    grid: TokenGrid, block_size: int, device: torch.device, order: TileOrder | None = None
) -> Bounds:
    """Enclose the blocks of a sequence in boxes, one or a few for each.

    Args:
        grid: the tokens of the sequence; text tokens are in no box.
        block_size: tokens per block.
        order: the order that they are cut into blocks in; None is the grid's own.
    """
    if order is None:
        # A block is a run of rows: what it has of each frame gets a box.
        part = cut(grid, block_size, device)
        top, bottom = part.first // grid.width, part.last // grid.width
        left = torch.where(top == bottom, part.first % grid.width, 0)
        right = torch.where(top == bottom, part.last % grid.width, grid.width - 1)
        low = torch.stack([part.frame, top, left], 1)
        high = torch.stack([part.frame, bottom, right], 1)
        return Bounds(part.block, low.to(torch.int32), high.to(torch.int32))
    index, places = _video_tokens(grid, device, order)
    block, which = (index // block_size).unique(return_inverse=True)
    which = which[:, None].expand(-1, 3)
    low, high = (
        places.new_zeros(len(block), 3).scatter_reduce(0, which, places, how, **_ITS_OWN)
        for how in ("amin", "amax")
    )
    return Bounds(block, low, high)


def nearest(query: Bounds, key: Bounds, axis: int) -> torch.Tensor:
    """int32 `(query boxes, key boxes)`: how far apart their closest tokens are along an axis."""
    before = query.low[:, None, axis] - key.high[None, :, axis]
    after = key.low[None, :, axis] - query.high[:, None, axis]
    return torch.maximum(before, after).clamp_(min=0)


def furthest(query: Bounds, key: Bounds, axis: int) -> torch.Tensor:
    """int32 `(query boxes, key boxes)`: how far apart tokens of theirs can be along an axis."""
    before = query.high[:, None, axis] - key.low[None, :, axis]
    after = key.high[None, :, axis] - query.low[:, None, axis]
    return torch.maximum(before, after)


def shapes_of(
    grid: TokenGrid, block_size: int, device: torch.device, order: TileOrder | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which blocks hold the same tokens but for a shift in time and space.

    Args:
        grid, block_size, order: as for `bounds_of`.

    Returns:
        int64 `(blocks, 3)`, the first frame, row and column of each block's video tokens; the same
        of their last; and int64 `(blocks,)`, its shape: the tokens of blocks of one shape are, one
        by one, as far from the first, and text has the same places in them.
    """
    blocks = -(-grid.tokens // block_size)
    index, places = _video_tokens(grid, device, order)
    block = index // block_size
    which = block[:, None].expand(-1, 3)
    low, high = (
        places.new_zeros(blocks, 3).scatter_reduce(0, which, places, how, **_ITS_OWN)
        for how in ("amin", "amax")
    )
    frame, row, column = (places - low[block]).long().unbind(1)
    inside = torch.full((blocks * block_size,), -1, device=device)
    inside[index] = (frame * grid.height + row) * grid.width + column
    _, shape = inside.view(blocks, block_size).unique(dim=0, return_inverse=True)
    return low.long(), high.long(), shape


def _video_tokens(
    grid: TokenGrid, device: torch.device, order: TileOrder | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each video token: int64 its place in the order, int32 (frame, row, column)."""
    position = torch.arange(grid.tokens, device=device)
    if order is not None:
        position = order.positions(device)
    index = (~grid.is_text(position)).nonzero().flatten()
    return index, torch.stack(grid.coordinates(position[index]), 1).to(torch.int32)
