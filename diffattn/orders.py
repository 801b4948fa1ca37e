"""TileOrder: the video tokens of a grid laid out tile by tile, so that blocks are compact boxes.

In raster order a block of 128 tokens is a thin strip of one frame, and most of the blocks that a
window in space and time visits are partial. Where 128 tokens of the sequence are a box of, say,
4 x 4 x 8 tokens, the same window visits fewer blocks, and more of them are full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffattn.grid import TokenGrid
from diffattn.kernels.dispatch import needs_gradients
from diffattn.kernels.transforms import is_transformed

_WORD = 8  # bytes of an int64


@dataclass(frozen=True)
class TileOrder:
    """An order of the tokens of `grid` in which each tile of video tokens is a run of the sequence.

    A tile with as many tokens as a kernel's block is one block. Where the grid is no multiple of
    the tile, the leftover tokens follow after all whole tiles. Tiles of leftover tokens are cut to
    fit, and longer along their other axes. Text tokens keep their places. Where the text before the
    video is no multiple of a tile, video tokens fill up its last block, so that tiles and blocks
    stay aligned. The text in that block makes its rows and columns dense anyway.

    Attributes:
        grid: the tokens of the sequence.
        tile: frames, rows and columns of a tile; each may exceed the grid's.
        beside: orders of further tokens of the sequence, such as those of references. Each has a
            grid over as many tokens, and orders the video tokens of that grid.

    Raises:
        ValueError: for a tile that is not three sizes of at least 1, or an order beside this one
            over another number of tokens.
    """

    grid: TokenGrid
    tile: tuple[int, int, int]
    beside: tuple[TileOrder, ...] = ()
    _permutations: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.tile) != 3 or any(side < 1 for side in self.tile):
            raise ValueError(
                f"tile is {self.tile}, but must be frames, rows and columns, each at least 1"
            )
        for order in self.beside:
            if order.grid.tokens != self.grid.tokens:
                raise ValueError(
                    f"an order of {order.grid.tokens} tokens cannot stand beside an order of"
                    f" {self.grid.tokens} tokens"
                )

    def positions(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """int64 `(tokens,)`: the position in the model's sequence of each token of this order."""
        return self._permutation(torch.device(device))[0]

    @property
    def is_in_place(self) -> bool:
        """Whether this order is the order of the sequence."""
        (frames, rows, columns), grid = self.tile, self.grid
        fits = frames <= grid.frames and rows <= grid.height and columns <= grid.width
        parts_of_rows = rows > 1 and columns < grid.width
        parts_of_frames = frames > 1 and (rows, columns) != (grid.height, grid.width)
        if fits and (parts_of_rows or parts_of_frames):
            return False  # a tile leaves out tokens between its own: a quick answer
        place = self.positions()
        return torch.equal(place, torch.arange(len(place), device=place.device))

    def to_tiles(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Bring the tokens along `dim` from the model's order into this one; differentiable.

        Args:
            x: has the whole sequence along `dim`, or its `TokenGrid.pictures`: the video alone, if
                the sequence has no references.

        Raises:
            ValueError: if `x` has another length along `dim`.
        """
        return self._moved(x, dim, into=True)

    def from_tiles(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Inverse of `to_tiles`."""
        return self._moved(x, dim, into=False)

    def _moved(self, x: torch.Tensor, dim: int, *, into: bool) -> torch.Tensor:
        there, back = self._permutation(x.device)
        tokens, pictures = self.grid.tokens, self.grid.pictures
        count = pictures.stop - pictures.start
        if x.shape[dim] == count != tokens:
            there, back = there[pictures] - pictures.start, back[pictures] - pictures.start
        elif x.shape[dim] != tokens:
            kind = "video tokens" if not self.grid.references else "tokens of video and references"
            raise ValueError(
                f"dimension {dim} of a tensor of shape {tuple(x.shape)} has neither the {tokens}"
                f" tokens of {self.grid} nor its {count} {kind}"
            )
        return permuted(x, *((there, back) if into else (back, there)), dim)

    def _permutation(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`positions` and its inverse."""
        if device not in self._permutations:
            # Training after a run in inference mode must be able to use these tensors.
            with torch.inference_mode(False):
                order = self._sequence(device)
                inverse = torch.empty_like(order)
                inverse[order] = torch.arange(len(order), device=device)
                self._permutations[device] = order, inverse
        return self._permutations[device]

    def _sequence(self, device: torch.device) -> torch.Tensor:
        grid = self.grid
        sizes = (grid.frames, grid.height, grid.width)
        whole = [size // side * side for size, side in zip(sizes, self.tile, strict=True)]
        boxes = [[range(end) for end in whole]]
        for axis in range(3):
            # Leftover tokens of this axis, except those that are leftover along an earlier axis.
            box = [range(end) for end in (*whole[:axis], 0, *sizes[axis + 1 :])]
            box[axis] = range(whole[axis], sizes[axis])
            boxes.append(box)
        video = torch.cat([self._tiled(box, device) for box in boxes if all(map(len, box))])
        video = video.roll(-grid.text_before % math.prod(self.tile)) + grid.text_before
        token = torch.arange(grid.tokens, device=device)
        token[grid.video] = video
        for order in self.beside:
            token[order.grid.video] = order._sequence(device)[order.grid.video]
        return token

    def _tiled(self, box: Sequence[range], device: torch.device) -> torch.Tensor:
        """The video tokens of a box, tile by tile and in raster order within a tile."""
        sides = _fitted(self.tile, [len(axis) for axis in box])
        tiles = [-(-len(axis) // side) for axis, side in zip(box, sides, strict=True)]
        # A token's place among the tiles, and its place in the video, are sums over the axes.
        place = token = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
        of_grid = (self.grid.frame_tokens, self.grid.width, 1)
        for axis, (along, side) in enumerate(zip(box, sides, strict=True)):
            in_tile = math.prod(sides[axis + 1 :])
            of_tiles = math.prod(sides) * math.prod(tiles[axis + 1 :])
            at = torch.arange(len(along), device=device).view(-1, *(1,) * (2 - axis))
            place = place + at // side * of_tiles + at % side * in_tile
            token = token + (at + along.start) * of_grid[axis]
        out = torch.full((math.prod(sides) * math.prod(tiles),), -1, device=device)
        out[place.flatten()] = token.flatten()
        # Tiles at the ends may be short.
        return out if len(out) == token.numel() else out[out >= 0]


def joined_order(grid: TokenGrid, orders: Sequence[TileOrder | None]) -> TileOrder | None:
    """The order of a sequence from the orders of its rectangles; None if all are None.

    Args:
        grid: the tokens of the sequence.
        orders: the order of the video of `grid`, then orders of further tokens. None leaves tokens
            in the order of the sequence.
    """
    of_video, *others = orders
    beside = tuple(order for order in others if order is not None)
    if of_video is None:
        # A tile of one token leaves the video in its own order.
        return TileOrder(grid, (1, 1, 1), beside) if beside else None
    return TileOrder(grid, of_video.tile, beside)


def tile_for(
    grid: TokenGrid, block_size: int = 128, window: tuple[int, int, int] | None = None
) -> tuple[int, int, int]:
    """The tile of `block_size` tokens at which a window over `grid` visits the fewest blocks.

    The tiles of `tiles_that_fit` are compared by the number of token pairs in the pairs of tiles
    that windows touch. The wider the window along an axis, the longer the tile. On a 21 x 30 x 52
    grid, the best tiles of 128 tokens are 2 x 8 x 8 for a window of 7 x 15 x 15, and 16 x 4 x 2 for
    a window of 21 x 9 x 9.

    Args:
        grid: the tokens to be tiled.
        block_size: tokens per tile, as many as a kernel's block has.
        window: frames, rows and columns around a token that it attends to; a third of each axis
            when None.
    """
    sizes = (grid.frames, grid.height, grid.width)
    window = window or (-(-grid.frames // 3), -(-grid.height // 3), -(-grid.width // 3))
    return min(
        tiles_that_fit(grid, block_size),
        key=lambda tile: math.prod(map(_touched, sizes, tile, window)),
    )


def tiles_that_fit(grid: TokenGrid, block_size: int = 128) -> list[tuple[int, int, int]]:
    """All tiles of `block_size` tokens, as (frames, rows, columns), that fit into the grid.

    If no tile fits, all tiles of that many tokens.
    """
    tiles = [
        (frames, rows, block_size // (frames * rows))
        for frames in _divisors(block_size)
        for rows in _divisors(block_size // frames)
    ]
    sizes = (grid.frames, grid.height, grid.width)
    fitting = [t for t in tiles if all(side <= n for side, n in zip(t, sizes, strict=True))]
    # A grid smaller than a block is one block, however it is tiled.
    return fitting or tiles


def permuted(x: torch.Tensor, there: torch.Tensor, back: torch.Tensor, dim: int) -> torch.Tensor:
    """The entries of `x` along `dim` in the order `there`, whose inverse is `back`."""
    if is_transformed():
        return x.index_select(dim, there)
    if not needs_gradients((x,)):
        return _picked(x, there, dim)
    moved: torch.Tensor = _Permuted.apply(x, there, back, dim)
    return moved


class _Permuted(torch.autograd.Function):
    """`index_select` by a permutation of known inverse; its backward is an `index_select` too."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor, dim: int
    ) -> torch.Tensor:
        ctx.permutation = back, there, dim
        return _picked(x, there, dim)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _Permuted.apply(grads[0], *ctx.permutation), None, None, None


def _picked(x: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """`x.index_select(dim, index)`, eight bytes at a time where the last dimension allows that.

    On a GPU each thread moves one element: of two bytes, that is a fraction of the memory's rate.
    Compiled code has kernels of its own.
    """
    size = x.element_size()
    is_whole = (
        not torch.compiler.is_dynamo_compiling()
        and dim % x.ndim < x.ndim - 1
        and size < _WORD
        and x.stride(-1) == 1
        # A dimension of one element may have any stride.
        and all(n * size % _WORD == 0 for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    )
    if not is_whole:
        return x.index_select(dim, index)
    return x.view(torch.int64).index_select(dim, index).view(x.dtype)


def _fitted(tile: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """`tile` cut to fit a box, then doubled along other axes to at most the tokens of `tile`."""
    sides = [max(1, min(side, size)) for side, size in zip(tile, sizes, strict=True)]
    while 2 * math.prod(sides) <= math.prod(tile):
        growing = [axis for axis in range(3) if 2 * sides[axis] <= sizes[axis]]
        if not growing:
            break
        sides[min(growing, key=sides.__getitem__)] *= 2
    return sides


def _touched(size: int, side: int, window: int) -> int:
    """Token pairs along an axis, in pairs of tiles where a window of the first meets the second."""
    pairs = 0
    for start in range(0, size, side):
        stop = min(start + side, size)
        low = max(0, start - window // 2) // side * side
        high = min(size, -(-(stop + (window - 1) // 2) // side) * side)
        pairs += (stop - start) * (high - low)
    return pairs


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
