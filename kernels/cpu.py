"""Block-sparse attention on the CPU: only the visited blocks are computed, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .row_attention import RowAttention, pick_row_attention
from .row_plan import LayoutTensors, RowGroup, RowPlan, cached_row_plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Keys and values are packed for this many heads at a time: enough work for every thread in a call
# for one row of blocks, and a bounded copy.
_HEADS_PER_CHUNK = 4
# Rows are split where scores or masks, (heads, rows, keys), would have more elements than this.
_SCORES_PER_CHUNK = 1 << 20
_MIN_ROWS = 16

LAYOUT_NAMES = (
    "full_count",
    "full_index",
    "partial_count",
    "partial_index",
    "partial_mask",
    "bit_masks",
)


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
    _check_inputs(q, k, v, key_mask)
    _check_layout(q, k, layout, block_q, block_kv)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _forward_op(q, k, v, *layout, key_mask, block_q, block_kv, scale)


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
    out, lse = _empty_outputs(q)
    for chunk in _head_chunks(plan, k, v, key_mask):
        queries, out_rows = chunk.of(q), chunk.of(out)
        lse_rows = lse[chunk.sample, chunk.heads]
        for group in chunk.groups:
            if not group.keys:
                out_rows[:, group.start : group.stop] = 0
                lse_rows[:, group.start : group.stop] = -torch.inf
                continue
            keys, values = group.gather(chunk.keys), group.gather(chunk.values)
            for rows in _row_chunks(chunk, group, attention):
                hidden = _hidden(plan, chunk, group, rows)
                part, part_lse = attention.forward(queries[:, rows], keys, values, hidden, scale)
                out_rows[:, rows] = part
                lse_rows[:, rows] = part_lse
    return out, lse


@_forward_op.register_fake
def _(
    q: torch.Tensor, *rest: torch.Tensor | int | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_outputs(q)


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
    dq, dk, dv = _empty_gradients(q, k, v)
    for chunk in _head_chunks(plan, k, v, key_mask):
        queries, out_rows, grad_rows = chunk.of(q), chunk.of(out), chunk.of(grad_out)
        lse_rows = lse[chunk.sample, chunk.heads]
        dq_rows = chunk.of(dq)
        # Many rows add to a key: in float32 at least, whatever the dtype.
        total_dk, total_dv = (
            torch.zeros(x.shape, dtype=lse.dtype) for x in (chunk.of(dk), chunk.of(dv))
        )
        for group in chunk.groups:
            if not group.keys:
                dq_rows[:, group.start : group.stop] = 0
                continue
            keys, values = group.gather(chunk.keys), group.gather(chunk.values)
            for rows in _row_chunks(chunk, group, attention):
                grad = (
                    grad_rows[:, rows],
                    None if grad_lse is None else grad_lse[chunk.sample, chunk.heads, rows],
                )
                part_dq, part_dk, part_dv = attention.backward(
                    grad, queries[:, rows], keys, values, out_rows[:, rows], lse_rows[:, rows],
                    _hidden(plan, chunk, group, rows), scale,
                )  # fmt: skip
                dq_rows[:, rows] = part_dq
                group.scatter_add(total_dk, part_dk)
                group.scatter_add(total_dv, part_dv)
        chunk.of(dk).copy_(total_dk)
        chunk.of(dv).copy_(total_dv)
    return dq, dk, dv


@_backward_op.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: torch.Tensor | int | float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, key_mask, block_q, block_kv, scale = inputs
    ctx.save_for_backward(*tensors, key_mask, *output)
    ctx.options = block_q, block_kv, scale
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, *layout, key_mask, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _backward_op(grad_out, grad_lse, q, k, v, out, lse, *layout, key_mask, *ctx.options)
    return (*grads, *[None] * 10)


_forward_op.register_autograd(_autograd, setup_context=_setup_context)


def _empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=lse_dtype)


def _empty_gradients(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in tensors)
    return dq, dk, dv


@dataclass(frozen=True)
class _HeadChunk:
    """Some heads of one sample that share a layout.

    Attributes:
        sample, heads: which.
        groups: what their query rows visit.
        keys, values: `(heads, columns, block_kv, head_dim)`, whole blocks, contiguous.
        hidden: bool `(1, columns, block_kv, 1)`, true for keys hidden by the key mask, or None.
    """

    sample: int
    heads: slice
    groups: tuple[RowGroup, ...]
    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View `(heads, tokens, head_dim)` of these heads in `(batch, tokens, heads, head_dim)`."""
        return x[self.sample, :, self.heads].transpose(0, 1)


def _head_chunks(
    plan: RowPlan, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> Iterator[_HeadChunk]:
    batch, _, heads, _ = k.shape
    for sample in range(batch):
        hidden = None
        if key_mask is not None and not key_mask[sample].all():
            hidden = _pack(~key_mask[sample][:, None, None], plan.block_kv, None)
        layouts = plan.groups[sample if len(plan.groups) > 1 else 0]
        step = 1 if len(layouts) > 1 else _HEADS_PER_CHUNK
        for head in range(0, heads, step):
            chosen = slice(head, min(head + step, heads))
            yield _HeadChunk(
                sample=sample,
                heads=chosen,
                groups=layouts[head if len(layouts) > 1 else 0],
                keys=_pack(k[sample, :, chosen], plan.block_kv, hidden),
                values=_pack(v[sample, :, chosen], plan.block_kv, hidden),
                hidden=hidden,
            )


def _pack(x: torch.Tensor, block: int, hidden: torch.Tensor | None) -> torch.Tensor:
    """`(tokens, heads, n)` to contiguous `(heads, columns, block, n)`, 0 past the end.

    Hidden keys become 0 too, so that whatever a caller leaves in padding cannot become a NaN.
    """
    tokens, heads, n = x.shape
    columns = -(-tokens // block)
    out = x.new_empty(heads, columns * block, n)
    out[:, :tokens] = x.transpose(0, 1)
    out[:, tokens:] = 0
    out = out.unflatten(1, (columns, block))
    return out if hidden is None else out.masked_fill_(hidden, 0)


def _row_chunks(chunk: _HeadChunk, group: RowGroup, attention: RowAttention) -> Iterator[slice]:
    """The rows of a group, split where something of size heads x rows x keys would be too large."""
    step = group.stop - group.start
    if attention.keeps_scores:
        step = _SCORES_PER_CHUNK // (chunk.keys.shape[0] * group.keys)
    elif group.partial is not None:
        step = _SCORES_PER_CHUNK // group.keys
    step = max(step, _MIN_ROWS)
    for start in range(group.start, group.stop, step):
        yield slice(start, min(start + step, group.stop))


def _hidden(plan: RowPlan, chunk: _HeadChunk, group: RowGroup, rows: slice) -> torch.Tensor | None:
    """Bool `(rows | 1, keys)`, true where a key is not seen; None when all of them are."""
    hidden = plan.hidden(group, rows.start, rows.stop)
    if chunk.hidden is None:
        return hidden
    by_key_mask = group.gather(chunk.hidden)[..., 0]
    if hidden is not None:
        return hidden | by_key_mask
    return by_key_mask if by_key_mask.any() else None


def _plan(
    q: torch.Tensor, k: torch.Tensor, layout: LayoutTensors, block_q: int, block_kv: int
) -> RowPlan:
    return cached_row_plan(
        layout, tokens_q=q.shape[1], tokens_kv=k.shape[1], block_q=block_q, block_kv=block_kv
    )


def _check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None
) -> None:
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v must share one dtype of {', '.join(map(str, DTYPES))};"
            f" got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.ndim != 4 or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            "q, k, v must be non-empty (batch, tokens, heads, head_dim);"
            f" got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    expected = (q.shape[0], k.shape[1], *q.shape[2:])
    if k.shape != expected or v.shape != expected:
        raise ValueError(
            "k and v must have the batch, heads and head_dim of q, and the same number of tokens;"
            f" got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != k.shape[:2]):
        raise ValueError(
            f"key_mask must be torch.bool (batch, tokens_kv) = {tuple(k.shape[:2])};"
            f" got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    for name, x in (("q", q), ("k", k), ("v", v), ("key_mask", key_mask)):
        if x is not None and x.device.type != "cpu":
            raise ValueError(f"this is the CPU path, but {name} is on {x.device}")


def _check_layout(
    q: torch.Tensor, k: torch.Tensor, layout: LayoutTensors, block_q: int, block_kv: int
) -> None:
    full_count, full_index, partial_count, partial_index, partial_mask, bit_masks = layout
    if block_q < 1 or block_kv < 1:
        raise ValueError(f"blocks need at least one token; got {block_q} x {block_kv}")
    for name, x in zip(LAYOUT_NAMES, layout, strict=True):
        if x.dtype != torch.int32 or x.device.type != "cpu":
            raise ValueError(f"{name} must be torch.int32 on cpu; got {x.dtype} on {x.device}")
    batch, tokens_q, heads, _ = q.shape
    rows, words = -(-tokens_q // block_q), -(-block_kv // 32)
    shape = tuple(full_count.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise ValueError(
            f"full_count must be (1 or {batch}, 1 or {heads}, rows) for {batch} samples and"
            f" {heads} heads; got {shape}"
        )
    if shape[2] != rows:
        raise ValueError(
            f"the layout has {shape[2]} rows, but {tokens_q} query tokens in blocks of {block_q}"
            f" make {rows}"
        )
    for name, x, expected in (
        ("full_index", full_index, (*shape, -1)),
        ("partial_count", partial_count, shape),
        ("partial_index", partial_index, (*shape, -1)),
        ("partial_mask", partial_mask, tuple(partial_index.shape)),
        ("bit_masks", bit_masks, (-1, block_q, words)),
    ):
        if x.ndim != len(expected) or any(
            e not in (-1, n) for n, e in zip(x.shape, expected, strict=True)
        ):
            raise ValueError(f"{name} must have shape {expected} (-1: any); got {tuple(x.shape)}")
