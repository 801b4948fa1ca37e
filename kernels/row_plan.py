"""What the CPU path does for each query row, as Python lists made once from the index tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .checks import LayoutTensors
from .layout_cache import LayoutCache
from .row_attention import RowBias

# Expanded bit masks are kept when they are small: a static local pattern has a few dozen distinct
# ones, a random token mask may have one per block.
_KEEP_EXPANDED_BYTES = 1 << 26

# Rows are batched up to this many keys: fewer and larger calls, in which threads wait less for each
# other, while the keys and scores of a call still fit the caches.
_KEYS_PER_GROUP = 2048


@dataclass(frozen=True)
class RowGroup:
    """Query rows that are computed together: equally many, each with equally many keys.

    Either one row (neighbours with the same keys are merged to one), or several of one block each.

    Attributes:
        starts: first query token of each row.
        queries: query tokens per row.
        keys: visited keys per row.
        blocks: int64 `(rows * blocks per row,)`, the visited key blocks, ascending in each row.
        run: the visited keys as (start, stop) if there is one row and they have no gap.
        masks: int64, like `blocks`: which of the plan's bit masks each block has, the last one
            where it is full; None when all are.
        may_be_blind: whether there is a row without a full block.
    """

    starts: tuple[int, ...]
    queries: int
    keys: int
    blocks: torch.Tensor
    run: tuple[int, int] | None
    masks: torch.Tensor | None
    may_be_blind: bool

    def gather(self, packed: torch.Tensor) -> torch.Tensor:
        """The visited keys of `(..., columns, block_kv, n)` as `(..., rows, keys, n)`."""
        if self.run is not None:
            return packed.flatten(-3, -2)[..., self.run[0] : self.run[1], :].unsqueeze(-3)
        visited = packed.index_select(-3, self.blocks).flatten(-3, -2)
        return visited.unflatten(-2, (len(self.starts), -1))[..., : self.keys, :]

    def scatter_add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add `(heads, rows, keys, n)` to the visited keys of `(heads, columns, block_kv, n)`."""
        if self.run is not None:
            total.flatten(1, 2)[:, self.run[0] : self.run[1]] += part[:, 0]
            return
        padding = self.blocks.numel() // len(self.starts) * total.shape[2] - self.keys
        if padding:
            part = torch.nn.functional.pad(part, (0, 0, 0, padding))
        part = part.to(total.dtype).reshape(total.shape[0], -1, *total.shape[2:])
        total.index_add_(1, self.blocks, part)


@dataclass(frozen=True)
class RowPlan:
    """All row groups of a layout, and its bit masks.

    Attributes:
        groups: `groups[b][h]` is a tuple of `RowGroup`, for batch|1 and heads|1.
        bit_masks: int32 `(block_q, masks + 1, words)`: those of the layout, and one of all bits.
        block_kv: tokens per key block.
    """

    groups: tuple[tuple[tuple[RowGroup, ...], ...], ...]
    bit_masks: torch.Tensor
    block_kv: int
    _tables: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, repr=False)

    def bias(self, group: RowGroup, part: slice, dtype: torch.dtype) -> RowBias | None:
        """What bit masks hide from some of the queries of each row, by their place in it."""
        if group.masks is None:
            return None
        # Queries come first in the tables, so that one copy puts the blocks of a row side by side.
        table = self._expanded(dtype)
        if table is None:
            words = self.bit_masks[part].index_select(1, group.masks)
            bias = expand_bits(words, self.block_kv, dtype)
        else:
            bias = table[part].index_select(1, group.masks)
        rows = len(group.starts)
        bias = bias.unflatten(1, (rows, -1)).flatten(2)[..., : group.keys].transpose(0, 1)
        return RowBias(bias, find_blind(bias) if group.may_be_blind else None)

    def _expanded(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The bit masks as biases `(block_q, masks + 1, block_kv)`; None if they are too large."""
        entries = self.bit_masks.shape[:2].numel() * self.block_kv
        if entries * dtype.itemsize > _KEEP_EXPANDED_BYTES:
            return None
        if dtype not in self._tables:
            self._tables[dtype] = expand_bits(self.bit_masks, self.block_kv, dtype)
        return self._tables[dtype]


def find_blind(bias: torch.Tensor) -> torch.Tensor | None:
    """Bool `(rows, queries | 1)`, the queries that a bias hides all keys from; None if none is."""
    blind = bias.amax(-1) == -torch.inf
    return blind if blind.any() else None


def expand_bits(words: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Int32 `(..., words)` to `(..., n)`: 0 for a set bit `j % 32` of word `j // 32`, or -inf."""
    bytes_ = words.contiguous().view(torch.uint8).int()  # lowest byte first: x86, ARM and RISC-V
    bits = (torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8)) & 1
    bias = torch.zeros(256, 8, dtype=dtype).masked_fill_(bits == 0, -torch.inf)
    return bias[bytes_].flatten(-2)[..., :n]


def make_row_plan(
    layout: LayoutTensors, *, tokens_q: int, tokens_kv: int, block_q: int, block_kv: int
) -> RowPlan:
    """Turn the index tensors of a `BlockLayout` into a `RowPlan`.

    Raises:
        ValueError: if the layout names a key block or a bit mask that does not exist.
    """
    *lists, bit_masks = layout
    _check_indices(layout, -(-tokens_kv // block_kv))
    batch, heads, _ = layout[0].shape
    every_bit = bit_masks.new_full((1, *bit_masks.shape[1:]), -1)
    return RowPlan(
        groups=tuple(
            tuple(
                tuple(
                    _groups(
                        _rows([x[b, h] for x in lists], tokens_q, block_q),
                        tokens_kv,
                        block_kv,
                        full=bit_masks.shape[0],
                    )
                )
                for h in range(heads)
            )
            for b in range(batch)
        ),
        bit_masks=torch.cat([bit_masks, every_bit]).transpose(0, 1).contiguous(),
        block_kv=block_kv,
    )


@dataclass
class _Row:
    """Queries from start to stop, their key blocks, and the masks of those that are partial."""

    start: int
    stop: int
    blocks: list[int]
    masks: dict[int, int]


def _rows(lists: list[torch.Tensor], tokens_q: int, block_q: int) -> list[_Row]:
    """The rows of one head, neighbours that see the same merged."""
    out: list[_Row] = []
    columns = zip(*(x.tolist() for x in lists), strict=True)
    for i, (n_full, full, n_partial, partial, masks) in enumerate(columns):
        mask_of = dict(zip(partial[:n_partial], masks[:n_partial], strict=True))
        blocks = sorted([*full[:n_full], *mask_of])
        stop = min((i + 1) * block_q, tokens_q)
        if out and out[-1].blocks == blocks and not mask_of and not out[-1].masks:
            out[-1].stop = stop
        else:
            out.append(_Row(i * block_q, stop, blocks, mask_of))
    return out


def _groups(rows: list[_Row], tokens_kv: int, block_kv: int, *, full: int) -> Iterator[RowGroup]:
    """Batch rows of equal shape, so that a call has work for many threads."""
    waiting: dict[tuple[int, int, int, bool], list[_Row]] = {}
    for row in rows:
        ragged = bool(row.blocks) and (row.blocks[-1] + 1) * block_kv > tokens_kv
        keys = len(row.blocks) * block_kv - ragged * (-tokens_kv % block_kv)
        shape = (row.stop - row.start, len(row.blocks), keys, bool(row.masks))
        if _no_gap(row.blocks):
            yield _group([row], keys, tokens_kv, block_kv, full)  # read in place, so on its own
            continue
        batch = waiting.setdefault(shape, [])
        batch.append(row)
        if (len(batch) + 1) * keys > _KEYS_PER_GROUP:
            yield _group(waiting.pop(shape), keys, tokens_kv, block_kv, full)
    for (_, _, keys, _), batch in waiting.items():
        yield _group(batch, keys, tokens_kv, block_kv, full)


def _no_gap(blocks: list[int]) -> bool:
    return not blocks or blocks[-1] - blocks[0] == len(blocks) - 1


def _group(rows: list[_Row], keys: int, tokens_kv: int, block_kv: int, full: int) -> RowGroup:
    run = None
    blocks = rows[0].blocks
    if len(rows) == 1 and blocks and _no_gap(blocks):
        run = (blocks[0] * block_kv, min((blocks[-1] + 1) * block_kv, tokens_kv))
    masks = [row.masks.get(block, full) for row in rows for block in row.blocks]
    return RowGroup(
        starts=tuple(row.start for row in rows),
        queries=rows[0].stop - rows[0].start,
        keys=keys,
        blocks=torch.tensor([block for row in rows for block in row.blocks], dtype=torch.int64),
        run=run,
        masks=torch.tensor(masks, dtype=torch.int64) if rows[0].masks else None,
        may_be_blind=any(len(row.masks) == len(row.blocks) for row in rows),
    )


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


# A plan does not hold its key, full_index, alive: bit_masks is another tensor.
_cache: LayoutCache[RowPlan] = LayoutCache()


def cached_row_plan(
    layout: LayoutTensors, *, tokens_q: int, tokens_kv: int, block_q: int, block_kv: int
) -> RowPlan:
    """`make_row_plan`, remembered as long as the layout's tensors live and are not written to."""
    sizes = (tokens_q, tokens_kv, block_q, block_kv)

    def make() -> RowPlan:
        return make_row_plan(
            layout, tokens_q=tokens_q, tokens_kv=tokens_kv, block_q=block_q, block_kv=block_kv
        )

    return _cache.get(layout, sizes, make)
