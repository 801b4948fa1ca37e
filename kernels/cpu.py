"""Block-sparse attention on the CPU: only the visited blocks are computed, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .checks import LayoutTensors, check_inputs, check_layout
from .cpu_tangent import tangent_op
from .operators import differentiable, empty_outputs
from .row_attention import RowAttention, RowBias, pick_row_attention
from .row_plan import RowGroup, RowPlan, cached_row_plan, find_blind

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Rows are split where scores or masks, (heads, rows, keys), would have more elements than this.
_SCORES_PER_CHUNK = 1 << 20
_MIN_ROWS = 16


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of a layout; differentiable, and one operator to `torch.compile`.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)` of one dtype, any strides; the key length may
            differ from the query length.
        full_count, full_index, partial_count, partial_index, partial_mask, bit_masks: the index
            lists of a `BlockLayout`, shared (size 1) or separate per sample and per head. What is
            derived from them is remembered for as long as these very tensors live.
        block_q, block_kv: tokens per query block and per key block.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that nobody sees.

    Returns:
        out: like q; 0 for a query that sees nothing.
        lse: `(batch, heads, tokens_q)`, natural logarithm of the sum of the exponentials of a
            query's scores, -inf for a query that sees nothing; float32, float64 for float64 inputs.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together.
    """
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_device(q=q, k=k, v=v, key_mask=key_mask)
    check_layout(q, layout, block_q, block_kv)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _attend(q, k, v, *layout, key_mask, block_q, block_kv, scale)


def block_sparse_attention_gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention` with respect to q, k and v, outside of autograd.

    Args:
        grad_out: gradient of the output, `(batch, tokens, heads, head_dim)`.
        out, lse: what `block_sparse_attention` returned for the other arguments.
    """
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _backward_op(
        grad_out, None, q, k, v, out, lse, *layout, key_mask, block_q, block_kv, scale
    )


@torch.library.custom_op("diffattn::block_sparse_cpu", mutates_args=(), device_types="cpu")
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    plan = _plan(q, k, layout, block_q, block_kv)
    attention = pick_row_attention(q.dtype)
    out, lse = empty_outputs(q)
    for chunk in _head_chunks(plan, k, v, key_mask):
        queries, out_rows = chunk.of(q), chunk.of(out)
        lse_rows = lse[chunk.sample, chunk.heads]
        for group in chunk.groups:
            if not group.keys:
                _fill(group, out_rows, 0)
                _fill(group, lse_rows, -torch.inf)
                continue
            keys, values = group.gather(chunk.keys_values)
            for part in _parts(chunk, group, attention):
                bias = _bias(plan, chunk, group, part)
                found, found_lse = attention.forward(
                    _read(group, part, queries), keys, values, bias, scale
                )
                _write(group, part, out_rows, found)
                _write(group, part, lse_rows, found_lse)
    return out, lse


@_forward_op.register_fake
def _(
    q: torch.Tensor, *rest: torch.Tensor | int | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q)


@torch.library.custom_op("diffattn::block_sparse_cpu_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    plan = _plan(q, k, layout, block_q, block_kv)
    attention = pick_row_attention(q.dtype)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for chunk in _head_chunks(plan, k, v, key_mask):
        queries, out_rows, grad_rows = chunk.of(q), chunk.of(out), chunk.of(grad_out)
        lse_rows, dq_rows = lse[chunk.sample, chunk.heads], chunk.of(dq)
        grad_lse_rows = None if grad_lse is None else grad_lse[chunk.sample, chunk.heads]
        # Many rows add to a key: in float32 at least, whatever the dtype.
        totals = torch.zeros_like(chunk.keys_values, dtype=lse.dtype)
        for group in chunk.groups:
            if not group.keys:
                _fill(group, dq_rows, 0)
                continue
            keys, values = group.gather(chunk.keys_values)
            for part in _parts(chunk, group, attention):
                grad = (
                    _read(group, part, grad_rows),
                    None if grad_lse_rows is None else _read(group, part, grad_lse_rows),
                )
                part_dq, part_dk, part_dv = attention.backward(
                    grad, _read(group, part, queries), keys, values,
                    _read(group, part, out_rows), _read(group, part, lse_rows),
                    _bias(plan, chunk, group, part), scale,
                )  # fmt: skip
                _write(group, part, dq_rows, part_dq)
                group.scatter_add(totals[0], part_dk)
                group.scatter_add(totals[1], part_dv)
        for x, total in zip((dk, dv), totals, strict=True):
            chunk.of(x).copy_(total.flatten(1, 2)[:, : x.shape[1]])
        del totals, total  # before the next chunk's are made
    return dq, dk, dv


_attend = differentiable(_forward_op, _backward_op, tangent_op)


@dataclass(frozen=True)
class _HeadChunk:
    """Some heads of one sample that share a layout.

    Attributes:
        sample, heads: which.
        groups: what their query rows visit.
        keys_values: `(2, heads, columns, block_kv, head_dim)`, in whole blocks.
        bias: `(columns, block_kv, 1)`, -inf for keys that the key mask hides; None if none.
    """

    sample: int
    heads: slice
    groups: tuple[RowGroup, ...]
    keys_values: torch.Tensor
    bias: torch.Tensor | None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View `(heads, tokens, head_dim)` of these heads in `(batch, tokens, heads, head_dim)`."""
        return x[self.sample, :, self.heads].transpose(0, 1)


def _head_chunks(
    plan: RowPlan, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> Iterator[_HeadChunk]:
    """A head per thread at a time: work for all of them, on a copy small enough for the caches.

    Two for one thread, because oneDNN multiplies batches of one more slowly.
    """
    batch, tokens, heads, head_dim = k.shape
    columns = -(-tokens // plan.block_kv)
    step = 1 if len(plan.groups[0]) > 1 else min(max(2, torch.get_num_threads()), heads)
    # One copy that all chunks use in turn: a new one would be made beside the last one.
    copy = k.new_zeros(2, step, columns * plan.block_kv, head_dim)
    for sample in range(batch):
        hidden = bias = None
        if key_mask is not None and not key_mask[sample].all():
            hidden = ~key_mask[sample]
            bias = torch.zeros(hidden.shape, dtype=k.dtype).masked_fill_(hidden, -torch.inf)
            bias = _in_blocks(bias[:, None], plan.block_kv)
        layouts = plan.groups[sample if len(plan.groups) > 1 else 0]
        for head in range(0, heads, step):
            chosen = slice(head, min(head + step, heads))
            keys_values = copy[:, : chosen.stop - head]
            for x, place in zip((k, v), keys_values, strict=True):
                place[:, :tokens] = x[sample, :, chosen].transpose(0, 1)
            if hidden is not None:
                # Whatever a caller leaves in padding must not become a NaN.
                keys_values[:, :, :tokens].masked_fill_(hidden[:, None], 0)
            yield _HeadChunk(
                sample=sample,
                heads=chosen,
                groups=layouts[head if len(layouts) > 1 else 0],
                keys_values=keys_values.unflatten(2, (columns, plan.block_kv)),
                bias=bias,
            )


def _in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """`(..., tokens, n)` to `(..., columns, block, n)`, 0 past the end."""
    padding = -x.shape[-2] % block
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (-1, block))


def _parts(chunk: _HeadChunk, group: RowGroup, attention: RowAttention) -> Iterator[slice]:
    """A row in parts, where something of the size of its scores would be too large."""
    step = group.queries
    if attention.keeps_scores or group.masks is not None:
        keys = chunk.keys_values.shape[1] * len(group.starts) * group.keys
        step = max(_SCORES_PER_CHUNK // keys, _MIN_ROWS)
    for start in range(0, group.queries, step):
        yield slice(start, min(start + step, group.queries))


def _read(group: RowGroup, part: slice, x: torch.Tensor) -> torch.Tensor:
    """Part of each row of `(heads, tokens, ...)`: `(heads, rows, queries, ...)`."""
    rows = [x[:, start + part.start : start + part.stop] for start in group.starts]
    return rows[0].unsqueeze(1) if len(rows) == 1 else torch.stack(rows, 1)


def _write(group: RowGroup, part: slice, x: torch.Tensor, rows: torch.Tensor) -> None:
    """Write `(heads, rows, queries, ...)` to part of each row of `(heads, tokens, ...)`."""
    for start, row in zip(group.starts, rows.unbind(1), strict=True):
        x[:, start + part.start : start + part.stop] = row


def _fill(group: RowGroup, x: torch.Tensor, value: float) -> None:
    for start in group.starts:
        x[:, start : start + group.queries] = value


def _bias(plan: RowPlan, chunk: _HeadChunk, group: RowGroup, part: slice) -> RowBias | None:
    """What the layout and the key mask hide from part of each row."""
    bias = plan.bias(group, part, chunk.keys_values.dtype)
    if chunk.bias is None:
        return bias
    by_key_mask = group.gather(chunk.bias).transpose(1, 2)
    if bias is None and by_key_mask.amin() == 0:
        return None
    scores = by_key_mask if bias is None else bias.scores + by_key_mask
    return RowBias(scores, find_blind(scores))


def _plan(
    q: torch.Tensor, k: torch.Tensor, layout: LayoutTensors, block_q: int, block_kv: int
) -> RowPlan:
    return cached_row_plan(
        layout, tokens_q=q.shape[1], tokens_kv=k.shape[1], block_q=block_q, block_kv=block_kv
    )


def _check_device(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device.type != "cpu":
            raise ValueError(f"this is the CPU path, but {name} is on {x.device}")
