"""NeighbourhoodMask: a window along each axis of the grid, by the rule of GNA (arXiv 2504.16922).

The mask of a grid is the product of one mask per axis. So two boxes of tokens have as many
attending pairs as the product of the pairs along each axis, which tables of single axes give. No
pair of tokens of the grid is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from diffattn.blocks import EMPTY, FULL, PARTIAL, pack_bits, pairs_per_chunk
from diffattn.distinct import distinct_rows
from diffattn.grid import TokenGrid
from diffattn.masks.base import BLOCK, AttentionMask, Blocking, as_words, tokens_of_blocks
from diffattn.masks.block_geometry import boxes_of, outlines_of

_ENTRIES_PER_CHUNK = 1 << 20  # entries of a table over queries that are computed at a time
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class AxisWindow:
    """The token pairs that attend along one axis: the one-dimensional rule of GNA.

    A dilation splits the axis into that many interleaved classes of tokens. Tokens of different
    classes do not attend, and the rule holds within each class. `stride` neighbouring queries form
    a group. A group shares the window of its middle query, or of the right of two middle queries.
    At the ends of the axis windows are moved inwards, not cut. A causal window ends at the query
    itself, and starts where the window of the group's last query starts.

    Attributes:
        size: tokens of the axis.
        window: keys that a query sees; the most that it sees under a causal window.
        stride: queries that share a window, at most `window`.
        dilation: distance between the keys of a window; `window * dilation` is at most `size`.
        is_causal: whether no query sees a key after itself.
    """

    size: int
    window: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def bounds(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first key that each query sees, and the last plus 1, counted within the class."""
        place = query // self.dilation
        length = (self.size - query % self.dilation + self.dilation - 1) // self.dilation
        group = place // self.stride * self.stride
        if self.is_causal:
            leader = torch.minimum(group + self.stride - 1, length - 1)
            return (leader - self.window + 1).clamp(min=0), place + 1
        leader = torch.minimum(group + self.stride // 2, length - 1)
        first = (leader - self.window // 2).clamp(min=0)
        first = torch.minimum(first, length - self.window)
        return first, first + self.window

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether pairs of places along the axis attend; the places broadcast together."""
        first, end = self.bounds(query)
        place = key // self.dilation
        seen = (first <= place) & (place < end)
        if self.dilation > 1:
            seen &= query % self.dilation == key % self.dilation
        return seen

    def pairs(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Number of pairs that attend between ranges of places.

        Args:
            query: int64 `(n, 2)`, the first place of each range of queries, and the last plus 1.
            key: int64 `(m, 2)`, the same for ranges of keys.

        Returns:
            int64 `(n, m)`.
        """
        cuts, which_query = query.unique(return_inverse=True)
        edges, which_key = key.unique(return_inverse=True)
        # Pairs of the queries before each cut and the keys before each edge.
        before = torch.zeros(len(cuts) + 1, len(edges), dtype=torch.int64, device=query.device)
        step = max(1, _ENTRIES_PER_CHUNK // len(edges))
        for start in range(0, self.size, step):
            place = torch.arange(start, min(start + step, self.size), device=query.device)
            passed = torch.searchsorted(cuts, place, right=True)
            before.index_add_(0, passed, self._seen_before(place, edges))
        before = before.cumsum(0)
        in_range = before[which_query[:, 1]] - before[which_query[:, 0]]
        return in_range[:, which_key[:, 1]] - in_range[:, which_key[:, 0]]

    def _seen_before(self, query: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
        """Number of keys before each edge that each query sees, int64 `(queries, edges)`."""
        first, end = (bound[:, None] for bound in self.bounds(query))
        place = self._place_from(edge[None, :], query[:, None] % self.dilation)
        return torch.minimum(torch.maximum(place, first), end) - first

    def _place_from(self, position: torch.Tensor, of_class: torch.Tensor) -> torch.Tensor:
        """Place within a class of the class's first token at or after a position of the axis."""
        return (position - of_class + self.dilation - 1).div(self.dilation, rounding_mode="floor")

    def kinds(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Number pairs of ranges by the masks that they hold.

        Args:
            query, key: int64 `(n, 2)`, as in `pairs`, but with one key range for each query range.

        Returns:
            int64 `(n,)`: pairs of equally long ranges with equal numbers hold equal masks.
        """
        length = int((query[:, 1] - query[:, 0]).max())
        place = query[:, :1] + torch.arange(length, device=query.device)
        exists = place < query[:, 1:]
        place = place.clamp(max=self.size - 1)
        of_class = place % self.dilation
        first, end = self.bounds(place)
        # A query sees every `dilation`-th key from the first to the last one in the range.
        first = torch.maximum(first, self._place_from(key[:, :1], of_class))
        end = torch.minimum(end, self._place_from(key[:, 1:], of_class))
        sees = exists & (first < end)
        from_start = (first * self.dilation + of_class - key[:, :1]).where(sees, -1)
        described = torch.cat([from_start, (end - first).where(sees, 0)], 1)
        return distinct_rows(described)[1]

    def is_block_sparse(self, q_tile: int, kv_tile: int, *, but_for_ends: bool = False) -> bool:
        """Whether each pair of tiles attends everywhere or nowhere. The last tile may be short.

        Args:
            q_tile, kv_tile: neighbouring tokens of the axis in a tile of queries and of keys.
            but_for_ends: whether to leave out queries that see keys of a short tile.
        """
        if self.dilation > 1:
            query, key = self.tiles(q_tile), self.tiles(kv_tile)
            pairs = self.pairs(query, key)
            size = (query[:, 1] - query[:, 0])[:, None] * (key[:, 1] - key[:, 0])
            return bool(((pairs == 0) | (pairs == size)).all())
        place = torch.arange(self.size)
        first, end = self.bounds(place)
        if but_for_ends:
            inside = end <= self.size // kv_tile * kv_tile
            place, first, end = place[inside], first[inside], end[inside]
        whole = (first % kv_tile == 0) & ((end % kv_tile == 0) | (end == self.size))
        same_tile = place[1:] // q_tile == place[:-1] // q_tile
        changes = (first[1:] != first[:-1]) | (end[1:] != end[:-1])
        return bool(whole.all()) and not bool((same_tile & changes).any())

    def tiles(self, side: int) -> torch.Tensor:
        """int64 `(tiles, 2)`: the axis cut into ranges of `side` tokens, for `pairs`."""
        start = torch.arange(0, self.size, side)
        return torch.stack([start, (start + side).clamp(max=self.size)], 1)

    def classes(self) -> tuple[AxisWindow, ...]:
        """The classes of this axis, as axes without dilation, one of each length."""
        lengths = {-(-(self.size - r) // self.dilation) for r in (0, self.dilation - 1)}
        return tuple(
            AxisWindow(length, self.window, self.stride, is_causal=self.is_causal)
            for length in sorted(lengths)
        )


@dataclass(frozen=True, eq=False)
class NeighbourhoodMask(AttentionMask):
    """A video token sees the video tokens within a window along every axis; text never attends.

    Attributes:
        axes: the windows along frames, rows and columns.

    Raises:
        ValueError: if the windows' axes are not as long as the grid's.
    """

    axes: tuple[AxisWindow, AxisWindow, AxisWindow]

    def __post_init__(self) -> None:
        sizes = tuple(axis.size for axis in self.axes)
        if sizes != (self.grid.frames, self.grid.height, self.grid.width):
            raise ValueError(f"the axes have {sizes} tokens, but the grid is {self.grid}")

    def allowed(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = ~self.grid.is_text(query) & ~self.grid.is_text(key)
        places = self.grid.places(query), self.grid.places(key)
        for axis, *pair in zip(self.axes, *places, strict=True):
            if axis.window < axis.size or axis.is_causal:
                seen = seen & axis.allowed(*pair)
        return seen

    @property
    def density(self) -> float:
        whole = [axis.tiles(axis.size) for axis in self.axes]
        pairs = [int(a.pairs(x, x)) for a, x in zip(self.axes, whole, strict=True)]
        return math.prod(pairs) / self.grid.tokens**2

    def block_states(self, blocking: Blocking) -> torch.Tensor:
        block_q, block_kv, device = blocking.block_q, blocking.block_kv, blocking.device
        query = boxes_of(self.grid, block_q, device, blocking.order)
        key = query
        if block_kv != block_q:
            key = boxes_of(self.grid, block_kv, device, blocking.order)
        # Attending pairs of two boxes; where int32 suffices, it takes half the time and memory.
        dtype = torch.int32 if block_q * block_kv < 1 << 31 else torch.int64
        pairs = torch.ones(len(query.block), len(key.block), dtype=dtype, device=device)
        for i, axis in enumerate(self.axes):
            ranges_q, which_q = _ranges(query.first[:, i], query.end[:, i])
            ranges_kv, which_kv = _ranges(key.first[:, i], key.end[:, i])
            pairs *= axis.pairs(ranges_q, ranges_kv).to(dtype)[which_q][:, which_kv]
        rows, columns = -(-self.grid.tokens // block_q), -(-self.grid.tokens // block_kv)
        by_row = torch.zeros(rows, len(key.block), dtype=dtype, device=device)
        by_row.index_add_(0, query.block, pairs)
        by_block = torch.zeros(rows, columns, dtype=dtype, device=device)
        by_block.index_add_(1, key.block, by_row)
        sizes = [
            (self.grid.tokens - torch.arange(n, device=device) * block).clamp(max=block)
            for n, block in ((rows, block_q), (columns, block_kv))
        ]
        states = torch.full((rows, columns), PARTIAL, dtype=torch.uint8, device=device)
        states[by_block == 0] = EMPTY
        states[by_block == sizes[0][:, None] * sizes[1]] = FULL
        return states

    def block_signatures(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        # Three things determine a block's mask: the shape of its queries, the shape of its keys,
        # and the mask of each axis between the ranges of its queries and its keys.
        query = key = outlines_of(self.grid, blocking.block_q, row.device, blocking.order)
        if blocking.block_kv != blocking.block_q:
            key = outlines_of(self.grid, blocking.block_kv, row.device, blocking.order)
        kinds = [query.shape[row], key.shape[column]]
        for i, axis in enumerate(self.axes):
            ranges_q, which_q = _ranges(query.first[:, i], query.end[:, i])
            ranges_kv, which_kv = _ranges(key.first[:, i], key.end[:, i])
            pair = which_q[row] * len(ranges_kv) + which_kv[column]
            pair, which = pair.unique(return_inverse=True)
            ranges = ranges_q[pair // len(ranges_kv)], ranges_kv[pair % len(ranges_kv)]
            kinds.append(axis.kinds(*ranges)[which] if len(pair) else which)
        return _numbered(kinds)

    def block_bits(
        self, row: torch.Tensor, column: torch.Tensor, blocking: Blocking
    ) -> torch.Tensor:
        # A block's mask is the product of a mask along each axis, of which there are few.
        is_query, *query = self._places(row, blocking.block_q, blocking)
        is_key, *key = self._places(column, blocking.block_kv, blocking)
        out = (
            as_words(is_query[0])[is_query[1]][:, :, None]
            & pack_bits(is_key[0])[is_key[1]][:, None]
        )
        step = max(1, pairs_per_chunk(row.device) // (blocking.block_q * blocking.block_kv))
        for axis, at_query, at_key in zip(self.axes, query, key, strict=True):
            if axis.window == axis.size and not axis.is_causal:
                continue
            (queries, which_query), (keys, which_key) = at_query, at_key
            pair, which = (which_query * len(keys) + which_key).unique(return_inverse=True)
            words = []
            for some in pair.split(step):
                q, k = queries[some // len(keys)], keys[some % len(keys)]
                words.append(pack_bits(axis.allowed(q[:, :, None], k[:, None])))
            out &= torch.cat(words)[which]
        return out

    def _places(
        self, block: torch.Tensor, size: int, blocking: Blocking
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """1 for each video token of some blocks, else 0, and its frame, row and column.

        Returns:
            For each of these four the distinct rows, `(m, size)`, and the row of each block, int64
            `(n,)`.
        """
        block, which = block.unique(return_inverse=True)
        token = tokens_of_blocks(self.grid, block, size, blocking)
        is_text = self.grid.is_text(token)
        out = []
        for place in ((~is_text).long(), *self.grid.coordinates(token)):
            place = place.masked_fill(is_text, 0)
            first, row_of = distinct_rows(place)
            out.append((place[first], row_of[which]))
        return out


def block_size_for(grid: TokenGrid) -> int:
    """Tokens per block: 128, or less on small grids.

    A grid gets at least as many blocks as a block has tokens, unless blocks would fall below 16.
    """
    size = BLOCK
    while size > _SMALLEST_BLOCK and size * size > grid.video_tokens:
        size //= 2
    return size


def _ranges(first: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ranges `(n, 2)`, and the index among them of each range."""
    span = int(end.max()) + 1 if len(end) else 1
    number, which = (first * span + end).unique(return_inverse=True)
    return torch.stack([number // span, number % span], 1), which


def _numbered(properties: Sequence[torch.Tensor]) -> torch.Tensor:
    """One number for each combination of several numbers."""
    out = torch.zeros_like(properties[0])
    for values in properties:
        if len(values):
            out = out * (int(values.max()) + 1) + values
    return out
