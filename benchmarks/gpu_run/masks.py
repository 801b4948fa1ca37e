"""The masks that are measured: 3-D windows over tiles, and over single tokens.

Tokens are in tile order: the tokens of a 4 x 4 x 8 tile (1 x 8 x 16 in a picture) stand together,
and text stands where the model has it. Grids that tiles do not divide have short tiles at their
ends, without padding, and blocks of 128 tokens there straddle two tiles. The order winds through
the tiles like a snake, so that those two tiles are neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffattn import TokenGrid
from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states

BLOCK = 128
ALIGNED, EXACT = "block-aligned", "token-exact"

# (query positions, key positions) broadcast together -> bool, for all heads or for each head
Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mask:
    """A mask that is measured: its blocks for the kernels, its rule to check them against.

    Attributes:
        kind: `ALIGNED` or `EXACT`.
        asked: the density asked for, in visited blocks.
        layout: its blocks.
        rule: which token pairs attend, computed without the layout.
        window: video tokens along each axis that a query sees; None when block-aligned.
    """

    kind: str
    asked: float
    layout: BlockLayout
    rule: Rule
    window: tuple[int, int, int] | None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.asked:g}"


def make_mask(grid: TokenGrid, kind: str, density: float, device: torch.device) -> Mask:
    """A mask over `grid` whose layout visits about the fraction `density` of the blocks.

    The text, if any, sees everything and is seen by everything. At a density of 1 both kinds
    are the full mask.
    """
    if density == 1 or kind == ALIGNED:
        visited = nearest_blocks(grid, density, device)
        layout = layout_from_states(
            torch.where(visited, FULL, EMPTY).to(torch.uint8), None,
            tokens_q=grid.tokens, tokens_kv=grid.tokens, block_q=BLOCK, block_kv=BLOCK,
        )  # fmt: skip
        return Mask(kind, density, layout, lambda q, k: visited[q // BLOCK, k // BLOCK], None)
    window = window_of_density(grid, density, device)
    places = Places.of(grid, window, device)
    return Mask(kind, density, window_layout(grid, places), places.allowed, window)


def attended_pairs(layout: BlockLayout) -> int:
    """Token pairs of one head that attend, under a layout that all heads share."""
    sizes = []
    for tokens, block, blocks in (
        (layout.tokens_q, layout.block_q, layout.rows),
        (layout.tokens_kv, layout.block_kv, layout.columns),
    ):
        size = torch.full((blocks,), block, device=layout.device)
        size[-1] = tokens - (blocks - 1) * block
        sizes.append(size)
    listed = _listed(layout.full_index, layout.full_count)
    keys = (sizes[1][layout.full_index[0, 0].long()] * listed).sum(1)
    pairs = int((keys * sizes[0]).sum())
    if layout.bit_masks.shape[0]:
        listed = _listed(layout.partial_index, layout.partial_count)
        used = layout.partial_mask[0, 0][listed].long().bincount(minlength=len(layout.bit_masks))
        pairs += int((used * _ones(layout.bit_masks)).sum())
    return pairs


def _listed(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return torch.arange(index.shape[-1], device=index.device) < count[0, 0, :, None]


def _ones(bit_masks: torch.Tensor) -> torch.Tensor:
    """Set bits of each mask."""
    byte = torch.arange(256, device=bit_masks.device)
    ones_of_byte = torch.stack([(byte >> bit) & 1 for bit in range(8)]).sum(0)
    return ones_of_byte[bit_masks.view(torch.uint8).flatten(1).long()].sum(1)


def tile_order(grid: TokenGrid, device: torch.device) -> torch.Tensor:
    """Which token of the model's order stands at each place of the tile order, int64 `(tokens,)`.

    Text stays where it is.
    """
    tile = (1, 8, 16) if grid.frames == 1 else (4, 4, 8)
    place = torch.arange(grid.video_tokens, device=device)
    frame, row, column = grid.coordinates(place + grid.text_before)
    tiles_down, tiles_across = -(-grid.height // tile[1]), -(-grid.width // tile[2])
    deep, down, across = frame // tile[0], row // tile[1], column // tile[2]
    down = torch.where(deep % 2 == 0, down, tiles_down - 1 - down)
    strip = deep * tiles_down + down
    forwards = strip % 2 == 0
    across = torch.where(forwards, across, tiles_across - 1 - across)
    # Inside a tile, too, the order follows the strip: one slice across it after the other.
    slice_ = torch.where(forwards, column, grid.width - 1 - column)
    key = ((strip * tiles_across + across) * grid.width + slice_) * grid.video_tokens + place
    order = key.argsort() + grid.text_before
    text = torch.arange(grid.tokens, device=device)
    return torch.cat([text[: grid.text_before], order, text[grid.video.stop :]])


def _coordinates(grid: TokenGrid, device: torch.device) -> torch.Tensor:
    """(frame, row, column) of every place of the tile order, int64 `(tokens, 3)`; -1 for text."""
    order = tile_order(grid, device)
    places = torch.stack(grid.coordinates(order), -1)
    return places.masked_fill(grid.is_text(order)[:, None], -1)


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    """`(tokens, n)` to `(blocks, BLOCK, n)`; the last token is repeated to fill the last block."""
    padding = -len(x) % BLOCK
    return torch.cat([x, x[-1:].expand(padding, -1)]).view(-1, BLOCK, x.shape[1])


def nearest_blocks(grid: TokenGrid, density: float, device: torch.device) -> torch.Tensor:
    """Bool `(blocks, blocks)`: each block sees as many of the nearest ones as the density allows.

    The distance of two blocks is the largest of the three distances between their middles, each as
    a fraction of its axis. So a block sees a window of tiles, pushed inwards at the borders.
    """
    coordinates = _in_blocks(_coordinates(grid, device))
    text = (coordinates < 0).any(-1).any(-1)
    n, with_text = len(text), int(text.sum())
    rows = n - with_text
    each, more = divmod(round(density * n * n) - with_text * n, max(1, rows))
    if each - with_text < 1:
        raise ValueError(
            f"a density of {density} leaves no block for the {rows} blocks of video of {grid}"
        )
    axes = torch.tensor((grid.frames, grid.height, grid.width), device=device)
    middle = coordinates.double().mean(1) / axes
    distance = (middle[:, None] - middle[None]).abs().amax(-1).masked_fill(text, torch.inf)
    rank = distance.argsort(dim=1, stable=True).argsort(dim=1)
    # The remainder of the division goes to rows spread over the sequence, one block each.
    row = (~text).cumsum(0)
    extra = row * more // rows - (row - 1) * more // rows
    return (rank < (each - with_text + extra)[:, None]) | text | text[:, None]


@dataclass(frozen=True)
class Places:
    """Coordinates of the tokens in tile order, and where the windows of their queries begin.

    Attributes:
        at: `(tokens, 3)`, frame, row and column; -1 for text.
        first: `(tokens, 3)`, the first frame, row and column that the query sees.
        window: tokens that a query sees along each axis.
    """

    at: torch.Tensor
    first: torch.Tensor
    window: torch.Tensor

    @staticmethod
    def of(grid: TokenGrid, window: tuple[int, int, int], device: torch.device) -> Places:
        axes = torch.tensor((grid.frames, grid.height, grid.width), device=device)
        size = torch.tensor(window, device=device)
        at = _coordinates(grid, device)
        first = (at - size // 2).clamp(min=0).minimum(axes - size)
        return Places(at, first, size)

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether the query's window, pushed inwards at the borders, holds the key; bool."""
        inside = torch.ones((), dtype=torch.bool, device=query.device)
        for axis in range(3):
            step = self.at[key, axis] - self.first[query, axis]
            inside = inside & (step >= 0) & (step < self.window[axis])
        return inside | (self.at[query, 0] < 0) | (self.at[key, 0] < 0)


def window_layout(grid: TokenGrid, places: Places) -> BlockLayout:
    """The blocks of windows over single tokens; only distinct bit masks are computed."""

    def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(BLOCK, device=row.device)
        query = (row[:, None] * BLOCK + inside).clamp(max=grid.tokens - 1)
        key = (column[:, None] * BLOCK + inside).clamp(max=grid.tokens - 1)
        return places.allowed(query[:, :, None], key[:, None])

    first, at = _in_blocks(places.first), _in_blocks(places.at)
    text = at[..., :1] < 0
    first_kind, first_from = _shape_of_block(first, text)
    at_kind, at_from = _shape_of_block(at, text)

    def signatures(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        # Pairs of blocks have equal masks if tokens lie alike within the blocks, and as far apart.
        apart = at_from[column] - first_from[row] + 2**15
        key = first_kind[row] * len(at_kind) + at_kind[column]
        for axis in range(3):
            _, key = key.unique(return_inverse=True)
            key = key * 2**16 + apart[:, axis]
        return key

    return layout_from_states(
        window_states(grid, places), bits,
        tokens_q=grid.tokens, tokens_kv=grid.tokens, block_q=BLOCK, block_kv=BLOCK,
        signatures=signatures,
    )  # fmt: skip


def _shape_of_block(x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A number for each block `(blocks, BLOCK, 3)`, equal but for a shift, and its shift."""
    start = x.masked_fill(text, 2**15).amin(1)
    alike = (x - start[:, None]).masked_fill(text, -1).flatten(1)
    return alike.unique(dim=0, return_inverse=True)[1], start


def window_states(grid: TokenGrid, places: Places) -> torch.Tensor:
    """uint8 `(blocks, blocks)`: partial where bounding boxes do not decide."""
    at, first = _in_blocks(places.at), _in_blocks(places.first)
    text = at[..., 0] < 0
    low, high = _bounds(at, text)
    first_low, first_high = _bounds(first, text)
    within = torch.ones(len(at), len(at), dtype=torch.bool, device=at.device)
    for axis in range(3):
        within &= low[:, axis] >= first_high[:, None, axis]
        within &= high[:, axis] < (first_low + places.window)[:, None, axis]
    states = torch.where(_touched(places), PARTIAL, EMPTY).to(torch.uint8)
    states[within] = FULL
    some_text, all_text = text.any(1), text.all(1)
    states[some_text] = states[some_text].clamp(max=PARTIAL)
    states[:, some_text] = states[:, some_text].clamp(max=PARTIAL)
    states[all_text] = FULL
    states[:, all_text] = FULL
    return states


def _touched(places: Places) -> torch.Tensor:
    """Bool `(blocks, blocks)`: where a pair may attend, judged by boxes around 16 tokens each."""
    at, first = (_in_blocks(x).view(-1, 16, 3) for x in (places.at, places.first))
    text = at[..., 0] < 0
    low, high = _bounds(at, text)
    first_low, first_high = _bounds(first, text)
    some_text = text.any(1)
    touched = torch.ones(len(at), len(at), dtype=torch.bool, device=at.device)
    for axis in range(3):
        touched &= low[:, axis] < (first_high + places.window)[:, None, axis]
        touched &= high[:, axis] >= first_low[:, None, axis]
    touched |= some_text | some_text[:, None]
    parts = BLOCK // 16
    return touched.view(-1, parts, len(at) // parts, parts).any(3).any(1)


def _bounds(x: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest coordinates `(blocks, 3)` of the video tokens of each block."""
    text = text[..., None]
    return x.masked_fill(text, 2**15).amin(1), x.masked_fill(text, -(2**15)).amax(1)


def window_of_density(
    grid: TokenGrid, density: float, device: torch.device
) -> tuple[int, int, int]:
    """The window under which the fraction of visited blocks is nearest to `density`.

    Only windows of about the same fraction of every axis are tried. A block is visited if any token
    pair in it attends.
    """
    axes = (grid.frames, grid.height, grid.width)

    def visited(window: tuple[int, int, int]) -> float:
        return float(_touched(Places.of(grid, window, device)).double().mean())

    def scaled(side: float) -> tuple[int, int, int]:
        frames, height, width = (max(1, min(n, round(n * side))) for n in axes)
        return frames, height, width

    low, high = 0.0, 1.0
    for _ in range(8):
        side = (low + high) / 2
        low, high = (side, high) if visited(scaled(side)) < density else (low, side)
    # A token more or less along some axes, to come closer.
    around = [
        {max(1, min(n, size + step)) for step in (-1, 0, 1)}
        for size, n in zip(scaled(high), axes, strict=True)
    ]
    windows = sorted(itertools.product(*around))
    return min(windows, key=lambda window: abs(visited(window) - density))
