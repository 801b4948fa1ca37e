"""Settings of GNA whose blocks are all full: on a grid, and on grids of nearly its size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from diffattn.blocks import BlockLayout
from diffattn.grid import TokenGrid
from diffattn.methods.gna import GNAAttn, nearest_block_sparse
from diffattn.orders import tiles_that_fit
from diffattn.spans import Span

# Grids that are tried, and how much larger or smaller than the given grid they may be, all axes
# together.
_MOST_GRIDS = 8
_MOST_CHANGE = math.log(1.5)


def in_one_of(block: int, spans: Sequence[Span]) -> torch.Tensor:
    """Whether each block of the sequence, in any order, lies in some span: bool `(blocks,)`."""
    tokens = spans[0].grid.tokens
    start = torch.arange(0, tokens, block)
    end = (start + block).clamp(max=tokens)
    videos = [span.grid.video for span in spans]
    return torch.stack([(start >= v.start) & (end <= v.stop) for v in videos]).any(0)


def has_masked_blocks(layout: BlockLayout, spans: Sequence[Span]) -> bool:
    """Whether a block of whole query and key blocks, each of one span alone, is partial."""
    whole = in_one_of(layout.block_q, spans)
    if layout.tokens_q % layout.block_q and bool(whole.any()):
        whole[-1] = False
    slot = torch.arange(layout.partial_index.shape[-1])
    listed = slot < layout.partial_count[0, 0, :, None]
    return bool((listed & whole[:, None] & whole[layout.partial_index[0, 0].long()]).any())


def nearest_on(method: GNAAttn, grid: TokenGrid) -> GNAAttn | None:
    """The nearest setting whose blocks on `grid` are all full, in tiles of any shape."""
    axes = method.axes(grid)
    block_size = method.block_size_on(grid)
    tiles = [
        tile
        for tile in tiles_that_fit(grid, block_size)
        if all(
            side == 1 or (axis.size % side == 0 and axis.dilation == 1 and not axis.is_causal)
            for side, axis in zip(tile, axes, strict=True)
        )
    ]
    candidates = (nearest_block_sparse(method, grid, tile) for tile in tiles)

    def change(candidate: GNAAttn) -> float:
        pairs = zip(axes, candidate.axes(grid), strict=True)
        return sum(abs(a.window - b.window) + abs(a.stride - b.stride) / a.size for a, b in pairs)

    for candidate in sorted(filter(None, candidates), key=change):
        windows = candidate.axes(grid)
        if all(axis.window == axis.size for axis in windows):
            continue
        order = candidate.order(grid)
        layout = candidate.layout(grid, torch.device("cpu"), order)
        if not has_masked_blocks(layout, candidate.spans(grid)):
            return candidate
    return None


def nearest_beside(method: GNAAttn, grid: TokenGrid) -> tuple[TokenGrid, GNAAttn] | None:
    """The nearest setting whose blocks are all full on a grid of nearly the size of `grid`.

    Args:
        method: for `grid`, where no setting but dense attention has full blocks only.
        grid: the tokens.

    Returns:
        The other grid and the setting for that grid; None if no grid near `grid` has one.
    """
    for other in _grids_of_tiles(grid, method.block_size_on(grid)):
        try:
            found = nearest_on(method, other)
        except ValueError:  # the window is longer than an axis
            continue
        if found is not None:
            return other, found
    return None


def _grids_of_tiles(grid: TokenGrid, block_size: int) -> Iterator[TokenGrid]:
    """Grids that consist of whole tiles, the nearest to `grid` first."""
    sizes = (grid.frames, grid.height, grid.width)
    change: dict[tuple[int, ...], float] = {}
    for tile in tiles_that_fit(grid, block_size):
        near = tuple(
            max(1, round(size / side)) * side for size, side in zip(sizes, tile, strict=True)
        )
        change[near] = sum(abs(math.log(a / b)) for a, b in zip(near, sizes, strict=True))
    nearest = sorted((moved, near) for near, moved in change.items() if 0 < moved <= _MOST_CHANGE)
    for _, (frames, height, width) in nearest[:_MOST_GRIDS]:
        yield replace(grid, frames=frames, height=height, width=width, references=())
