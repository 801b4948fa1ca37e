"""Selected blocks as the index lists that kernels walk."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffattn.blocks import BlockLayout, pack_bits
from diffattn.selected.by_kernels import selection_kernels


@dataclass(frozen=True, eq=False)
class Held:
    """The keys that blocks hold, which come first in each block.

    Attributes:
        is_whole: bool (key blocks,), whether a block holds a key at each place.
        short: the number of all other blocks.
        mask: int32 (key blocks,), the number of keys that a block holds, less 1.
        bit_masks: masks as of `BlockLayout`, for query blocks of as many places as key blocks have:
            mask n shows the first n + 1 keys to all queries.
    """

    is_whole: torch.Tensor
    short: int
    mask: torch.Tensor
    bit_masks: torch.Tensor

    @classmethod
    def of(cls, filled: torch.Tensor, block: int) -> Held:
        """Blocks of `block` places, by bool (places,): whether a place holds a key."""
        keys = filled.unflatten(0, (-1, block)).sum(1, dtype=torch.int32)
        is_whole = keys == block
        number = torch.arange(block, device=filled.device)
        first_keys = pack_bits(number <= number[:, None])[:, None]
        masks = first_keys.repeat(1, block, 1)
        return cls(is_whole, int((~is_whole).sum()), keys - 1, masks)

    def to(self, device: torch.device | str) -> Held:
        """The same on a device."""
        is_whole, mask, masks = (x.to(device) for x in (self.is_whole, self.mask, self.bit_masks))
        return Held(is_whole, self.short, mask, masks)


def layout_of_blocks(
    chosen: torch.Tensor,
    *,
    tokens_q: int,
    tokens_kv: int,
    block_q: int,
    block_kv: int,
    most: int | None = None,
    held: Held | None = None,
) -> BlockLayout:
    """The layout in which each query block sees its chosen key blocks whole.

    The lists are made without waiting for the device.

    Args:
        chosen: bool (batch, heads, query blocks, key blocks).
        tokens_q, tokens_kv: sequence lengths.
        block_q, block_kv: tokens per block; only the last block may be short.
        most: the most blocks that a row chooses, if the caller knows that number; lists are as
            long as all key blocks when None.
        held: the keys that key blocks hold, if some hold fewer than they have places; query blocks
            then have as many places as key blocks.

    Raises:
        ValueError: if `chosen` does not have one entry for each pair of blocks.
    """
    batch, heads, rows, columns = chosen.shape
    expected = -(-tokens_q // block_q), -(-tokens_kv // block_kv)
    if (rows, columns) != expected:
        raise ValueError(
            f"{rows} x {columns} pairs of blocks were chosen from, but {tokens_q} x {tokens_kv}"
            f" tokens in blocks of {block_q} x {block_kv} make {expected[0]} x {expected[1]}"
        )
    most = columns if most is None else most
    if held is not None:
        full_count, full_index = index_list(chosen & held.is_whole, most)
        partial_count, partial_index = index_list(chosen & ~held.is_whole, min(most, held.short))
        return BlockLayout(
            tokens_q=tokens_q,
            tokens_kv=tokens_kv,
            block_q=block_q,
            block_kv=block_kv,
            full_count=full_count,
            full_index=full_index,
            partial_count=partial_count,
            partial_index=partial_index,
            partial_mask=held.mask[partial_index],
            bit_masks=held.bit_masks,
        )
    count, index = index_list(chosen, most)
    nothing = index.new_zeros(batch, heads, rows)
    return BlockLayout(
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=block_q,
        block_kv=block_kv,
        full_count=count,
        full_index=index,
        partial_count=nothing,
        partial_index=nothing[..., None],
        partial_mask=nothing[..., None],
        bit_masks=index.new_zeros(0, block_q, -(-block_kv // 32)),
    )


def bytes_of_pair(x: torch.Tensor) -> int:
    """Bytes that scores, choices and lists take in memory at a time, for each pair of blocks.

    Args:
        x: tokens of the call.
    """
    return 24 if selection_kernels(x) is None else 12


def index_list(chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen columns of each row, made without waiting for the device.

    Args:
        chosen: bool (batch, heads, rows, columns).
        most: the most columns that a row chooses.

    Returns:
        int32 (batch, heads, rows), their number; int32 (batch, heads, rows, cap), the columns in
        ascending order, and 0 past the end of a list.
    """
    columns = chosen.shape[-1]
    cap = max(1, min(most, columns))
    kernels = selection_kernels(chosen)
    if kernels is not None and columns <= kernels.MOST_COLUMNS:
        count, index = kernels.listed(chosen, cap)
        return count, index
    slot = chosen.cumsum(-1).sub_(1)
    # Columns that are not chosen go to a place past the end, which is cut off.
    slot.masked_fill_(~chosen, cap)
    if cap < columns:
        slot.clamp_(max=cap)
    column = torch.arange(columns, dtype=torch.int32, device=chosen.device).expand_as(slot)
    index = column.new_zeros(*chosen.shape[:-1], cap + 1).scatter_(-1, slot, column)
    return chosen.sum(-1, dtype=torch.int32), index[..., :cap].contiguous()
