"""DiskMask: tokens see those around them, in a disk that may shrink from frame to frame."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffattn.blocks import EMPTY, FULL
from diffattn.bounds import bounds_of, furthest, nearest, shapes_of
from diffattn.fragments import any_in_block
from diffattn.grid import TokenGrid
from diffattn.mask import AttentionMask
from diffattn.orders import TileOrder


@dataclass(frozen=True, eq=False)
class DiskMask(AttentionMask):
    """Video tokens see those whose squared distance in the plane is small; text pairs never attend.

    Attributes:
        limits: int32 `(frames,)`: a token sees those tokens of a frame at distance d whose
            (rows apart)^2 + (columns apart)^2 is less than `limits[d]`; they never grow with d.
        first_frame: the tokens of the first frame see everything, and everything sees them.
    """

    limits: torch.Tensor
    first_frame: bool

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if query.device.type == "cpu" and query.shape[-1:] == key.shape[-2:-1] == (1,):
            return self._allowed_between(query[..., 0], key[..., 0, :])
        is_text = self.grid.is_text(query), self.grid.is_text(key)
        # Text has no place in the grid: it is given that of a token that has one. Half the width of
        # int64 is twice the speed where this runs over many blocks.
        start, end = self.grid.video.start, self.grid.video.stop - 1
        query_at, key_at = (
            [x.to(torch.int32) for x in self.grid.coordinates(token.clamp(start, end))]
            for token in (query, key)
        )
        frames, rows, columns = (q - k for q, k in zip(query_at, key_at, strict=True))
        limits = self.limits.to(query.device)
        seen = rows.square_().add(columns.square_()) < limits[frames.abs_()]
        if self.first_frame:
            seen |= (query_at[0] == 0) | (key_at[0] == 0)
        return seen & ~is_text[0] & ~is_text[1]

    def _allowed_between(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """`allowed` of each query `(..., m)` and each key `(..., n)`, as bool `(..., m, n)`.

        The squared distance less its limit is a product of two matrices, which on a processor takes
        a fifth of the time. All of its numbers are integers that float64 holds exactly.
        """
        start, end = self.grid.video.start, self.grid.video.stop - 1
        frame_q, *plane_q = self.grid.coordinates(query.clamp(start, end))
        frame_k, *plane_k = self.grid.coordinates(key.clamp(start, end))
        (row_q, column_q), (row_k, column_k) = (
            [x.double() for x in plane] for plane in (plane_q, plane_k)
        )
        from_zero = [
            (row.square() + column.square()).where(~self.grid.is_text(token), math.inf)
            for row, column, token in ((row_q, column_q, query), (row_k, column_k, key))
        ]
        # The frames that the queries are in.
        first = frame_q.amin(-1, keepdim=True)
        span = torch.arange(int((frame_q - first).max()) + 1)
        frames = (first + span).clamp(max=self.grid.frames - 1)
        limits = self.limits.double()[(frames[..., None] - frame_k[..., None, :]).abs()]
        if self.first_frame:
            of_first = (frames[..., None] == 0) | (frame_k[..., None, :] == 0)
            limits = limits.where(~of_first, self.grid.height**2 + self.grid.width**2)
        one_q, one_k = torch.ones_like(row_q), torch.ones_like(row_k)
        left = torch.stack([from_zero[0], one_q, -2 * row_q, -2 * column_q], -1)
        left = torch.cat([left, ((frame_q - first)[..., None] == span).double()], -1)
        right = torch.stack([one_k, from_zero[1], row_k, column_k], -2)
        return left @ torch.cat([right, -limits], -2) < 0

    def block_states(
        self,
        block_q: int,
        block_kv: int,
        device: torch.device,
        order: TileOrder | None = None,
    ) -> torch.Tensor:
        states = super().block_states(block_q, block_kv, device, order)
        query, key = (bounds_of(self.grid, size, device, order) for size in (block_q, block_kv))
        limits = self.limits.to(device)
        close = nearest(query, key, 1).square_().add_(nearest(query, key, 2).square_())
        seen = close < limits[nearest(query, key, 0)]
        far = furthest(query, key, 1).square_().add_(furthest(query, key, 2).square_())
        unseen = far >= limits[furthest(query, key, 0)]
        if self.first_frame:
            seen |= (query.low[:, None, 0] == 0) | (key.low[None, :, 0] == 0)
            unseen &= (query.high[:, None, 0] > 0) & (key.high[None, :, 0] > 0)
        some = any_in_block(seen, query, key, *states.shape)
        missing = any_in_block(unseen, query, key, *states.shape)
        # Text keeps its places in every order.
        text = self.grid.is_text(torch.arange(self.grid.tokens, device=device)).nonzero().flatten()
        missing[text // block_q] = True
        missing[:, text // block_kv] = True
        states[~some] = EMPTY
        states[~missing] = FULL
        return states

    def block_signatures(
        self,
        row: torch.Tensor,
        column: torch.Tensor,
        block_q: int,
        block_kv: int,
        order: TileOrder | None = None,
    ) -> torch.Tensor:
        # Only how far a block is shifted counts, and which of its tokens are in the first frame;
        # and only the latter where it is shifted out of reach.
        grid = self.grid
        (query, query_end, query_shape), (key, key_end, key_shape) = (
            shapes_of(grid, size, row.device, order) for size in (block_q, block_kv)
        )
        query, query_end, key, key_end = query[row], query_end[row], key[column], key_end[column]
        gap = torch.maximum(query - key_end, key - query_end).clamp(min=0)
        close = gap[:, 1].square() + gap[:, 2].square()
        near = close < self.limits.to(row.device)[gap[:, 0]]
        out = query_shape[row] * (len(key_shape) + 1) + key_shape[column]
        sizes = (grid.frames, grid.height, grid.width)
        for apart, size in zip((query - key).unbind(1), sizes, strict=True):
            out = out * (2 * size) + (apart + size).where(near, 0)
        return out * 4 + (query[:, 0] == 0) * 2 + (key[:, 0] == 0)


def disk_limits(grid: TokenGrid, radius: int, frame_radius: int, window: str) -> torch.Tensor:
    """The limits of a `DiskMask` over `grid`, exact in integers.

    No squared distance reaches the grid's diagonal: they end there, and so fit into int32.

    Args:
        radius: tokens in the plane at this distance are just not seen.
        frame_radius: frames at this distance are just not seen.
        window: "ellipsoid", whose disk shrinks towards that distance, or "cylinder".
    """
    limits = []
    for distance in range(grid.frames):
        if distance >= frame_radius:
            limits.append(0)
        elif window == "cylinder":
            limits.append(radius**2)
        else:
            # d^2 R^2 + s T^2 < T^2 R^2 solved for the integer s, rounded up.
            within = radius**2 * (frame_radius**2 - distance**2)
            limits.append(-(-within // frame_radius**2))
    diagonal = grid.height**2 + grid.width**2
    return torch.tensor([min(limit, diagonal) for limit in limits], dtype=torch.int32)


def best_tile(grid: TokenGrid, limits: torch.Tensor, block_size: int) -> tuple[int, int, int]:
    """The tile of `block_size` tokens at which a `DiskMask` visits the fewest blocks.

    Every way to write `block_size` as frames x rows x columns that fits into the grid is compared
    by the token pairs in those pairs of tiles that see anything of each other.

    Args:
        grid: the tokens to be tiled.
        limits: as for `DiskMask`.
    """
    sizes = (grid.frames, grid.height, grid.width)
    divisors = [n for n in range(1, block_size + 1) if block_size % n == 0]
    tiles = [
        (frames, rows, block_size // frames // rows)
        for frames in divisors
        for rows in divisors
        if block_size // frames % rows == 0
    ]
    fitting = [t for t in tiles if all(side <= n for side, n in zip(t, sizes, strict=True))]

    def visited(tile: tuple[int, int, int]) -> int:
        (frames, f), (rows, r), (columns, c) = map(_pairs_by_gap, sizes, tile)
        apart = rows.square()[:, None] + columns.square()
        near = apart < limits[frames][:, None, None]
        return int(torch.einsum("frc,f,r,c->", near.double(), f, r, c))

    # A grid smaller than a block is one block, however it is tiled.
    return min(fitting or tiles, key=visited)


def _pairs_by_gap(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gaps between tiles along an axis, int64, and float64 the token pairs in such tiles."""
    low = torch.arange(0, size, side)
    high = (low + side).clamp(max=size) - 1
    tokens = (high - low + 1).double()
    before, after = low[:, None] - high, low - high[:, None]
    gaps, which = torch.maximum(before, after).clamp(min=0).flatten().unique(return_inverse=True)
    pairs = torch.zeros(len(gaps), dtype=torch.float64)
    return gaps, pairs.index_add(0, which, (tokens[:, None] * tokens).flatten())
