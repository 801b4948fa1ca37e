"""Block-sparse attention on the CPU: only the visited blocks are computed, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .checks import LayoutTensors, check_inputs, check_layout
from .operators import empty_outputs, register_gradients
from .row_attention import RowAttention, RowBias, pick_row_attention, unit_stride
from .row_plan import RowPlan, Tile, cached_row_plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Queries are split where their scores, or their output, would have more elements than this.
_ELEMENTS_PER_PART = 1 << 20
_MIN_QUERIES = 16

# Heads are taken together up to this many elements per token: fewer and larger calls, in which
# threads wait less for each other, while keys and values of a tile still fit the caches.
_ELEMENTS_PER_TOKEN = 256


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
    return _forward_op(q, k, v, *layout, key_mask, block_q, block_kv, scale)


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
    plan = _plan(q, k, layout, block_q, block_kv)
    k, v = unit_stride(k), unit_stride(v)
    out, lse = empty_outputs(q)
    for chunk in _head_chunks(plan, q, attention):
        queries, keys, values, out_rows = (chunk.of(x) for x in (q, k, v, out))
        lse_rows = lse[chunk.sample, chunk.heads]
        hidden = None if key_mask is None else key_mask[chunk.sample]
        for tile in chunk.tiles:
            visit = plan.visit(tile, hidden, q.dtype)
            if visit is None:
                if tile.first:
                    _fill(tile, out_rows, lse_rows)
                continue
            some_keys, some_values = _select(keys, visit.keys), _select(values, visit.keys)
            for part in _parts(tile, some_keys, attention):
                found, found_lse = attention.forward(
                    _read(part, queries), some_keys[None], some_values[None],
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
    plan = _plan(q, k, layout, block_q, block_kv)
    k, v = unit_stride(k), unit_stride(v)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for chunk in _head_chunks(plan, q, attention):
        queries, keys, values, out_rows, grad_rows = (chunk.of(x) for x in (q, k, v, out, grad_out))
        lse_rows = lse[chunk.sample, chunk.heads]
        grad_lse_rows = None if grad_lse is None else grad_lse[chunk.sample, chunk.heads]
        totals = tuple(_zeros(chunk.of(x), lse.dtype) for x in (dq, dk, dv))
        total_dq, total_dk, total_dv = totals
        hidden = None if key_mask is None else key_mask[chunk.sample]
        for tile in chunk.tiles:
            visit = plan.visit(tile, hidden, q.dtype)
            if visit is None:
                continue
            some_keys, some_values = _select(keys, visit.keys), _select(values, visit.keys)
            for part in _parts(tile, some_keys, attention):
                grad = (
                    _read(part, grad_rows),
                    None if grad_lse_rows is None else _read_lse(part, grad_lse_rows),
                )
                part_dq, part_dk, part_dv = attention.backward(
                    grad, _read(part, queries), some_keys[None], some_values[None],
                    _read(part, out_rows), _read_lse(part, lse_rows),
                    _part_of(visit.bias, part), scale,
                )  # fmt: skip
                for rows, x in part.split(part_dq[0].transpose(0, 1)):
                    total_dq[rows] += x
                _add(total_dk, visit.keys, part_dk[0])
                _add(total_dv, visit.keys, part_dv[0])
        for x, total in zip((dq, dk, dv), totals, strict=True):
            if x.dtype != total.dtype:
                chunk.of(x).copy_(total)
        del totals, total_dq, total_dk, total_dv, total  # before the next chunk's are made
    return dq, dk, dv


register_gradients(_forward_op, _backward_op)


@dataclass(frozen=True)
class _HeadChunk:
    """Some heads of one sample that share a layout.

    Attributes:
        sample, heads: which.
        tiles: what is computed for them.
    """

    sample: int
    heads: slice
    tiles: tuple[Tile, ...]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View `(tokens, heads, head_dim)` of these heads in `(batch, tokens, heads, head_dim)`."""
        return x[self.sample, :, self.heads]


def _head_chunks(plan: RowPlan, q: torch.Tensor, attention: RowAttention) -> Iterator[_HeadChunk]:
    """A head per thread at a time or more, and two for one thread.

    OneDNN multiplies batches of one more slowly.
    """
    batch, _, heads, head_dim = q.shape
    step = max(2, torch.get_num_threads())
    if not attention.keeps_scores:
        step = max(step, _ELEMENTS_PER_TOKEN // head_dim)
    for sample in range(batch):
        tiles = plan.tiles[sample if len(plan.tiles) > 1 else 0]
        if len(tiles) > 1:
            step = 1
        for head in range(0, heads, step):
            yield _HeadChunk(
                sample=sample,
                heads=slice(head, min(head + step, heads)),
                tiles=tiles[head if len(tiles) > 1 else 0],
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
    tokens, heads, head_dim = keys.shape
    elements = heads * (tokens if attention.keeps_scores else head_dim)
    step = max(_ELEMENTS_PER_PART // elements, _MIN_QUERIES)
    start, spans, queries = 0, [], 0
    for first, last in tile.spans:
        while first < last:
            stop = min(last, first + step - queries)
            spans.append(slice(first, stop))
            queries += stop - first
            first = stop
            if queries == step:
                yield _Part(start, start + queries, tuple(spans))
                start, spans, queries = start + queries, [], 0
    if spans:
        yield _Part(start, start + queries, tuple(spans))


def _part_of(bias: RowBias | None, part: _Part) -> RowBias | None:
    if bias is None:
        return None
    rows = slice(part.start, part.stop)
    return RowBias(bias.scores[:, rows], None if bias.blind is None else bias.blind[:, rows])


def _select(x: torch.Tensor, keys: slice | torch.Tensor) -> torch.Tensor:
    """Some tokens of `(tokens, heads, n)`, as `(heads, tokens, n)`."""
    found = x[keys] if isinstance(keys, slice) else x.index_select(0, keys)
    return found.transpose(0, 1)


def _add(total: torch.Tensor, keys: slice | torch.Tensor, part: torch.Tensor) -> None:
    """Add `(heads, keys, n)` to some tokens of `(tokens, heads, n)`."""
    part = part.transpose(0, 1)
    if isinstance(keys, slice):
        total[keys] += part
    else:
        total.index_add_(0, keys, part.to(total.dtype))


def _zeros(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of a dtype, in place where x has it: many rows add to a key, so in float32 at least."""
    return x.zero_() if x.dtype == dtype else torch.zeros_like(x, dtype=dtype)


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
    q: torch.Tensor, k: torch.Tensor, layout: LayoutTensors, block_q: int, block_kv: int
) -> RowPlan:
    # Tiles of a query are merged in the output: in 16 bits that would round once for each.
    share = q.dtype in (torch.float32, torch.float64)
    return cached_row_plan(
        layout, tokens_q=q.shape[1], tokens_kv=k.shape[1], block_q=block_q, block_kv=block_kv,
        share=share,
    )  # fmt: skip


def _check_device(**tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device.type != "cpu":
            raise ValueError(f"this is the CPU path, but {name} is on {x.device}")
