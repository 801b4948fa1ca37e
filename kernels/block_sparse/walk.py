"""Orders and lists that kernels need beside a layout, computed without waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import LayoutTensors
from ..layout_cache import LayoutCache


@dataclass(frozen=True)
class Rows:
    """A layout in the order in which kernels walk it, query row by query row.

    Attributes:
        order: int32 `(layouts, rows)`, rows with the longest lists first, so that no long row is
            left for the end.
        full_index: int32, the list of full blocks with a short block moved to the end of its row's
            list; None where no block is short: the layout's own list serves.
    """

    order: torch.Tensor
    full_index: torch.Tensor | None


@dataclass(frozen=True)
class Columns:
    """A layout read by key blocks instead of query rows: compressed lists per column.

    Layouts of samples and heads are numbered one after another: `layouts` of them.

    Attributes:
        order: int32 `(layouts, columns)`, columns with the longest lists first.
        full_start: int32 `(layouts, columns + 1)`, where each column's list begins in `full_row`.
        full_row: int32 `(layouts, rows * cap)`, the query rows that visit a column, ascending.
        partial_start, partial_row: the same for partial blocks.
        partial_mask: int32 like `partial_row`, the bit mask of each block.
    """

    order: torch.Tensor
    full_start: torch.Tensor
    full_row: torch.Tensor
    partial_start: torch.Tensor
    partial_row: torch.Tensor
    partial_mask: torch.Tensor


def walk_rows(layout: LayoutTensors, tokens_kv: int, block_kv: int) -> Rows:
    """Read a layout by query rows.

    A list may be in any order, but kernels mask a short block at the end of a list only.
    """
    full_count, full_index, partial_count, *_ = layout
    order = _longest_first((full_count + partial_count).flatten(0, 1))
    if tokens_kv % block_kv == 0:
        return Rows(order, None)
    used = torch.arange(full_index.shape[-1], device=full_index.device) < full_count[..., None]
    late = torch.where(used, (full_index == tokens_kv // block_kv).int(), 2)
    place = late.sort(dim=-1, stable=True).indices
    return Rows(order, full_index.gather(-1, place))


def transpose(layout: LayoutTensors, columns: int) -> Columns:
    """Read a layout by key blocks.

    Sizes are upper bounds from shapes: no count is fetched from the device.

    Args:
        columns: number of key blocks.
    """
    full_count, full_index, partial_count, partial_index, partial_mask, _ = layout
    full_start, full_row, _ = _by_column(full_count, full_index, columns)
    partial_start, partial_row, place = _by_column(partial_count, partial_index, columns)
    return Columns(
        order=_longest_first(full_start.diff() + partial_start.diff()),
        full_start=full_start,
        full_row=full_row,
        partial_start=partial_start,
        partial_row=partial_row,
        partial_mask=partial_mask.flatten(0, 1).flatten(1).gather(1, place),
    )


def _longest_first(length: torch.Tensor) -> torch.Tensor:
    return length.sort(dim=-1, descending=True, stable=True).indices.int()


def _by_column(
    count: torch.Tensor, index: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start of each column's list, the rows in the lists, each row's place in the flat index."""
    cap = index.shape[-1]
    used = torch.arange(cap, device=index.device) < count.flatten(0, 1)[..., None]
    # Unused entries go behind the last column. A stable sort leaves rows ascending.
    column = index.flatten(0, 1).masked_fill(~used, columns).flatten(1)
    sorted_column, place = column.sort(dim=-1, stable=True)
    wanted = torch.arange(columns + 1, dtype=torch.int32, device=index.device)
    start = torch.searchsorted(sorted_column, wanted.repeat(len(column), 1), out_int32=True)
    return start, place.div(max(cap, 1), rounding_mode="floor").int(), place


_rows: LayoutCache[Rows] = LayoutCache()
_transposes: LayoutCache[Columns] = LayoutCache()


def cached_rows(layout: LayoutTensors, tokens_kv: int, block_kv: int) -> Rows:
    """`walk_rows`, remembered as long as the layout's tensors live and are not written to."""
    if _in_capture(layout):
        return walk_rows(layout, tokens_kv, block_kv)
    sizes = (tokens_kv, block_kv)
    return _rows.get(layout, sizes, lambda: walk_rows(layout, tokens_kv, block_kv))


def cached_transpose(layout: LayoutTensors, columns: int) -> Columns:
    """`transpose`, remembered as long as the layout's tensors live and are not written to."""
    if _in_capture(layout):
        return transpose(layout, columns)
    return _transposes.get(layout, (columns,), lambda: transpose(layout, columns))


def _in_capture(layout: LayoutTensors) -> bool:
    # Tensors of a CUDA graph have values only after the graph is replayed: no other call may get
    # them from a cache.
    return layout[0].is_cuda and torch.cuda.is_current_stream_capturing()
