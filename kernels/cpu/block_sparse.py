"""Block-sparse attention on the CPU: only the visited blocks are computed, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..checks import LayoutTensors, check_inputs, check_layout, scale_of
from ..operators import empty_outputs, over_layout
from .row_attention import RowAttention, RowBias, pick_row_attention, unit_stride
from .row_plan import Group, RowPlan, Tile, cached_row_plan, rows_share
from .tangent import tangent

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Queries are split into parts if their scores, or their output, have more elements than this.
_ELEMENTS_PER_PART = 1 << 20
_MIN_QUERIES = 16

# Heads are computed together up to this many elements per token. Calls are then fewer and larger,
# threads wait less for each other, and whole tokens are copied.
_ELEMENTS_PER_TOKEN = 1024


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Sequence[torch.Tensor],
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
        layout: the index lists of a `BlockLayout` (its `tensors`), shared (size 1) or separate per
            sample and per head. Plans derived from the lists are remembered as long as these
            tensors live.
        block_q, block_kv: tokens per query block and per key block.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that no query sees.

    Returns:
        out: like q; 0 for a query that sees nothing.
        lse: `(batch, heads, tokens_q)`, natural logarithm of the sum of the exponentials of a
            query's scores, -inf for a query that sees nothing; float32, float64 for float64 inputs.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together.
    """
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_device(q=q, k=k, v=v, key_mask=key_mask)
    check_layout(q, layout, block_q, block_kv)
    return _attend(q, k, v, list(layout), key_mask, block_q, block_kv, scale_of(scale, q))


def block_sparse_attention_gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Sequence[torch.Tensor],
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention` with respect to q, k and v, outside of autograd.

    Args:
        grad_out: gradient of the output, `(batch, tokens, heads, head_dim)`.
        out, lse: results of `block_sparse_attention` for the other arguments.

    Returns:
        dq, dk, dv: like q, k and v.
    """
    scale = scale_of(scale, q)
    return _gradients(
        grad_out, None, q, k, v, out, lse, list(layout), key_mask, block_q, block_kv, scale
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = pick_row_attention(q.dtype)
    plan = _plan(q, k, layout, block_q, block_kv, attention)
    k, v = unit_stride(k), unit_stride(v)
    out, lse = empty_outputs(q)
    for chunk in _head_chunks(plan, k, v, attention):
        queries, out_rows = chunk.of(q), chunk.of(out)
        lse_rows = lse[chunk.sample, chunk.heads].T
        visible = None if key_mask is None else key_mask[chunk.sample]
        for group in chunk.groups:
            q_rows = _read(group, queries)  # (queries, heads, head_dim)
            results = (_Rows(group, out_rows), _Rows(group, lse_rows))
            for tile in group.tiles:
                visit = plan.visit(tile, visible, q.dtype)
                if visit is None:
                    if tile.first:
                        for rows, nothing in zip(results, (0, -torch.inf), strict=True):
                            rows.fill(slice(tile.start, tile.stop), nothing)
                    continue
                keys, values = (_select(x, visit.keys) for x in chunk.keys_values)
                for part in _parts(tile, keys, attention):
                    found, found_lse = attention.forward(
                        _as_heads(q_rows[part]), keys[None], values[None],
                        _part_of(visit.bias, tile, part), scale,
                    )  # fmt: skip
                    _write(part, *results, found[0], found_lse[0], merge=not tile.first)
            for rows in results:
                rows.store()
    return out, lse


def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    attention = pick_row_attention(q.dtype)
    plan = _plan(q, k, layout, block_q, block_kv, attention)
    k, v = unit_stride(k), unit_stride(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for chunk in _head_chunks(plan, k, v, attention):
        queries, out_rows, grad_rows = chunk.of(q), chunk.of(out), chunk.of(grad_out)
        lse_rows = lse[chunk.sample, chunk.heads].T
        grad_lse_rows = None if grad_lse is None else grad_lse[chunk.sample, chunk.heads].T
        dq_rows, grads = chunk.of(dq), (chunk.of(dk), chunk.of(dv))
        totals = tuple(
            _zeros(result, x, lse.dtype) for result, x in zip(grads, chunk.keys_values, strict=True)
        )
        visible = None if key_mask is None else key_mask[chunk.sample]
        for group in chunk.groups:
            # (queries, heads, head_dim) each, and (queries, heads)
            q_rows, out_of, grad_of, lse_of = (
                _read(group, x) for x in (queries, out_rows, grad_rows, lse_rows)
            )
            grad_lse_of = None if grad_lse_rows is None else _read(group, grad_lse_rows)
            dq_of = _Rows(group, dq_rows)
            for tile in group.tiles:
                visit = plan.visit(tile, visible, q.dtype)
                if visit is None:
                    if tile.first:
                        dq_of.fill(slice(tile.start, tile.stop), 0)
                    continue
                keys, values = (_select(x, visit.keys) for x in chunk.keys_values)
                for part in _parts(tile, keys, attention):
                    grad = (
                        _as_heads(grad_of[part]),
                        None if grad_lse_of is None else _as_heads(grad_lse_of[part]),
                    )
                    part_dq, part_dk, part_dv = attention.backward(
                        grad, _as_heads(q_rows[part]), keys[None], values[None],
                        _as_heads(out_of[part]), _as_heads(lse_of[part]).contiguous(),
                        _part_of(visit.bias, tile, part), scale,
                    )  # fmt: skip
                    if tile.first:
                        dq_of.write(part, part_dq[0].transpose(0, 1))
                    else:
                        dq_of.of(part).add_(part_dq[0].transpose(0, 1))
                    for total, x in zip(totals, (part_dk[0], part_dv[0]), strict=True):
                        _add(total, visit.keys, x)
            dq_of.store()
        for result, total in zip(grads, totals, strict=True):
            if result.dtype != total.dtype:
                result.copy_(total)
        del totals, total  # before the next chunk makes its own
    return dq, dk, dv


_attend, _gradients = over_layout(
    "block_sparse_cpu", _forward, _backward, tangent, device_types="cpu"
)


@dataclass(frozen=True)
class _HeadChunk:
    """Some heads of one sample that share a layout.

    Attributes:
        sample, heads: number of the sample, and range of its heads.
        groups: the groups of query rows of the heads' layout.
        keys_values: keys and values, both `(tokens, heads, head_dim)`: views of the caller's
            tensors, or copies in which the tokens of a head lie together, as oneDNN's matrix
            products want.
    """

    sample: int
    heads: slice
    groups: tuple[Group, ...]
    keys_values: tuple[torch.Tensor, ...]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View `(tokens, heads, head_dim)` of these heads in `(batch, tokens, heads, head_dim)`."""
        return x[self.sample, :, self.heads]


def _head_chunks(
    plan: RowPlan, k: torch.Tensor, v: torch.Tensor, attention: RowAttention
) -> Iterator[_HeadChunk]:
    """Chunks of at least two heads, and of at least one head per thread.

    OneDNN is slower at batches of one. Heads with layouts of their own come one by one.
    """
    batch, tokens, heads, head_dim = k.shape
    step = max(2, torch.get_num_threads())
    if not attention.keeps_scores:
        step = max(step, _ELEMENTS_PER_TOKEN // head_dim)
    step = 1 if len(plan.groups[0]) > 1 else min(step, heads)
    # All chunks use one copy in turn: a new copy would be made while the last one still exists.
    copy = k.new_empty(2, step, tokens, head_dim) if attention.keeps_scores else None
    for sample in range(batch):
        layouts = plan.groups[sample if len(plan.groups) > 1 else 0]
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
                groups=layouts[head if len(layouts) > 1 else 0],
                keys_values=keys_values,
            )


class _Rows:
    """Results for the queries of a group: `(queries, ...)` in the order of the group's tiles.

    Where the group is one range of tokens, the rows are a view of the caller's tensor. Elsewhere
    `store` copies the rows there.
    """

    def __init__(self, group: Group, tokens: torch.Tensor) -> None:
        """No results yet; `tokens` is the caller's `(tokens, ...)`, which is written to."""
        self._group, self._tokens = group, tokens
        self._lies_there = len(group.spans) == 1
        self._rows = tokens[slice(*group.spans[0])] if self._lies_there else None

    def of(self, part: slice) -> torch.Tensor:
        if self._rows is None:
            shape = (sum(self._group.lengths), *self._tokens.shape[1:])
            self._rows = self._tokens.new_empty(shape)
        return self._rows[part]

    def fill(self, part: slice, value: float) -> None:
        self.of(part).fill_(value)

    def write(self, part: slice, found: torch.Tensor) -> None:
        """Take the first results of some queries; results of the whole group are not copied."""
        if self._rows is None and len(found) == sum(self._group.lengths):
            self._rows = found
        else:
            self.of(part).copy_(found)

    def store(self) -> None:
        if not self._lies_there:
            lengths = self._group.lengths
            for span, rows in zip(
                self._group.spans, self.of(slice(None)).split(lengths), strict=True
            ):
                self._tokens[slice(*span)] = rows


def _read(group: Group, x: torch.Tensor) -> torch.Tensor:
    """The rows of a group's queries in `(tokens, ...)`."""
    rows = [x[start:stop] for start, stop in group.spans]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _as_heads(x: torch.Tensor) -> torch.Tensor:
    """`(queries, heads, ...)` as `(1, heads, queries, ...)`."""
    return x.transpose(0, 1)[None]


def _parts(tile: Tile, keys: torch.Tensor, attention: RowAttention) -> Iterator[slice]:
    """The queries of a tile, in parts where their scores or output would be large."""
    heads, tokens, head_dim = keys.shape
    elements = heads * (tokens if attention.keeps_scores else head_dim)
    queries = tile.stop - tile.start
    largest = max(_ELEMENTS_PER_PART // elements, _MIN_QUERIES)
    step = -(-queries // -(-queries // largest))
    for start in range(tile.start, tile.stop, step):
        yield slice(start, min(start + step, tile.stop))


def _part_of(bias: RowBias | None, tile: Tile, part: slice) -> RowBias | None:
    if bias is None:
        return None
    rows = slice(part.start - tile.start, part.stop - tile.start)
    return RowBias(bias.scores[:, rows], None if bias.blind is None else bias.blind[:, rows])


def _select(x: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
    """Some tokens of `(tokens, heads, n)`, as `(heads, tokens, n)`."""
    if isinstance(keys, slice):
        return x[keys].transpose(0, 1)
    # Copied in the order of the memory: ten times faster than in the other order.
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
    """Zeros in which to sum a gradient: in float32 at least, because many rows add to a key.

    Args:
        grad: the tensor of the gradient, used if it has the dtype.
        x: the tensor that the gradient is of: a new sum has its memory order.
        dtype: of the sum.
    """
    return grad.zero_() if grad.dtype == dtype else torch.zeros_like(x, dtype=dtype)


def _write(
    part: slice,
    out: _Rows,
    lse: _Rows,
    found: torch.Tensor,
    found_lse: torch.Tensor,
    *,
    merge: bool,
) -> None:
    """Write attention over some keys, or merge it with the attention over earlier keys.

    Args:
        part: the queries.
        out, lse: rows of the group, `(queries, heads, head_dim)` and `(queries, heads)`.
        found, found_lse: results over these keys, `(heads, queries, head_dim)` and
            `(heads, queries)`.
        merge: whether these queries have been written before.
    """
    new, new_lse = found.transpose(0, 1), found_lse.T
    if merge:
        old_lse = lse.of(part)
        # For a query without any key this is inf - inf: with a weight of 0 its output stays 0.
        weight = torch.sigmoid(new_lse - old_lse).nan_to_num_(0)
        out.of(part).lerp_(new, weight[..., None])
        torch.logaddexp(old_lse, new_lse, out=old_lse)
    else:
        out.write(part, new)
        lse.write(part, new_lse)


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
