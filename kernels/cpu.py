"""Block-sparse attention on the CPU: only the visited blocks are computed, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .checks import LayoutTensors, check_inputs, check_layout
from .cpu_tangent import tangent_op
from .operators import differentiable, empty_outputs
from .row_attention import RowAttention, RowBias, pick_row_attention, unit_stride
from .row_plan import RowPlan, Tile, cached_row_plan, rows_share

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Queries are split where their scores, or their output, would have more elements than this.
_ELEMENTS_PER_PART = 1 << 20
_MIN_QUERIES = 16

# Heads are taken together up to this many elements per token: fewer and larger calls, in which
# threads wait less for each other, and copies of whole tokens.
_ELEMENTS_PER_TOKEN = 1024


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
    attention = pick_row_attention(q.dtype)
    plan = _plan(q, k, layout, block_q, block_kv, attention)
    k, v = unit_stride(k), unit_stride(v)
    out, lse = empty_outputs(q)
    for chunk in _head_chunks(plan, k, v, attention):
        queries, out_rows = chunk.of(q), chunk.of(out)
        lse_rows = lse[chunk.sample, chunk.heads]
        visible = None if key_mask is None else key_mask[chunk.sample]
        for tile in chunk.tiles:
            visit = plan.visit(tile, visible, q.dtype)
            if visit is None:
                if tile.first:
                    _fill(tile, out_rows, lse_rows)
                continue
            keys, values = (_select(x, visit.keys) for x in chunk.keys_values)
            for part in _parts(tile, keys, attention):
                found, found_lse = attention.forward(
                    _read(part, queries), keys[None], values[None],
                    _part_of(visit.bias, part), scale,
                )  # fmt: skip
                _write(part, out_rows, lse_rows, found[0], found_lse[0], merge=not tile.first)
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
    attention = pick_row_attention(q.dtype)
    plan = _plan(q, k, layout, block_q, block_kv, attention)
    k, v = unit_stride(k), unit_stride(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for chunk in _head_chunks(plan, k, v, attention):
        queries, out_rows, grad_rows = chunk.of(q), chunk.of(out), chunk.of(grad_out)
        lse_rows = lse[chunk.sample, chunk.heads]
        grad_lse_rows = None if grad_lse is None else grad_lse[chunk.sample, chunk.heads]
        dq_rows, grads = chunk.of(dq), (chunk.of(dk), chunk.of(dv))
        totals = tuple(
            _zeros(result, x, lse.dtype) for result, x in zip(grads, chunk.keys_values, strict=True)
        )
        visible = None if key_mask is None else key_mask[chunk.sample]
        for tile in chunk.tiles:
            visit = plan.visit(tile, visible, q.dtype)
            if visit is None:
                if tile.first:
                    for start, stop in tile.spans:
                        dq_rows[start:stop] = 0
                continue
            keys, values = (_select(x, visit.keys) for x in chunk.keys_values)
            for part in _parts(tile, keys, attention):
                grad = (
                    _read(part, grad_rows),
                    None if grad_lse_rows is None else _read_lse(part, grad_lse_rows),
                )
                part_dq, part_dk, part_dv = attention.backward(
                    grad, _read(part, queries), keys[None], values[None],
                    _read(part, out_rows), _read_lse(part, lse_rows),
                    _part_of(visit.bias, part), scale,
                )  # fmt: skip
                for rows, x in part.split(part_dq[0].transpose(0, 1)):
                    if tile.first:
                        dq_rows[rows] = x
                    else:
                        dq_rows[rows] += x
                for total, x in zip(totals, (part_dk[0], part_dv[0]), strict=True):
                    _add(total, visit.keys, x)
        for result, total in zip(grads, totals, strict=True):
            if result.dtype != total.dtype:
                result.copy_(total)
        del totals, total  # before the next chunk's are made
    return dq, dk, dv


_attend = differentiable(_forward_op, _backward_op, tangent_op)


@dataclass(frozen=True)
class _HeadChunk:
    """Some heads of one sample that share a layout.

    Attributes:
        sample, heads: which.
        tiles: what is computed for them.
        keys_values: both `(tokens, heads, head_dim)`: those of the caller, or a copy in which the
            tokens of a head lie together, as matrix products of oneDNN want them.
    """

    sample: int
    heads: slice
    tiles: tuple[Tile, ...]
    keys_values: tuple[torch.Tensor, ...]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View `(tokens, heads, head_dim)` of these heads in `(batch, tokens, heads, head_dim)`."""
        return x[self.sample, :, self.heads]


def _head_chunks(
    plan: RowPlan, k: torch.Tensor, v: torch.Tensor, attention: RowAttention
) -> Iterator[_HeadChunk]:
    """A head per thread at a time or more, and two for one thread.

    OneDNN multiplies batches of one more slowly.
    """
    batch, tokens, heads, head_dim = k.shape
    step = max(2, torch.get_num_threads())
    if not attention.keeps_scores:
        step = max(step, _ELEMENTS_PER_TOKEN // head_dim)
    step = 1 if len(plan.tiles[0]) > 1 else min(step, heads)
    # One copy that all chunks use in turn: a new one would be made beside the last one.
    copy = k.new_empty(2, step, tokens, head_dim) if attention.keeps_scores else None
    for sample in range(batch):
        layouts = plan.tiles[sample if len(plan.tiles) > 1 else 0]
        for head in range(0, heads, step):
            chosen = slice(head, min(head + step, heads))
            keys_values: tuple[torch.Tensor, ...] = k[sample, :, chosen], v[sample, :, chosen]
            if copy is not None:
                places = copy[:, : chosen.stop - head].transpose(1, 2).unbind(0)
                keys_values = tuple(
                    place.copy_(x) for place, x in zip(places, keys_values, strict=True)
                )
            yield _HeadChunk(
                sample=sample,
                heads=chosen,
                tiles=layouts[head if len(layouts) > 1 else 0],
                keys_values=keys_values,
            )


@dataclass(frozen=True)
class _Part:
    """Some queries of a tile: from start to stop of them all, in so many ranges of tokens."""

    start: int
    stop: int
    spans: tuple[slice, ...]

    def split(self, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each range of tokens, with its share of `(queries, ...)`."""
        lengths = [span.stop - span.start for span in self.spans]
        return zip(self.spans, x.split(lengths), strict=True)


def _parts(tile: Tile, keys: torch.Tensor, attention: RowAttention) -> Iterator[_Part]:
    """The queries of a tile, a part at a time where the scores or the output would be large."""
    heads, tokens, head_dim = keys.shape
    elements = heads * (tokens if attention.keeps_scores else head_dim)
    queries = sum(stop - start for start, stop in tile.spans)
    largest = max(_ELEMENTS_PER_PART // elements, _MIN_QUERIES)
    step = -(-queries // -(-queries // largest))
    start, spans, room = 0, [], step
    for first, last in tile.spans:
        while first < last:
            stop = min(last, first + room)
            spans.append(slice(first, stop))
            room -= stop - first
            first = stop
            if not room:
                yield _Part(start, start + step, tuple(spans))
                start, spans, room = start + step, [], step
    if spans:
        yield _Part(start, queries, tuple(spans))


def _part_of(bias: RowBias | None, part: _Part) -> RowBias | None:
    if bias is None:
        return None
    rows = slice(part.start, part.stop)
    return RowBias(bias.scores[:, rows], None if bias.blind is None else bias.blind[:, rows])


def _select(x: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
    """Some tokens of `(tokens, heads, n)`, as `(heads, tokens, n)`."""
    if isinstance(keys, slice):
        return x[keys].transpose(0, 1)
    # Copied in the order of the memory, which is ten times faster than in the other.
    if x.stride(1) > x.stride(0):
        return x.transpose(0, 1).index_select(1, keys)
    return x.index_select(0, keys).transpose(0, 1)


def _add(total: torch.Tensor, keys: slice | torch.Tensor, part: torch.Tensor) -> None:
    """Add `(heads, keys, n)` to some tokens of `(tokens, heads, n)`."""
    if isinstance(keys, slice):
        total.transpose(0, 1)[:, keys] += part
    elif total.stride(1) > total.stride(0):
        for of_head, x in zip(total.unbind(1), part.to(total.dtype), strict=True):
            of_head.index_add_(0, keys, x)
    else:
        total.index_add_(0, keys, part.transpose(0, 1).to(total.dtype))


def _zeros(grad: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Where a gradient is summed: in float32 at least, because many rows add to a key.

    Args:
        grad: the gradient, used if it has the dtype.
        x: what it is the gradient of, in the memory order that the sum shall have otherwise.
        dtype: of the sum.
    """
    return grad.zero_() if grad.dtype == dtype else torch.zeros_like(x, dtype=dtype)


def _read(part: _Part, x: torch.Tensor) -> torch.Tensor:
    """Some queries of `(tokens, heads, n)`, as `(1, heads, queries, n)`."""
    rows = [x[span] for span in part.spans]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).transpose(0, 1)[None]


def _read_lse(part: _Part, x: torch.Tensor) -> torch.Tensor:
    """Some queries of `(heads, tokens)`, as `(1, heads, queries)`."""
    rows = [x[:, span] for span in part.spans]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, 1))[None]


def _write(
    part: _Part,
    out: torch.Tensor,
    lse: torch.Tensor,
    found: torch.Tensor,
    found_lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Write attention over some keys, or merge it with that over other keys.

    Args:
        part: the queries.
        out, lse: `(tokens, heads, head_dim)` and `(heads, tokens)`, of all queries.
        found, found_lse: `(heads, queries, head_dim)` and `(heads, queries)`.
        merge: whether these queries have been written before.
    """
    outs, lses = part.split(found.transpose(0, 1)), part.split(found_lse.T)
    for (rows, new), (_, new_lse) in zip(outs, lses, strict=True):
        old, old_lse = out[rows], lse[:, rows].T
        if merge:
            # Without any key so far or now, this is inf - inf: the 0 that is there stays.
            weight = torch.sigmoid(new_lse - old_lse).nan_to_num_(0)
            old.lerp_(new, weight[..., None])
            new_lse = torch.logaddexp(old_lse, new_lse)
        else:
            old.copy_(new)
        old_lse.copy_(new_lse)


def _fill(tile: Tile, out: torch.Tensor, lse: torch.Tensor) -> None:
    for start, stop in tile.spans:
        out[start:stop] = 0
        lse[:, start:stop] = -torch.inf


def _plan(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: LayoutTensors,
    block_q: int,
    block_kv: int,
    attention: RowAttention,
) -> RowPlan:
    return cached_row_plan(
        layout, tokens_q=q.shape[1], tokens_kv=k.shape[1], block_q=block_q, block_kv=block_kv,
        share=attention.takes_some_keys and rows_share(q.dtype),
    )  # fmt: skip


def _check_device(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device.type != "cpu":
            raise ValueError(f"this is the CPU path, but {name} is on {x.device}")
