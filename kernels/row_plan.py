"""What the CPU path does for each query row, as Python lists made once from the index tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

# Expanded bit masks are kept when they are small: a static local pattern has a few dozen distinct
# ones, a random token mask may have one per block.
_KEEP_EXPANDED_BYTES = 1 << 26

LayoutTensors = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]


@dataclass(frozen=True)
class RowGroup:
    """Neighbouring query rows that visit the same key blocks.

    Attributes:
        start, stop: the query tokens.
        blocks: int64 `(blocks,)`, the visited key blocks, ascending.
        runs: visited keys as (start, stop), neighbouring blocks merged, clipped to the sequence.
        keys: number of visited keys.
        partial: int64 `(2, partial)`, position in `blocks` and row of the bit masks of each partial
            block; None when there are none. A group with partial blocks is a single row.
    """

    start: int
    stop: int
    blocks: torch.Tensor
    runs: tuple[tuple[int, int], ...]
    keys: int
    partial: torch.Tensor | None

    def gather(self, packed: torch.Tensor) -> torch.Tensor:
        """The visited keys of `(heads, columns, block_kv, head_dim)`: `(heads, keys, head_dim)`."""
        if len(self.runs) == 1:
            start, stop = self.runs[0]
            return packed.flatten(1, 2)[:, start:stop]
        return packed.index_select(1, self.blocks).flatten(1, 2)[:, : self.keys]

    def scatter_add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add `part` `(heads, keys, head_dim)` to the visited keys of `(heads, tokens, ...)`."""
        done = 0
        for start, stop in self.runs:
            total[:, start:stop].add_(part[:, done : done + stop - start])
            done += stop - start


@dataclass(frozen=True)
class RowPlan:
    """All row groups of a layout, and its bit masks.

    Attributes:
        groups: `groups[b][h]` is a tuple of `RowGroup`, for batch|1 and heads|1.
        bit_masks: int32 `(masks, block_q, words)` as in the layout.
        block_kv: tokens per key block.
    """

    groups: tuple[tuple[tuple[RowGroup, ...], ...], ...]
    bit_masks: torch.Tensor
    block_kv: int
    _expanded: list[torch.Tensor] = field(default_factory=list, repr=False)

    def hidden(self, group: RowGroup, start: int, stop: int) -> torch.Tensor | None:
        """Bool `(stop - start, group.keys)`, true where a key is hidden; None if all are seen."""
        if group.partial is None:
            return None
        position, mask = group.partial
        rows = slice(start - group.start, stop - group.start)
        out = torch.zeros(stop - start, group.blocks.numel(), self.block_kv, dtype=torch.bool)
        out.index_copy_(1, position, self._hidden_in_blocks(mask, rows).transpose(0, 1))
        return out.flatten(1)[:, : group.keys]

    def _hidden_in_blocks(self, mask: torch.Tensor, rows: slice) -> torch.Tensor:
        if self.bit_masks.shape[:2].numel() * self.block_kv > _KEEP_EXPANDED_BYTES:
            return ~expand_bits(self.bit_masks[mask, rows], self.block_kv)
        if not self._expanded:
            self._expanded.append(~expand_bits(self.bit_masks, self.block_kv))
        return self._expanded[0][mask, rows]


def expand_bits(words: torch.Tensor, n: int) -> torch.Tensor:
    """Int32 `(..., words)` to bool `(..., n)`: bit `j % 32` of word `j // 32` becomes entry `j`."""
    bytes_ = words.contiguous().view(torch.uint8).int()  # lowest byte first: x86, ARM and RISC-V
    bits = (torch.arange(256, dtype=torch.int32)[:, None] >> torch.arange(8)) & 1
    return bits.bool()[bytes_].flatten(-2)[..., :n]


def make_row_plan(
    layout: LayoutTensors, *, tokens_q: int, tokens_kv: int, block_q: int, block_kv: int
) -> RowPlan:
    """Turn the index tensors of a `BlockLayout` into a `RowPlan`.

    Raises:
        ValueError: if the layout names a key block or a bit mask that does not exist.
    """
    full_count, full_index, partial_count, partial_index, partial_mask, bit_masks = layout
    _check_indices(layout, -(-tokens_kv // block_kv))

    def groups(b: int, h: int) -> Iterator[RowGroup]:
        pending: tuple[int, int, list[int]] | None = None  # start, stop, blocks
        rows = zip(
            full_count[b, h].tolist(), full_index[b, h].tolist(),
            partial_count[b, h].tolist(), partial_index[b, h].tolist(),
            partial_mask[b, h].tolist(),
            strict=True,
        )  # fmt: skip
        for row, (n_full, full, n_partial, partial, masks) in enumerate(rows):
            start, stop = row * block_q, min((row + 1) * block_q, tokens_q)
            blocks = full[:n_full]
            if pending and (n_partial or blocks != pending[2]):
                yield _group(*pending, {}, tokens_kv, block_kv)
                pending = None
            if n_partial:
                mask_of = dict(zip(partial[:n_partial], masks[:n_partial], strict=True))
                yield _group(start, stop, sorted([*blocks, *mask_of]), mask_of, tokens_kv, block_kv)
            else:
                pending = (pending[0] if pending else start, stop, blocks)
        if pending:
            yield _group(*pending, {}, tokens_kv, block_kv)

    batch, heads, _ = full_count.shape
    return RowPlan(
        groups=tuple(tuple(tuple(groups(b, h)) for h in range(heads)) for b in range(batch)),
        bit_masks=bit_masks,
        block_kv=block_kv,
    )


def _group(
    start: int, stop: int, blocks: list[int], mask_of: dict[int, int], tokens_kv: int, block_kv: int
) -> RowGroup:
    runs: list[tuple[int, int]] = []
    for block in blocks:
        first, last = block * block_kv, min((block + 1) * block_kv, tokens_kv)
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    partial = [(i, mask_of[block]) for i, block in enumerate(blocks) if block in mask_of]
    return RowGroup(
        start=start,
        stop=stop,
        blocks=torch.tensor(blocks, dtype=torch.int64),
        runs=tuple(runs),
        keys=sum(last - first for first, last in runs),
        partial=torch.tensor(partial, dtype=torch.int64).T if partial else None,
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


@dataclass(frozen=True)
class _CacheEntry:
    tensors: tuple[WeakIdRef, ...]
    versions: tuple[int, ...]
    sizes: tuple[int, ...]
    plan: RowPlan


_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cached_row_plan(
    layout: LayoutTensors, *, tokens_q: int, tokens_kv: int, block_q: int, block_kv: int
) -> RowPlan:
    """`make_row_plan`, remembered as long as the layout's tensors live and are not written to."""
    sizes = (tokens_q, tokens_kv, block_q, block_kv)
    # Inference tensors count no versions: they are taken to be constant.
    versions = tuple(0 if t.is_inference() else t._version for t in layout)
    entry = _cache.get(layout[1])
    if (
        entry is not None
        and entry.sizes == sizes
        and entry.versions == versions
        and all(ref() is t for ref, t in zip(entry.tensors, layout, strict=True))
    ):
        return entry.plan
    plan = make_row_plan(
        layout, tokens_q=tokens_q, tokens_kv=tokens_kv, block_q=block_q, block_kv=block_kv
    )
    # The plan must not hold the key itself alive; bit_masks is another tensor.
    _cache[layout[1]] = _CacheEntry(tuple(WeakIdRef(t) for t in layout), versions, sizes, plan)
    return plan
