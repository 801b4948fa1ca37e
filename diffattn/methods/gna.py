"""Generalized neighborhood attention: a window along each axis, shared by strides of queries.

Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed
of Light", arXiv 2504.16922. The parameters have the names of NATTEN, the paper's code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self, TypeAlias

import torch

from diffattn._checks import FLAG, Allowed, check, count, is_whole, lists_to_tuples
from diffattn.grid import TokenGrid
from diffattn.masks.base import AttentionMask
from diffattn.masks.neighbourhood import AxisWindow, NeighbourhoodMask, block_size_for
from diffattn.methods.base import StaticMaskMethod
from diffattn.models import makes_images
from diffattn.orders import TileOrder, tiles_that_fit

Size: TypeAlias = int | float | str  # of a window along an axis
Tile: TypeAlias = tuple[int, int, int]

_AXES = ("frames", "height", "width")
# Extra cost of a token pair in a partly masked block, in units of a pair in a full block.
_COST_OF_MASKING = 0.5


@dataclass(frozen=True)
class _Recommended:
    """A setting that keeps the quality without training, according to the paper.

    Attributes:
        grid: the paper's grid of the model, as frames, height and width.
        window, stride: the setting on this grid.
        tile: the tile of keys that window and stride are made for.
        dense_steps: fraction of the run that stays dense at the start.
    """

    grid: Tile
    window: Tile
    stride: Tile
    tile: Tile
    dense_steps: float


# 15 of 50, 9 of 28 and 12 of 35 steps are dense.
_HUNYUANVIDEO = _Recommended((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), dense_steps=0.3)
_FLUX = _Recommended((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 8), dense_steps=0.325)
_COSMOS = _Recommended((16, 44, 80), (16, 32, 48), (1, 8, 16), (4, 4, 8), dense_steps=0.345)
_LARGEST_SHARE = 5 / 8  # of an axis: the limit of windows above the paper's share of the axis


@dataclass(frozen=True)
class _Settled:
    """The parameters after a model and a grid have replaced every None."""

    window: Size | tuple[Size, ...]
    stride: int | tuple[int, ...]
    dense_layers: int
    dense_steps: int | float


@dataclass(frozen=True, kw_only=True)
class GNAAttn(StaticMaskMethod):
    """Generalized neighborhood attention (arXiv 2504.16922).

    A token sees a box of `window` tokens around itself. `stride` neighbouring queries along an axis
    share the window of the query in the middle (of two middle queries, the right one). `dilation`
    is the distance between the keys of a window. Along a causal axis a token sees no token after
    itself. At the ends of an axis windows are moved inwards and not cut: every token sees equally
    many keys, except along causal axes. Stride 1 is neighborhood attention, stride = window is
    blocked attention.

    A parameter is one value for every axis, or a tuple of values for frames, height and width. The
    value for an axis of one token is ignored: a video setting also fits an image. A tuple may leave
    out leading axes of one token: (height, width) for images. A window or stride of None takes the
    recommendation of `for_model`; with a given window, a stride of None is 1.

    Attributes:
        window: tokens that a query sees along an axis: an integer, a fraction of the axis (a float
            up to 1.0, rounded to at least 2 tokens), or "full". With a window of 1 a token sees its
            own place along the axis alone: its own frame, row or column. A window longer than the
            axis covers the axis, so that one setting serves grids of every size. NATTEN refuses
            both.
        stride: queries that share a window, at most the tokens of the window. A small grid that
            shortens the window also shortens a stride that would be longer than the window.
        dilation: distance between the keys of a window; at most the axis divided by the window.
        is_causal: whether tokens see no token after themselves along the axis.

    Raises:
        ValueError: for a parameter out of range. `mask` refuses parameters that do not fit a grid:
            a dilated window longer than its axis, and a tuple without a value for an axis.
    """

    type: ClassVar[str] = "gna"
    paper: ClassVar[str] = "arXiv 2504.16922"
    by_place: ClassVar[bool] = True

    window: Size | tuple[Size, ...] | None = field(
        default=None,
        metadata={"help": "keys per axis: tokens, a fraction such as 0.5, or full"},
    )
    stride: int | tuple[int, ...] | None = field(
        default=None, metadata={"help": "neighbouring queries that share a window, per axis"}
    )
    dilation: int | tuple[int, ...] = field(
        default=1, metadata={"help": "distance between the keys of a window, per axis"}
    )
    is_causal: bool | tuple[bool, ...] = field(
        default=False, metadata={"help": "per axis: no token sees one after itself"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lists_to_tuples(self, *_ALLOWED)
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value is not None or name not in ("window", "stride"):
                _check_values(name, value, allowed)
        for axis in range(3):
            window, stride = _along(self.window, axis), _along(self.stride, axis)
            if isinstance(window, int) and stride is not None and stride > window:
                where = _where("stride", axis, self.stride, self.window)
                raise ValueError(
                    f"{where} is {stride}, but a window of {window} allows {_up_to(window)}"
                )

    def for_model(self, family: str, grid: TokenGrid | None = None) -> Self:
        """The method with the paper's settings for a model, fitted to a grid.

        HunyuanVideo and Flux have settings of their own. Other video models take the settings of
        Cosmos, the paper's mildest (56 % sparse), and other image models the settings of Flux.

        On another grid than the paper's, a window keeps its share of each axis. If half of the
        paper's tokens is more, the window has this half instead, limited to 5/8 of the axis. The
        window is rounded to whole tiles of keys. The stride is the shortest stride with which
        windows begin and end with a tile. The first 30 to 35 % of the steps are dense, as in the
        paper's settings that keep the quality.
        """
        return replace(self, **asdict(self._settled(family, grid)))

    def _settled(self, family: str, grid: TokenGrid | None) -> _Settled:
        if makes_images(family) or (grid is not None and grid.frames == 1):
            best = _FLUX
        else:
            best = _HUNYUANVIDEO if family == "hunyuanvideo" else _COSMOS
        window, stride = self.window, self.stride
        if window is None:
            window, recommended = _fitted(best, grid)
            stride = recommended if stride is None else _limited(stride, window)
        return _Settled(
            window=window,
            stride=1 if stride is None else stride,
            dense_layers=0 if self.dense_layers is None else self.dense_layers,
            dense_steps=best.dense_steps if self.dense_steps is None else self.dense_steps,
        )

    def video_mask(self, grid: TokenGrid) -> AttentionMask:
        """The token pairs that attend among the video tokens.

        Parameters left at None take the values for a model without a recommendation. Attached to a
        pipeline, the method has the values for the pipeline's model instead.
        """
        return NeighbourhoodMask(grid, self.axes(grid))

    def axes(self, grid: TokenGrid) -> tuple[AxisWindow, AxisWindow, AxisWindow]:
        """The windows along the frames, the height and the width of `grid`, without any None.

        Raises:
            ValueError: if the parameters do not fit the grid; names the axis and the allowed
                values.
        """
        settled = self._settled("", grid)
        sizes = (grid.frames, grid.height, grid.width)
        for name, value in (
            ("window", settled.window),
            ("stride", settled.stride),
            ("dilation", self.dilation),
            ("is_causal", self.is_causal),
        ):
            _check_tuple_fits(name, value, sizes)
        frames, height, width = (self._axis(settled, axis, n) for axis, n in enumerate(sizes))
        return frames, height, width

    def _axis(self, settled: _Settled, axis: int, size: int) -> AxisWindow:
        if size == 1:
            return AxisWindow(1, 1)
        window = _tokens(_along(settled.window, axis), size)
        dilation = _along(self.dilation, axis)
        if window * dilation > size:
            raise ValueError(
                f"dilation along {_AXES[axis]} is {dilation}, but a window of {window} on an axis"
                f" of {size} tokens allows {_up_to(size // window)}"
            )
        stride = min(_along(settled.stride, axis), window)
        return AxisWindow(size, window, stride, dilation, _along(self.is_causal, axis))

    def block_size_on(self, grid: TokenGrid) -> int:
        return block_size_for(grid)

    def order_on(self, grid: TokenGrid) -> TileOrder | None:
        """The tiles with the least cost of attention, by visited blocks and full blocks.

        If window and stride are multiples of a tile, all visited blocks are full in the result.
        """
        sizes = (grid.frames, grid.height, grid.width)
        block_size = self.block_size_on(grid)
        if grid.video_tokens <= block_size or sum(size > 1 for size in sizes) < 2:
            return None
        tiles = tiles_that_fit(grid, block_size)
        visited = [
            _pairs_in_tiles(axis, {tile[i] for tile in tiles})
            for i, axis in enumerate(self.axes(grid))
        ]

        def cost(tile: Tile) -> float:
            some, full = zip(*(v[side] for v, side in zip(visited, tile, strict=True)), strict=True)
            masked = math.prod(some) - math.prod(full)
            return math.prod(some) + _COST_OF_MASKING * masked

        order = TileOrder(grid, min(tiles, key=cost))
        return None if order.is_in_place else order


def is_block_sparse(
    method: GNAAttn,
    grid: TokenGrid,
    q_tile: Tile,
    kv_tile: Tile | None = None,
    *,
    within_classes: bool = False,
    but_for_ends: bool = False,
) -> bool:
    """Whether attention in tiles is perfectly block-sparse: every visited tile of keys is full.

    Args:
        method: the method with its window, stride, dilation and causal axes.
        grid: the tokens.
        q_tile: frames, rows and columns of a tile of queries; tiles at the ends may be short.
        kv_tile: frames, rows and columns of a tile of keys; `q_tile` when None.
        within_classes: cut each class of a dilated axis into tiles by itself, as NATTEN does.
            Attention in this library tiles the whole axis, and a dilated window fills no tile.
        but_for_ends: along axes that are no multiple of the tile of keys, leave out the queries
            that see the last few tokens. The last window of such an axis is moved inwards and
            begins in the middle of a tile: without this option only a window as long as the axis
            qualifies.

    Raises:
        ValueError: if the method does not fit the grid.
    """
    tiles = zip(method.axes(grid), q_tile, kv_tile or q_tile, strict=True)
    return all(_is_block_sparse(axis, q, kv, within_classes, but_for_ends) for axis, q, kv in tiles)


def nearest_block_sparse(
    method: GNAAttn,
    grid: TokenGrid,
    q_tile: Tile,
    kv_tile: Tile | None = None,
    *,
    within_classes: bool = False,
    but_for_ends: bool = False,
) -> GNAAttn | None:
    """The method with the window and stride nearest to its own that are perfectly block-sparse.

    Each axis is searched by itself. The search takes the window nearest to the method's window that
    is block-sparse with any stride; of two equally near windows the longer, which leaves out less.
    With this window the search takes the nearest stride that is block-sparse; of two equally near
    strides the shorter.

    Args:
        method, grid, q_tile, kv_tile, within_classes, but_for_ends: see `is_block_sparse`.

    Returns:
        The method with windows and strides in tokens; None if there is no such setting, as with
        tiles of more than one token along causal axes, or along dilated axes without
        `within_classes`.

    Raises:
        ValueError: if the method does not fit the grid.
    """
    nearest = []
    for axis, q, kv in zip(method.axes(grid), q_tile, kv_tile or q_tile, strict=True):
        found = _nearest_along(axis, q, kv, within_classes, but_for_ends)
        if found is None:
            return None
        nearest.append(found)
    return replace(
        method,
        window=tuple("full" if a.window == a.size else a.window for a in nearest),
        stride=tuple(axis.stride for axis in nearest),
    )


def _is_block_sparse(
    axis: AxisWindow, q_tile: int, kv_tile: int, within_classes: bool, but_for_ends: bool
) -> bool:
    parts = axis.classes() if within_classes else (axis,)
    return all(part.is_block_sparse(q_tile, kv_tile, but_for_ends=but_for_ends) for part in parts)


def _nearest_along(
    axis: AxisWindow, q_tile: int, kv_tile: int, within_classes: bool, but_for_ends: bool
) -> AxisWindow | None:
    if _is_block_sparse(axis, q_tile, kv_tile, within_classes, but_for_ends):
        return axis
    longest = axis.size // axis.dilation
    # The first window begins at the start of the axis. To end at the end of a tile, a window must
    # be a multiple of the tile or as long as the axis.
    windows = {*range(kv_tile, longest, kv_tile), longest}
    for window in sorted(windows, key=lambda w: (abs(w - axis.window), -w)):
        own = min(axis.stride, window)
        for stride in sorted(range(1, window + 1), key=lambda s: (abs(s - own), s)):
            candidate = replace(axis, window=window, stride=stride)
            if _is_block_sparse(candidate, q_tile, kv_tile, within_classes, but_for_ends):
                return candidate
    return None


def _pairs_in_tiles(axis: AxisWindow, sides: Iterable[int]) -> dict[int, tuple[int, int]]:
    """The numbers of token pairs along an axis in visited pairs of tiles and in full pairs.

    A short tile at the end does not count as full, as its tokens are tiled in another shape.

    Args:
        sides: sides of tiles, which become the keys.
    """
    if axis.dilation > 1:
        return {side: _pairs_by_table(axis, side) for side in sides}
    # Both ends of the window never move back from one query to the next, and the windows of
    # neighbouring queries leave no key out between them. Python is faster on the few queries.
    first, end = (bound.tolist() for bound in axis.bounds(torch.arange(axis.size)))
    out = {}
    for side in sides:
        some = full = 0
        for start in range(0, axis.size, side):
            last = min(start + side, axis.size) - 1
            seen = min(axis.size, -(-end[last] // side) * side) - first[start] // side * side
            some += (last + 1 - start) * seen
            if last + 1 - start == side:
                full += side * side * max(0, end[start] // side - -(-first[last] // side))
        out[side] = some, full
    return out


def _pairs_by_table(axis: AxisWindow, side: int) -> tuple[int, int]:
    tiles = axis.tiles(side)
    size = tiles[:, 1] - tiles[:, 0]
    attend, all_pairs = axis.pairs(tiles, tiles), size[:, None] * size
    return int(all_pairs[attend > 0].sum()), int(all_pairs[attend == side * side].sum())


def _fitted(best: _Recommended, grid: TokenGrid | None) -> tuple[tuple[Size, ...], Tile]:
    """The window and the stride of a recommendation, fitted to a grid; `best.grid` for None."""
    sizes = best.grid if grid is None else (grid.frames, grid.height, grid.width)
    window: list[Size] = []
    stride: list[int] = []
    for axis, size in enumerate(sizes):
        own, tokens, apart = best.grid[axis], best.window[axis], best.stride[axis]
        if sizes != best.grid:
            # The tile must be small enough for a window of several tiles.
            tile = min(best.tile[axis], 1 << (max(1, size // 8).bit_length() - 1))
            wanted = max(size * tokens / own, min(tokens / 2, _LARGEST_SHARE * size))
            tiles = max(1, int(wanted / tile + 0.5))
            tokens = max(2, tiles * tile)
            # Windows begin with a tile if both are odd numbers of tiles, or both are even.
            apart = tile if tile == 1 or tiles % 2 else 2 * tile
        window.append("full" if tokens >= size else tokens)
        stride.append(1 if tokens >= size else min(apart, tokens))
    return tuple(window), (stride[0], stride[1], stride[2])


def _limited(stride: int | tuple[int, ...], window: tuple[Size, ...]) -> tuple[int, ...]:
    """The stride, cut to the length of the window along each axis."""
    strides = (_along(stride, axis) for axis in range(len(_AXES)))
    return tuple(
        min(s, w) if isinstance(w, int) else s
        for s, w in zip(strides, window, strict=True)
        if s is not None
    )


def _tokens(window: Size, size: int) -> int:
    """The tokens of a window on an axis of `size` tokens."""
    if isinstance(window, str):
        return size
    if isinstance(window, float):
        return min(size, max(2, int(window * size + 0.5)))
    return min(size, window)


def _along(value: Any, axis: int) -> Any:
    """The value of a parameter for an axis; None if the parameter's tuple leaves the axis out."""
    if not isinstance(value, tuple):
        return value
    index = axis - len(_AXES) + len(value)
    return value[index] if index >= 0 else None


def _where(name: str, axis: int, *values: Any) -> str:
    """The name of a parameter in messages, with the axis if any of `values` is a tuple."""
    per_axis = any(isinstance(value, tuple) for value in values)
    return f"{name} along {_AXES[axis]}" if per_axis else name


def _up_to(most: int) -> str:
    return f"1 to {most}" if most > 1 else "only 1"


def _check_values(name: str, value: Any, allowed: Allowed) -> None:
    if isinstance(value, tuple) and not 1 <= len(value) <= len(_AXES):
        raise ValueError(
            f"{name} has {len(value)} values, but must have 1 to 3: for frames, height and width"
        )
    for axis in range(3 - len(value) if isinstance(value, tuple) else 2, 3):
        check(_where(name, axis, value), _along(value, axis), allowed)


def _check_tuple_fits(name: str, value: Any, sizes: Sequence[int]) -> None:
    left_out = len(_AXES) - len(value) if isinstance(value, tuple) else 0
    for axis in range(left_out):
        if sizes[axis] > 1:
            raise ValueError(
                f"{name} is {value}, for {' and '.join(_AXES[left_out:])}, but the grid"
                f" {'x'.join(map(str, sizes))} has {sizes[axis]} tokens along {_AXES[axis]}:"
                f" give values for frames, height and width"
            )


def _is_window(value: Any) -> bool:
    if isinstance(value, float):
        return 0 < value <= 1
    return value == "full" if isinstance(value, str) else is_whole(value) and value >= 1


# The allowed values of each parameter along an axis.
_ALLOWED = {
    "window": Allowed(
        "an integer of at least 1, a fraction of the axis above 0.0 and up to 1.0, or 'full'",
        _is_window,
    ),
    "stride": count(1),
    "dilation": count(1),
    "is_causal": FLAG,
}
