"""Selected blocks as the index lists that kernels walk."""

from __future__ import annotations

import torch

from diffattn.blocks import BlockLayout
from diffattn.selected.by_kernels import selection_kernels


def layout_of_blocks(
    chosen: torch.Tensor,
    *,
    tokens_q: int,
    tokens_kv: int,
    block_q: int,
    block_kv: int,
    most: int | None = None,
) -> BlockLayout:
    """The layout in which each query block sees its chosen key blocks whole.

    The lists are made without waiting for the device.

    Args:
        chosen: bool (batch, heads, query blocks, key blocks).
        tokens_q, tokens_kv: sequence lengths.
        block_q, block_kv: tokens per block; only the last block may be short.
        most: the most blocks that a row chooses, if the caller knows that number; lists are as
            long as all key blocks when None.

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
    count, index = index_list(chosen, columns if most is None else most)
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
