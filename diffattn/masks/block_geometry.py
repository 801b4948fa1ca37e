"""The place of a sequence's blocks in the grid: as boxes, as outlines, and as parts of frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from diffattn.distinct import distinct_rows
from diffattn.grid import TokenGrid
from diffattn.orders import TileOrder


@dataclass(frozen=True)
class Boxes:
    """The video tokens of a grid, block by block, as boxes of frames, rows and columns.

    In a tile order, a block that is one tile is one box. In raster order, a block is several boxes:
    the end of a row, some whole rows, and the start of a row.

    Attributes:
        block: int64 `(boxes,)`, ascending: the block of the sequence that each box lies in.
        first, end: int64 `(boxes, 3)`: the first frame, row and column of each box, and the last
            plus 1.
    """

    block: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor


@dataclass(frozen=True)
class Outlines:
    """The shape and the place of the video tokens in each block of a sequence.

    Attributes:
        shape: int64 `(blocks,)`, a number for the shape. Two blocks have the same number when a
            shift in time and space turns the video tokens of the one into those of the other, and
            both hold text in the same places.
        first, end: int64 `(blocks, 3)`: the smallest frame, row and column among the block's video
            tokens, and the largest plus 1. A block of text alone has 0 and 1.
    """

    shape: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor


def boxes_of(
    grid: TokenGrid, block_size: int, device: torch.device, order: TileOrder | None = None
) -> Boxes:
    """Split the blocks of a sequence into boxes.

    Args:
        grid: the tokens; text tokens are in no box.
        block_size: tokens per block.
        order: the order in which the tokens are cut into blocks; None is the grid's own order.
    """
    position = _positions(grid, device, order)
    index = (~grid.is_text(position)).nonzero().flatten()
    block = index // block_size
    frame, row, column = grid.coordinates(position[index])
    place = torch.stack([block, frame, row, column], 1)
    # Neighbouring tokens join to runs of a row, runs to rectangles of rows, rectangles to boxes.
    low, high = place, place + 1
    for axis in (3, 2, 1):
        low, high = _joined(low, high, axis)
    return Boxes(low[:, 0], low[:, 1:], high[:, 1:])


def outlines_of(
    grid: TokenGrid, block_size: int, device: torch.device, order: TileOrder | None = None
) -> Outlines:
    """The outlines of the blocks of a sequence; arguments as for `boxes_of`."""
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
    _, shape = distinct_rows(numbered)
    nowhere = is_text.all(1)
    return Outlines(shape, first.where(~nowhere, 0), (last + 1).where(~nowhere, 1))


def _positions(grid: TokenGrid, device: torch.device, order: TileOrder | None) -> torch.Tensor:
    return torch.arange(grid.tokens, device=device) if order is None else order.positions(device)


def _joined(low: torch.Tensor, high: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Join neighbours in a list of (block, frame, row, column) ranges that meet along `axis`."""
    others = [i for i in range(4) if i != axis]
    same = (low[1:, others] == low[:-1, others]) & (high[1:, others] == high[:-1, others])
    joins = same.all(1) & (low[1:, axis] == high[:-1, axis])
    starts = torch.nn.functional.pad(~joins, (1, 0), value=True)
    ends = torch.nn.functional.pad(~joins, (0, 1), value=True)
    return low[starts], high[ends]


@dataclass(frozen=True)
class Fragments:
    """The video tokens of a grid, cut at every block boundary and every frame boundary.

    All tensors are int64 `(fragments,)`, in sequence order.

    Attributes:
        block: the block of the sequence, text included, that each fragment lies in.
        frame: the latent frame of each fragment.
        first, last: the first and the last token of each fragment, counted from the frame's start.
    """

    block: torch.Tensor
    frame: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @property
    def size(self) -> torch.Tensor:
        """Tokens of each fragment."""
        return self.last - self.first + 1


def fragments_of(grid: TokenGrid, block_size: int, device: torch.device) -> Fragments:
    """Cut the video tokens of `grid` into fragments for blocks of `block_size` tokens."""
    offset, end = grid.video.start, grid.video.stop
    frame_starts = torch.arange(offset, end, grid.frame_tokens, device=device)
    block_starts = torch.arange(0, end, block_size, device=device)
    start = torch.cat([frame_starts, block_starts[block_starts >= offset]]).unique()
    stop = torch.cat([start[1:], start.new_tensor([end])])
    frame = (start - offset) // grid.frame_tokens
    first = start - offset - frame * grid.frame_tokens
    return Fragments(start // block_size, frame, first, first + stop - start - 1)


class InBlocks(Protocol):
    """Pieces of a sequence; `block` is the block of each piece, int64 `(pieces,)`."""

    @property
    def block(self) -> torch.Tensor: ...


def any_in_block(
    pairs: torch.Tensor, query: InBlocks, key: InBlocks, rows: int, columns: int
) -> torch.Tensor:
    """Whether each block holds a marked pair of pieces.

    Args:
        pairs: bool `(query pieces, key pieces)`.
        query, key: the pieces.
        rows, columns: number of query and key blocks of the sequence.

    Returns:
        bool `(rows, columns)`.
    """
    device = pairs.device
    by_row = torch.zeros(rows, pairs.shape[1], dtype=torch.int32, device=device)
    by_row.index_add_(0, query.block, pairs.to(torch.int32))
    out = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    return out.index_add_(1, key.block, by_row) > 0
