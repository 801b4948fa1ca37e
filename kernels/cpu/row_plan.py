"""The work of the CPU path for a layout: a list of tiles, made once from the index tensors.

A tile is dense attention of some query rows over some key blocks. The fused attention of torch is
slow for few queries: it multiplies 32 queries at a time where there are less than 192, and 256
where there are 768. Most rows see the same keys as rows near them. So the rows of a group are
computed together over the keys that they share, and each row alone over its other keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

from ..checks import LayoutTensors
from ..layout_cache import LayoutCache
from .row_attention import RowBias

# Bytes up to which expanded bit masks are kept, and patterns made of them. A static local pattern
# has a few dozen distinct bit masks; a random token mask may have one per block.
_KEEP_MASKS_BYTES = 1 << 26
_KEEP_PATTERNS_BYTES = 1 << 24

# Query tokens that share keys: enough for the fused attention to multiply 256 at a time.
_SHARING_QUERIES = 1024
# Shared keys that are worth a tile of their own: a tile more costs a pass more over the output.
_SHARED_KEYS = 512
# Keys of a tile of few queries. Keys are read once for every 32 queries, from a cache if they fit.
_KEYS_PER_TILE = 2048
# Rows that are compared with one another, pair by pair, for keys that they share.
_ROWS_COMPARED = 1024
# Elements of 16 bits in the widest vectors.
_KEYS_PER_VECTOR = 32
# Query tokens whose bit masks are expanded at once.
_MASKED_QUERIES = 512


@dataclass(frozen=True)
class Tile:
    """Query rows of a group and key blocks that all of them visit.

    Attributes:
        start, stop: range of the queries, counted within the group.
        blocks: int64 `(blocks,)`, the key blocks, ascending; none for queries that see nothing.
        keys: number of tokens in the key blocks.
        run: the keys as (start, stop) if there are no masks and no gap, else None.
        pattern: number of the tile's bit masks in the plan's patterns; None where every block is
            full.
        first: whether no earlier tile has these queries.
    """

    start: int
    stop: int
    blocks: torch.Tensor
    keys: int
    run: tuple[int, int] | None
    pattern: int | None
    first: bool


@dataclass(frozen=True)
class Group:
    """Query rows that are computed together, ordered so that the rows of each tile are neighbours.

    Attributes:
        spans: the query tokens, as ranges (start, stop) one after the other.
        tiles: all tiles of these queries.
    """

    spans: tuple[tuple[int, int], ...]
    tiles: tuple[Tile, ...]

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in self.spans]


@dataclass(frozen=True)
class Visit:
    """The keys of a tile that some of its queries see.

    Attributes:
        keys: tokens of the keys: a slice or an ascending int64 `(keys,)`.
        bias: hides each key from the queries that do not see it; None if all queries see all keys.
    """

    keys: slice | torch.Tensor
    bias: RowBias | None


@dataclass(frozen=True)
class _Pattern:
    """An arrangement of bit masks in a tile.

    Attributes:
        masks: int64 `(block rows, blocks)`, numbers of bit masks.
        queries, keys: numbers of queries and keys of the tile.
    """

    masks: torch.Tensor
    queries: int
    keys: int


@dataclass(frozen=True)
class _Expanded:
    """A pattern as a bias, without most of the keys that no query sees.

    Attributes:
        kept: int64 `(keys,)`, places in the tile's blocks of the keys that are kept.
        bias: the bias of these keys, with scores `(1, queries, keys)`.
    """

    kept: torch.Tensor
    bias: RowBias


@dataclass(frozen=True)
class RowPlan:
    """All tiles of a layout, and its bit masks.

    Attributes:
        groups: `groups[b][h]` is the tuple of groups of sample b and head h; one entry each where
            all samples or all heads share a layout.
        patterns: the distinct arrangements of bit masks in the tiles.
        bit_masks: int32 `(masks + 1, block_q, words)`: the layout's, and then one of all bits.
        visible: bool `(masks + 1, block_kv)`, the keys that some query sees by each bit mask.
        tokens: int64 `(columns, block_kv)`, the tokens of each key block.
    """

    groups: tuple[tuple[tuple[Group, ...], ...], ...]
    patterns: tuple[_Pattern, ...]
    bit_masks: torch.Tensor
    visible: torch.Tensor
    tokens: torch.Tensor
    _tables: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, repr=False)
    _expanded: dict[tuple[int, torch.dtype], _Expanded] = field(default_factory=dict, repr=False)

    def visit(self, tile: Tile, key_mask: torch.Tensor | None, dtype: torch.dtype) -> Visit | None:
        """The keys that a tile reads of one sample; None if it sees no key.

        Args:
            tile: one of this plan's.
            key_mask: bool `(tokens_kv,)`, false for keys that no query sees.
            dtype: of the bias.
        """
        if tile.run is not None and (key_mask is None or key_mask[slice(*tile.run)].all()):
            return Visit(slice(*tile.run), None)
        keys = self.tokens.index_select(0, tile.blocks).flatten()
        bias = None
        if tile.pattern is None:
            keys = keys[: tile.keys]
        else:
            expanded = self._expand(tile.pattern, dtype)
            keys, bias = keys[expanded.kept], expanded.bias
        if key_mask is not None:
            seen = key_mask[keys]
            keys = keys[seen]
            if bias is not None and len(keys) < len(seen):
                bias = _bias(bias.scores[..., seen], may_be_blind=True)
        return Visit(keys, bias) if len(keys) else None

    def _expand(self, number: int, dtype: torch.dtype) -> _Expanded:
        found = self._expanded.get((number, dtype))
        if found is not None:
            return found
        pattern = self.patterns[number]
        # All block rows of a pattern see the same keys.
        seen = self.visible.index_select(0, pattern.masks[0]).flatten()[: pattern.keys]
        # Some hidden keys are kept to fill whole vectors: oneDNN is slow at other lengths.
        hidden = (~seen).nonzero().flatten()
        seen[hidden[: -int(seen.sum()) % _KEYS_PER_VECTOR]] = True
        kept = seen.nonzero().flatten()
        block_q = self.bit_masks.shape[1]
        scores = torch.empty(len(pattern.masks) * block_q, len(kept), dtype=dtype)
        for rows, masks in zip(scores.split(block_q), pattern.masks, strict=True):
            rows.copy_(self._mask_keys(masks, kept, dtype).T)
        all_partial = bool((pattern.masks[0] < len(self.bit_masks) - 1).all())
        bias = _bias(scores[None, : pattern.queries], may_be_blind=all_partial)
        expanded = _Expanded(kept, bias)
        held = sum(x.bias.scores.nbytes for x in self._expanded.values())
        if held + bias.scores.nbytes <= _KEEP_PATTERNS_BYTES:
            self._expanded[number, dtype] = expanded
        return expanded

    def _mask_keys(
        self, masks: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The bias `(keys, block_q)` of some keys of the blocks that have these bit masks."""
        table = self._table(dtype)
        if table is None:
            table = _key_rows(self.bit_masks.index_select(0, masks), self.tokens.shape[1], dtype)
            masks = torch.arange(len(masks))
        places = masks[:, None] * self.tokens.shape[1] + self.tokens[0]
        return table.index_select(0, places.flatten()[kept])

    def _table(self, dtype: torch.dtype) -> torch.Tensor | None:
        """All bit masks as `_key_rows`; None if they are too large."""
        entries = self.bit_masks.shape[:2].numel() * self.tokens.shape[1]
        if entries * dtype.itemsize > _KEEP_MASKS_BYTES:
            return None
        if dtype not in self._tables:
            self._tables[dtype] = _key_rows(self.bit_masks, self.tokens.shape[1], dtype)
        return self._tables[dtype]


def _bias(scores: torch.Tensor, *, may_be_blind: bool) -> RowBias:
    """The `RowBias` of scores `(1, queries, keys)`: 0 for visible keys, -inf for hidden ones."""
    if not may_be_blind or not scores.shape[-1]:
        return RowBias(scores, None)
    blind = scores.amax(-1) == -torch.inf
    return RowBias(scores, blind if blind.any() else None)


def _key_rows(bit_masks: torch.Tensor, block_kv: int, dtype: torch.dtype) -> torch.Tensor:
    """Bit masks `(masks, block_q, words)` as biases `(masks * block_kv, block_q)`."""
    return expand_bits(bit_masks, block_kv, dtype).transpose(1, 2).flatten(0, 1)


def expand_bits(words: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Int32 `(..., words)` to `(..., n)`: 0 for a set bit `j % 32` of word `j // 32`, else -inf."""
    bytes_ = words.contiguous().view(torch.uint8).int()  # lowest byte first: x86, ARM and RISC-V
    bits = (torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8)) & 1
    bias = torch.zeros(256, 8, dtype=dtype).masked_fill_(bits == 0, -torch.inf)
    return bias[bytes_].flatten(-2)[..., :n]


def make_row_plan(
    layout: LayoutTensors,
    *,
    tokens_q: int,
    tokens_kv: int,
    block_q: int,
    block_kv: int,
    share: bool,
) -> RowPlan:
    """Turn the index tensors of a `BlockLayout` into a `RowPlan`.

    Args:
        layout: the index tensors.
        tokens_q, tokens_kv: lengths of the sequences.
        block_q, block_kv: tokens per query block and per key block.
        share: whether a query may be in several tiles, so that rows share the tiles of
            the keys that all of them see.

    Raises:
        ValueError: if the layout names a key block or a bit mask that does not exist.
    """
    *lists, bit_masks = layout
    _check_indices(layout, -(-tokens_kv // block_kv))
    batch, heads, _ = layout[0].shape
    every_bit = bit_masks.new_full((1, *bit_masks.shape[1:]), -1)
    bit_masks = torch.cat([bit_masks, every_bit])
    maker = _TileMaker(tokens_q, tokens_kv, block_q, block_kv, share, full=len(bit_masks) - 1)
    visible = _any_query(bit_masks)
    like = torch.unique(visible, dim=0, return_inverse=True)[1].tolist()
    return RowPlan(
        groups=tuple(
            tuple(
                tuple(maker.groups(_rows([x[b, h] for x in lists], like, maker.masked_rows)))
                for h in range(heads)
            )
            for b in range(batch)
        ),
        patterns=tuple(_Pattern(torch.tensor(m), *sizes) for m, *sizes in maker.patterns),
        bit_masks=bit_masks,
        visible=expand_bits(visible, block_kv, torch.float32) == 0,
        tokens=torch.arange(maker.columns * block_kv).unflatten(0, (-1, block_kv)),
    )


def _any_query(bit_masks: torch.Tensor) -> torch.Tensor:
    """Int32 `(masks, words)`: keys that some query sees by bit masks `(masks, block_q, words)`."""
    while bit_masks.shape[1] > 1:
        half = bit_masks.shape[1] // 2
        both = bit_masks[:, :half] | bit_masks[:, half : 2 * half]
        bit_masks = torch.cat([both, bit_masks[:, 2 * half :]], 1)
    return bit_masks[:, 0]


@dataclass
class _Row:
    """Query blocks that see the same keys.

    Attributes:
        numbers: of the query blocks, ascending.
        full: their full key blocks.
        partial: their partial key blocks, and for each the bit mask of every query block.
    """

    numbers: list[int]
    full: set[int]
    partial: dict[int, list[int]]


def _rows(lists: list[torch.Tensor], like: list[int], masked_rows: int) -> list[_Row]:
    """The rows of one head; rows that see the same keys are merged, wherever they are.

    Args:
        lists: counts and indices of full and of partial blocks, and the bit masks of these.
        like: a number for each bit mask, equal for bit masks that show the same keys.
        masked_rows: the most rows with bit masks that are merged.
    """
    latest: dict[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], _Row] = {}
    out: list[_Row] = []
    columns = zip(*(x.tolist() for x in lists), strict=True)
    for number, (n_full, full, n_partial, partial, masks) in enumerate(columns):
        full, mask_of = full[:n_full], dict(zip(partial[:n_partial], masks, strict=False))
        seen = (tuple(sorted(full)), tuple(sorted((b, like[m]) for b, m in mask_of.items())))
        row = latest.get(seen)
        if row is None or (mask_of and len(row.numbers) == masked_rows):
            row = latest[seen] = _Row([], set(full), {block: [] for block in mask_of})
            out.append(row)
        row.numbers.append(number)
        for block, mask in mask_of.items():
            row.partial[block].append(mask)
    return out


@dataclass(frozen=True)
class _Node:
    """Rows that share keys: one row, or the rows of two nodes.

    Attributes:
        rows: all of its rows.
        common: float `(columns,)`, 1 for the key blocks that are full for all rows.
        halves: the two nodes; empty for one row.
    """

    rows: list[_Row]
    common: torch.Tensor
    halves: tuple[_Node, ...] = ()


def _pair_up(nodes: list[_Node], least: int) -> list[_Node]:
    """Join each node with the one it shares most key blocks with, if they are `least` or more."""
    common = torch.stack([node.common for node in nodes])
    overlap = (common @ common.T).fill_diagonal_(-1)
    out: list[_Node] = []
    taken: set[int] = set()
    for i, node in enumerate(nodes):
        if i in taken:
            continue
        most, j = (int(x) for x in overlap[i].max(0))
        if most < least:
            out.append(node)
            continue
        other = nodes[j]
        taken.add(j)
        overlap[:, [i, j]] = -1
        out.append(_Node(node.rows + other.rows, node.common * other.common, (node, other)))
    return out


@dataclass
class _TileMaker:
    """Cuts rows into tiles, and numbers the distinct arrangements of bit masks in them.

    Attributes:
        full: number of the bit mask of a full block.
        patterns: numbers of the arrangements so far, by their masks, queries and keys.
    """

    tokens_q: int
    tokens_kv: int
    block_q: int
    block_kv: int
    share: bool
    full: int
    patterns: dict[tuple[tuple[tuple[int, ...], ...], int, int], int] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        return -(-self.tokens_kv // self.block_kv)

    @property
    def masked_rows(self) -> int:
        return max(1, _MASKED_QUERIES // self.block_q)

    def groups(self, rows: list[_Row]) -> Iterator[Group]:
        nodes = [_Node([row], torch.zeros(self.columns)) for row in rows]
        for node in nodes:
            node.common[list(node.rows[0].full)] = 1
        for start in range(0, len(nodes), _ROWS_COMPARED):
            together = nodes[start : start + _ROWS_COMPARED]
            queries = self.block_q
            while self.share and 2 * queries <= _SHARING_QUERIES:
                together = _pair_up(together, -(-_SHARED_KEYS // self.block_kv))
                queries *= 2
            for node in together:
                numbers = [number for row in node.rows for number in row.numbers]
                yield Group(tuple(self._spans(numbers)), tuple(self._shared(node, 0, first=True)))

    def _shared(self, node: _Node, start: int, *, first: bool) -> Iterator[Tile]:
        """Tiles of the keys that all rows see, then of the other keys of each half, and so on.

        Args:
            start: the place of the node's first query in the group.
            first: whether the queries are in no tile yet.
        """
        if not node.halves:
            yield from self._single(node.rows[0], start, first=first)
            return
        common = set.intersection(*(row.full for row in node.rows))
        if len(common) * self.block_kv >= _SHARED_KEYS:
            numbers = [number for row in node.rows for number in row.numbers]
            for blocks in self._cut(common, len(numbers)):
                yield self._tile(numbers, start, blocks, None, first=first)
                first = False
            for row in node.rows:
                row.full -= common
        for half in node.halves:
            yield from self._shared(half, start, first=first)
            start += sum(self._queries(row.numbers) for row in half.rows)

    def _single(self, row: _Row, start: int, *, first: bool) -> Iterator[Tile]:
        """Tiles of a row's remaining blocks, with full blocks apart where they are many."""
        masked = set(row.partial)
        full = row.full
        if not self.share or len(full) * self.block_kv < _SHARED_KEYS:
            masked, full = (masked | full, set()) if masked else (masked, full)
        for blocks in self._cut(full, len(row.numbers)):
            yield self._tile(row.numbers, start, blocks, None, first=first)
            first = False
        for blocks in self._cut(masked, len(row.numbers)):
            yield self._tile(row.numbers, start, blocks, row.partial, first=first)
            first = False
        if first:
            yield self._tile(row.numbers, start, [], None, first=True)

    def _cut(self, blocks: set[int], rows: int) -> Iterator[list[int]]:
        """Key blocks in ascending order, in equal parts if there are few queries to many keys."""
        ordered = sorted(blocks)
        parts = 1
        if self.share and rows * self.block_q < _SHARING_QUERIES // 2:
            parts = max(1, -(-len(ordered) * self.block_kv // _KEYS_PER_TILE))
        for i in range(parts):
            part = ordered[i * len(ordered) // parts : (i + 1) * len(ordered) // parts]
            if part:
                yield part

    def _tile(
        self,
        numbers: list[int],
        start: int,
        blocks: list[int],
        masks: dict[int, list[int]] | None,
        *,
        first: bool,
    ) -> Tile:
        keys = sum(min(self.block_kv, self.tokens_kv - block * self.block_kv) for block in blocks)
        queries = self._queries(numbers)
        pattern = run = None
        if masks is not None:
            every = [self.full] * len(numbers)
            arranged = tuple(zip(*(masks.get(block, every) for block in blocks), strict=True))
            pattern = self.patterns.setdefault((arranged, queries, keys), len(self.patterns))
        elif blocks and blocks[-1] - blocks[0] == len(blocks) - 1:
            run = (blocks[0] * self.block_kv, blocks[0] * self.block_kv + keys)
        return Tile(
            start=start,
            stop=start + queries,
            blocks=torch.tensor(blocks, dtype=torch.int64),
            keys=keys,
            run=run,
            pattern=pattern,
            first=first,
        )

    def _queries(self, numbers: list[int]) -> int:
        """Number of tokens in some query blocks; the last one may be short."""
        return sum(min(self.block_q, self.tokens_q - number * self.block_q) for number in numbers)

    def _spans(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Query blocks as token ranges; ranges of successive neighbours are joined."""
        start = stop = -1
        for number in numbers:
            if number * self.block_q != stop:
                if stop > start:
                    yield start, stop
                start = number * self.block_q
            stop = min((number + 1) * self.block_q, self.tokens_q)
        yield start, stop


def _check_indices(layout: LayoutTensors, columns: int) -> None:
    full_count, full_index, partial_count, partial_index, partial_mask, bit_masks = layout
    for name, count, index, limit, what in (
        ("full_index", full_count, full_index, columns, "key blocks"),
        ("partial_index", partial_count, partial_index, columns, "key blocks"),
        ("partial_mask", partial_count, partial_mask, bit_masks.shape[0], "bit masks"),
    ):
        used = index[torch.arange(index.shape[-1]) < count[..., None]]
        if not used.numel():
            continue
        lowest, highest = int(used.min()), int(used.max())
        if lowest < 0 or highest >= limit:
            raise ValueError(f"{name} holds {lowest} .. {highest}, but there are {limit} {what}")


def rows_share(dtype: torch.dtype) -> bool:
    """Whether rows of a dtype share tiles.

    Tiles of a query are merged in the output: in 16 bits every merge would round.
    """
    return dtype in (torch.float32, torch.float64)


# A plan must not keep the cache's key, full_index, alive: its bit_masks is another tensor.
_cache: LayoutCache[RowPlan] = LayoutCache()


def cached_row_plan(
    layout: LayoutTensors,
    *,
    tokens_q: int,
    tokens_kv: int,
    block_q: int,
    block_kv: int,
    share: bool,
) -> RowPlan:
    """`make_row_plan`, remembered as long as the layout's tensors live and are not written to."""
    sizes = (tokens_q, tokens_kv, block_q, block_kv, int(share))

    def make() -> RowPlan:
        return make_row_plan(
            layout, tokens_q=tokens_q, tokens_kv=tokens_kv, block_q=block_q, block_kv=block_kv,
            share=share,
        )  # fmt: skip

    return _cache.get(layout, sizes, make)
