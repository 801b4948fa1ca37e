"""Chosen blocks as index lists, a row at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import on_device
from .rows import warps_for


@triton.jit(do_not_specialize=["s_b", "s_h", "s_r", "heads", "rows", "columns", "cap"])
def list_kernel(
    p_chosen, p_count, p_index, s_b, s_h, s_r, s_c, heads, rows, columns, cap,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The chosen columns of a row in ascending order, then zeros."""
    i_r = tl.program_id(0)
    i_h = tl.program_id(1) % heads
    i_b = tl.program_id(1) // heads
    i_list = tl.program_id(1).to(tl.int64) * rows + i_r
    p_chosen += i_b.to(tl.int64) * s_b + i_h.to(tl.int64) * s_h + i_r.to(tl.int64) * s_r
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    b_chosen = tl.load(p_chosen + o_c.to(tl.int64) * s_c, mask=m_c, other=0).to(tl.int32)
    b_slot = tl.cumsum(b_chosen, 0) - b_chosen  # (BLOCK_C,)
    count = tl.sum(b_chosen, 0)
    tl.store(p_count + i_list, count)
    p_index += i_list * cap
    tl.store(p_index + b_slot, o_c, mask=(b_chosen != 0) & (b_slot < cap))
    tl.store(p_index + o_c, tl.zeros_like(o_c), mask=(o_c >= count) & (o_c < cap))


def listed(chosen: torch.Tensor, cap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen columns of each row.

    Args:
        chosen: bool `(batch, heads, rows, columns)`, of any strides; at most `MOST_COLUMNS`.
        cap: the length of a list, at most `columns`.

    Returns:
        int32 `(batch, heads, rows)`, their number; int32 `(batch, heads, rows, cap)`, the first
        `cap` of them in ascending order, and 0 past the end of a list.
    """
    batch, heads, rows, columns = chosen.shape
    count = torch.empty(batch, heads, rows, dtype=torch.int32, device=chosen.device)
    index = torch.empty(batch, heads, rows, cap, dtype=torch.int32, device=chosen.device)
    with on_device(chosen.device):
        list_kernel[(rows, batch * heads)](
            chosen.view(torch.uint8), count, index, *chosen.stride(), heads, rows, columns, cap,
            BLOCK_C=triton.next_power_of_2(columns), num_warps=warps_for(columns),
        )  # fmt: skip
    return count, index
