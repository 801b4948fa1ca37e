"""DiskMask: a token sees the tokens in a disk around it, which may shrink from frame to frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from diffattn.blocks import EMPTY, FULL
from diffattn.distinct import distinct_rows
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask, Blocking
from diffattn.masks.block_geometry import Boxes, any_in_block, boxes_of, outlines_of
from diffattn.orders import tiles_that_fit

_T = TypeVar("_T")

# Sums of three squared distances below this are exact in float32, in any order.
_EXACT_IN_FLOAT32 = 1 << 22


@dataclass(frozen=True, eq=False)
class DiskMask(AttentionMask):
    """A token sees the tokens at a small squared distance in the plane; text pairs never attend.

    Attributes:
        limits: int32 `(frames,)`: in a frame at temporal distance d a token sees the tokens with
            (rows apart)^2 + (columns apart)^2 < `limits[d]`. The limits never grow with d.
        first_frame: the tokens of the first frame see all video tokens, and all video tokens see
            the first frame.
        keys: the grid whose video tokens are the keys, over the same tokens as `grid` and of as
            many rows and columns; None for `grid` itself.
        distances: int64 `(frames, frames of the keys)`, the temporal distances of frames that
            index `limits`; None where frames are 1 apart, as within one video.
    """

    limits: torch.Tensor
    first_frame: bool
    keys: TokenGrid | None = None
    distances: torch.Tensor | None = None

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        if query.device.type == "cpu" and query.shape[-1:] == key.shape[-2:-1] == (1,):
            return self._allowed_between(query[..., 0], key[..., 0, :])
        is_text = self.grid.is_text(query), self._key_grid.is_text(key)
        # int32 is twice as fast as int64 over many blocks.
        query_at, key_at = (
            [x.to(torch.int32) for x in grid.places(token)]
            for grid, token in ((self.grid, query), (self._key_grid, key))
        )
        rows, columns = query_at[1] - key_at[1], query_at[2] - key_at[2]
        limits = self._limits_between(query_at[0], key_at[0])
        seen = rows.square_().add(columns.square_()) < limits
        if self.first_frame:
            seen |= (query_at[0] == 0) | (key_at[0] == 0)
        return seen & ~is_text[0] & ~is_text[1]

    def _allowed_between(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """`allowed` of each query `(..., m)` and each key `(..., n)`, as bool `(..., m, n)`.

        The squared distance less the limit is a product of two matrices, which takes a fifth of the
        time on a CPU. All numbers in the product are integers that its dtype holds exactly.
        """
        farthest = self.grid.height**2 + self.grid.width**2
        dtype = torch.float32 if farthest < _EXACT_IN_FLOAT32 else torch.float64
        frame_q, *plane_q = self.grid.places(query)
        frame_k, *plane_k = self._key_grid.places(key)
        (row_q, column_q), (row_k, column_k) = (
            [x.to(dtype) for x in plane] for plane in (plane_q, plane_k)
        )
        from_zero = [
            (row.square() + column.square()).where(~grid.is_text(token), math.inf)
            for grid, row, column, token in (
                (self.grid, row_q, column_q, query),
                (self._key_grid, row_k, column_k, key),
            )
        ]
        # The frames that the queries are in.
        first = frame_q.amin(-1, keepdim=True)
        span = torch.arange(int((frame_q - first).max()) + 1)
        frames = (first + span).clamp(max=self.grid.frames - 1)
        limits = self._limits_between(frames[..., None], frame_k[..., None, :]).to(dtype)
        if self.first_frame:
            of_first = (frames[..., None] == 0) | (frame_k[..., None, :] == 0)
            limits = limits.where(~of_first, farthest)
        one_q, one_k = torch.ones_like(row_q), torch.ones_like(row_k)
        left = torch.stack([from_zero[0], one_q, -2 * row_q, -2 * column_q], -1)
        left = torch.cat([left, ((frame_q - first)[..., None] == span).to(dtype)], -1)
        right = torch.stack([one_k, from_zero[1], row_k, column_k], -2)
        return left @ torch.cat([right, -limits], -2) < 0

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        states = super().block_states(blocking)
        device, sizes = blocking.device, (blocking.block_q, blocking.block_kv)
        query, key = self._of_both(boxes_of, blocking)
        limits = self.limits.to(device)
        in_time = _gaps(query, key, 0) if self.distances is None else self._frame_gaps(query, key)
        near, far = zip(in_time, *(_gaps(query, key, axis) for axis in (1, 2)), strict=True)
        seen = near[1].square().add_(near[2].square()) < limits[near[0]]
        unseen = far[1].square().add_(far[2].square()) >= limits[far[0]]
        if self.first_frame:
            seen |= (query.first[:, None, 0] == 0) | (key.first[None, :, 0] == 0)
            unseen &= (query.end[:, None, 0] > 1) & (key.end[None, :, 0] > 1)
        some = any_in_block(seen, query, key, *states.shape)
        missing = any_in_block(unseen, query, key, *states.shape)
        # Text keeps its places in every order.
        token = torch.arange(self.grid.tokens, device=device)
        missing[self.grid.is_text(token).nonzero().flatten() // sizes[0]] = True
        missing[:, self._key_grid.is_text(token).nonzero().flatten() // sizes[1]] = True
        states[~some] = EMPTY
        states[~missing] = FULL
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        # The shift between the blocks decides, and their tokens in the first frame. Out of reach,
        # the first frame alone decides.
        outlines = self._of_both(outlines_of, blocking)
        (query, query_end), (key, key_end) = (
            (x.first[index], x.end[index]) for x, index in zip(outlines, (row, column), strict=True)
        )
        gap = torch.maximum(query - key_end, key - query_end).add(1).clamp(min=0)
        in_time, shift = gap[:, 0], query[:, 0] - key[:, 0] + self._key_grid.frames
        if self.distances is not None:
            whole = [
                Boxes(torch.arange(len(x.first), device=row.device), x.first, x.end)
                for x in outlines
            ]
            in_time = self._frame_gaps(*whole)[0][row, column]
            if not _by_shift(self.distances):
                shift = query[:, 0] * self._key_grid.frames + key[:, 0]
        close = gap[:, 1].square() + gap[:, 2].square()
        near = close < self.limits.to(row.device)[in_time]
        out = outlines[0].shape[row] * (len(outlines[1].shape) + 1) + outlines[1].shape[column]
        rows, columns = (query - key)[:, 1:].unbind(1)
        for apart, size in (
            (shift, (self.grid.frames + 1) * (self._key_grid.frames + 1)),
            (rows + self.grid.height, 2 * self.grid.height),
            (columns + self.grid.width, 2 * self.grid.width),
        ):
            out = out * size + apart.where(near, 0)
        return out * 4 + (query[:, 0] == 0) * 2 + (key[:, 0] == 0)

    @property
    def _key_grid(self) -> TokenGrid:
        return self.keys or self.grid

    def _of_both(self, of: Callable[..., _T], blocking: Blocking) -> tuple[_T, _T]:
        """`boxes_of` or `outlines_of` of the queries and of the keys."""
        query = of(self.grid, blocking.block_q, blocking.device, blocking.order)
        if (self._key_grid, blocking.block_kv) == (self.grid, blocking.block_q):
            return query, query
        return query, of(self._key_grid, blocking.block_kv, blocking.device, blocking.order)

    def _limits_between(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The limits between frames of queries and frames of keys, which broadcast together."""
        limits = self.limits.to(query.device)
        if self.distances is None:
            return limits[(query - key).abs_()]
        return limits[self.distances.to(query.device)][query, key]

    def _frame_gaps(self, query: Boxes, key: Boxes) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest distance in time between boxes, as `_gaps` along an axis."""
        assert self.distances is not None
        out = []
        for of_range in (torch.amin, torch.amax):
            table = self.distances.to(query.first.device, torch.int32)
            for boxes in (query, key):
                # Boxes have few distinct ranges of frames.
                frames = torch.stack([boxes.first[:, 0], boxes.end[:, 0]], 1)
                one_of_each, which = distinct_rows(frames)
                ranges = frames[one_of_each].tolist()
                rows = [of_range(table[first:end], 0) for first, end in ranges]
                table = torch.stack(rows)[which].T
            out.append(table)
        return out[0], out[1]


def _by_shift(distances: torch.Tensor) -> bool:
    """Whether the distance of two frames depends on the difference of their numbers alone."""
    return torch.equal(distances[1:, 1:], distances[:-1, :-1])


def disk_limits(
    grid: TokenGrid, frames: int, radius: int, frame_radius: int, window: str
) -> torch.Tensor:
    """The limits of a `DiskMask` over `grid`, exact in integers.

    No squared distance reaches the grid's squared diagonal. Limits are cut there to fit into int32.

    Args:
        grid: the tokens.
        frames: number of temporal distances, from 0.
        radius: distance in the plane, in tokens, from which on tokens are not seen.
        frame_radius: distance in latent frames from which on frames are not seen.
        window: "ellipsoid", a disk that shrinks towards `frame_radius`, or "cylinder".

    Returns:
        int32 `(frames,)`.
    """
    limits = []
    for distance in range(frames):
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
    """The tile of `block_size` tokens with the least work for a `DiskMask`.

    The candidates are all ways to write `block_size` as frames x rows x columns that fit into the
    grid. The best candidate has the fewest token pairs in pairs of tiles with any attending pair.

    Args:
        grid: the tokens to be tiled.
        limits: as for `DiskMask`.
        block_size: tokens of a tile.

    Returns:
        Latent frames, rows and columns of the tile.
    """
    tiles = tiles_that_fit(grid, block_size)
    by_gap = [
        {side: _pairs_by_gap(size, side) for side in {tile[axis] for tile in tiles}}
        for axis, size in enumerate((grid.frames, grid.height, grid.width))
    ]

    def visited(tile: tuple[int, int, int]) -> int:
        (frames, f), (rows, r), (columns, c) = map(dict.__getitem__, by_gap, tile)
        apart = rows.square()[:, None] + columns.square()
        near = apart < limits[frames][:, None, None]
        return int(near.double() @ c @ r @ f)

    return min(tiles, key=visited)


def _gaps(query: Boxes, key: Boxes, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distances along an axis between the tokens of query boxes and of key boxes.

    Returns:
        The least and the largest distance, int32 `(query boxes, key boxes)` each.
    """
    (first_q, end_q), (first_kv, end_kv) = (
        (x.first[:, axis].to(torch.int32), x.end[:, axis].to(torch.int32)) for x in (query, key)
    )
    before, after = first_q[:, None] - end_kv + 1, first_kv - end_q[:, None] + 1
    far = torch.maximum(end_q[:, None] - first_kv, end_kv - first_q[:, None]) - 1
    return torch.maximum(before, after).clamp_(min=0), far


def _pairs_by_gap(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct gaps between tiles along an axis, and the number of token pairs at each gap.

    Returns:
        int64 (gaps,) and float64 (gaps,).
    """
    tiles = -(-size // side)
    last = size - (tiles - 1) * side
    # Tiles that are k apart have a gap of k - 1 tiles; one of them may be the last, which is short.
    apart = torch.arange(tiles)
    gaps = ((apart - 1) * side + 1).clamp(min=0)
    pairs = 2 * ((tiles - 1 - apart) * side * side + side * last)
    pairs[0] = (tiles - 1) * side * side + last * last
    return gaps, pairs.double()
