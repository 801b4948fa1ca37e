"""Attention on the CPU in which every query selects the key blocks that it sees.

For each key block of a head, the queries that selected the block are gathered and attend to it, and
their results are merged with their earlier results. Pairs of a query and a block that the query did
not select cost nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..checks import check_inputs, scale_of
from ..operators import empty_outputs, over_selection
from .block_sparse import DTYPES
from .row_attention import FlashRows, MatmulRows, RowAttention, pick_row_attention
from .row_tangent import add_tangent

# Queries of a block are split into parts if their scores have more elements than this.
_SCORES_PER_PART = 1 << 20


def selected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query over the key blocks it has selected; differentiable.

    One operator to `torch.compile`.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)` of one dtype, any strides; the key length may
            differ from the query length.
        starts: int32 `(blocks + 1,)`, the first key of every block, ascending from 0, then the
            number of keys.
        bits: int32 `(batch, heads, tokens, ceil(blocks / 32))`: bit `c % 32` of word `c // 32` is
            set when a query selects block `c`.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that no query sees.

    Returns:
        out: like q; 0 for a query that sees nothing.
        lse: `(batch, heads, tokens)`, natural logarithm of the sum of the exponentials of a query's
            scores, -inf for a query that sees nothing; float32, float64 for float64 inputs.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together, or blocks are not in order.
    """
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_selection(q, k, v, starts, bits)
    return _attend(q, k, v, [starts, bits], key_mask, scale_of(scale, q))


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention = pick_row_attention(q.dtype)
    out, lse = empty_outputs(q)
    for head in _heads(k, v, starts, bits, key_mask, _working_dtype(q.dtype, attention)):
        queries = head.of(q).to(head.keys.dtype)
        total = queries.new_zeros(queries.shape, dtype=lse.dtype)
        total_lse = lse[head.sample, head.head].fill_(-torch.inf)
        for block, rows in head.visits(attention):
            found, found_lse = attention.forward(
                _rows(queries, rows), head.keys[block][None, None], head.values[block][None, None],
                None, scale,
            )  # fmt: skip
            _merge(total, total_lse, rows, found[0, 0], found_lse[0, 0])
        head.of(out).copy_(total)
    return out, lse


def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # `MatmulRows` would take the scores of one block for all scores of its queries.
    attention = FlashRows()
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for head in _heads(k, v, starts, bits, key_mask, lse.dtype):
        queries, outs, grads = (head.of(x).to(lse.dtype) for x in (q, out, grad_out))
        lses = lse[head.sample, head.head]
        grad_lses = None if grad_lse is None else grad_lse[head.sample, head.head]
        total, total_keys, total_values = (
            torch.zeros_like(x) for x in (queries, head.keys, head.values)
        )
        for block, rows in head.visits(attention):
            part_dq, part_dk, part_dv = attention.backward(
                (_rows(grads, rows), None if grad_lses is None else _rows(grad_lses, rows)),
                _rows(queries, rows), head.keys[block][None, None], head.values[block][None, None],
                _rows(outs, rows), _rows(lses, rows), None, scale,
            )  # fmt: skip
            if rows is None:
                total += part_dq[0, 0]
            else:
                total.index_add_(0, rows, part_dq[0, 0])
            total_keys[block] += part_dk[0, 0]
            total_values[block] += part_dv[0, 0]
        head.of(dq).copy_(total)
        for x, found in ((dk, total_keys), (dv, total_values)):
            if head.seen is None:
                head.of(x).copy_(found)
            else:
                head.of(x)[head.seen] = found.to(x.dtype)
    return dq, dk, dv


def _tangent(
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_tangent, k_tangent, v_tangent = tangents
    out_tangent, lse_tangent = q.new_empty(q.shape), lse.new_zeros(lse.shape)
    heads = _heads(k, v, starts, bits, key_mask, lse.dtype)
    # The tangents of a head's keys and values, in place of these.
    moving = _heads(k_tangent, v_tangent, starts, bits, key_mask, lse.dtype)
    for head, moved in zip(heads, moving, strict=True):
        queries, steps, outs = (head.of(x).to(lse.dtype) for x in (q, q_tangent, out))
        lses, mean = lse[head.sample, head.head], lse_tangent[head.sample, head.head]
        total = torch.zeros_like(outs)
        for block, rows in head.parts():
            part, part_mean = add_tangent(
                queries[rows], head.keys[block], head.values[block],
                steps[rows], moved.keys[block], moved.values[block],
                lses[rows], None, scale,
            )  # fmt: skip
            total.index_add_(0, rows, part)
            mean.index_add_(0, rows, part_mean)
        head.of(out_tangent).copy_(total.sub_(mean[:, None] * outs))
    return out_tangent, lse_tangent


_attend = over_selection("selected_cpu", _forward, _backward, _tangent, device_types="cpu")


def _working_dtype(dtype: torch.dtype, attention: RowAttention) -> torch.dtype:
    """The dtype in which blocks are computed.

    `FlashRows` is as fast in float32 as in half precision: parts are then not rounded before they
    are merged.
    """
    return dtype if isinstance(attention, MatmulRows) else torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Head:
    """One head of one sample.

    Attributes:
        sample, head: their numbers.
        tokens: number of queries.
        keys, values: `(keys that are seen, head_dim)`, contiguous.
        seen: int64, the tokens of these keys; None for all tokens.
        blocks: the range in `keys` of each block that has keys and is selected by some query.
        rows: the queries that have selected each of these blocks; None for all queries.
    """

    sample: int
    head: int
    tokens: int
    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor | None
    blocks: list[slice]
    rows: list[torch.Tensor | None]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """View `(tokens, head_dim)` of this head in `(batch, tokens, heads, head_dim)`."""
        return x[self.sample, :, self.head]

    def visits(self, attention: RowAttention) -> Iterator[tuple[slice, torch.Tensor | None]]:
        """Each block with the queries that selected it, in parts if the attention keeps scores."""
        if attention.keeps_scores:
            yield from self.parts()
        else:
            yield from zip(self.blocks, self.rows, strict=True)

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Each block with the queries that selected it, in parts of limited scores."""
        for block, rows in zip(self.blocks, self.rows, strict=True):
            step = max(1, _SCORES_PER_PART // (block.stop - block.start))
            for part in (torch.arange(self.tokens) if rows is None else rows).split(step):
                yield block, part


def _heads(
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    key_mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> Iterator[_Head]:
    """Every head of every sample in turn."""
    batch, tokens, heads, _ = k.shape
    bounds_of_all = _bounds(starts, tokens)
    for sample in range(batch):
        seen, bounds = None, bounds_of_all
        if key_mask is not None and not key_mask[sample].all():
            seen = key_mask[sample].nonzero().flatten()
            counted = torch.nn.functional.pad(key_mask[sample].cumsum(0), (1, 0))
            bounds = counted[starts.long()].tolist()
        blocks = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        for head in range(heads):
            keys, values = (x[sample, :, head] for x in (k, v))
            if seen is not None:
                keys, values = keys[seen], values[seen]
            rows = _rows_of_blocks(bits[sample, head], len(blocks))
            visited = [i for i, b in enumerate(blocks) if b.stop > b.start and _is_any(rows[i])]
            yield _Head(
                sample=sample,
                head=head,
                tokens=bits.shape[2],
                keys=keys.to(dtype).contiguous(),
                values=values.to(dtype).contiguous(),
                seen=seen,
                blocks=[blocks[i] for i in visited],
                rows=[rows[i] for i in visited],
            )


def _bounds(starts: torch.Tensor, tokens: int) -> list[int]:
    bounds: list[int] = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(
            f"starts must ascend from 0 to the {tokens} keys;"
            f" got {bounds[0]} .. {bounds[-1]}{'' if bounds == sorted(bounds) else ', unsorted'}"
        )
    return bounds


def _rows_of_blocks(bits: torch.Tensor, blocks: int) -> list[torch.Tensor | None]:
    """For each block the queries that select it by bits `(tokens, words)`; None for all queries."""
    tokens = bits.shape[0]
    shifts = torch.arange(32, dtype=torch.int32)[:, None]
    selected = ((bits.T.contiguous()[:, None] >> shifts) & 1).flatten(0, 1)[:blocks]
    block, row = selected.nonzero().unbind(1)
    counts = torch.bincount(block, minlength=blocks).tolist()
    return [None if len(rows) == tokens else rows for rows in row.contiguous().split(counts)]


def _is_any(rows: torch.Tensor | None) -> bool:
    return rows is None or rows.numel() > 0


def _rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Some rows of `(tokens, ...)` as `(1, 1, rows, ...)`: of one head, in one group of rows."""
    return (x if rows is None else x.index_select(0, rows))[None, None]


def _merge(
    total: torch.Tensor,
    total_lse: torch.Tensor,
    rows: torch.Tensor | None,
    found: torch.Tensor,
    found_lse: torch.Tensor,
) -> None:
    """Merge the attention of some rows over more keys into their totals."""
    old = total_lse if rows is None else total_lse.index_select(0, rows)
    new = torch.logaddexp(old, found_lse)
    kept, added = (old - new).exp()[:, None], (found_lse - new).exp()[:, None]
    if rows is None:
        total.mul_(kept).addcmul_(found, added)
        total_lse.copy_(new)
    else:
        kept_total = total.index_select(0, rows).mul_(kept)
        total.index_copy_(0, rows, kept_total.addcmul_(found, added))
        total_lse.index_copy_(0, rows, new)


def _check_selection(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
) -> None:
    batch, tokens, heads, _ = q.shape
    for name, x in (("q", q), ("k", k), ("v", v), ("starts", starts), ("bits", bits)):
        if x.device.type != "cpu":
            raise ValueError(f"this is the CPU path, but {name} is on {x.device}")
    if starts.dtype != torch.int32 or starts.ndim != 1 or starts.numel() < 2:
        raise ValueError(
            f"starts must be torch.int32 (blocks + 1,); got {starts.dtype} {tuple(starts.shape)}"
        )
    shape = (batch, heads, tokens, (starts.numel() + 30) // 32)
    if bits.dtype != torch.int32 or tuple(bits.shape) != shape:
        raise ValueError(
            f"bits must be torch.int32 (batch, heads, tokens, words) = {shape} for"
            f" {starts.numel() - 1} blocks; got {bits.dtype} {tuple(bits.shape)}"
        )
