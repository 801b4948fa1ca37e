"""Forward-mode derivative of block-sparse attention on the CPU, over the blocks that it visits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .row_plan import RowGroup, RowPlan, cached_row_plan
from .row_tangent import add_tangent

# Rows are split where their scores, (rows, queries, keys), would have more elements than this.
_SCORES_PER_PART = 1 << 20


@torch.library.custom_op("diffattn::block_sparse_cpu_tangent", mutates_args=(), device_types="cpu")
def tangent_op(
    q_tangent: torch.Tensor,
    k_tangent: torch.Tensor,
    v_tangent: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of the output and of the log-sum-exp, computed in the dtype of the latter."""
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    tokens_q, tokens_kv = q.shape[1], k.shape[1]
    plan = cached_row_plan(
        layout, tokens_q=tokens_q, tokens_kv=tokens_kv, block_q=block_q, block_kv=block_kv
    )
    out_tangent, lse_tangent = q.new_empty(q.shape), lse.new_empty(lse.shape)
    for sample in range(q.shape[0]):
        layouts = plan.groups[sample if len(plan.groups) > 1 else 0]
        hidden = key_bias = None
        if key_mask is not None and not key_mask[sample].all():
            hidden = ~key_mask[sample]
            key_bias = torch.zeros(hidden.shape, dtype=lse.dtype).masked_fill_(hidden, -torch.inf)
            key_bias = _in_blocks(key_bias[:, None], block_kv)
        for head in range(q.shape[2]):
            queries, keys = (
                torch.stack([x[sample, :, head].to(lse.dtype) for x in tensors])
                for tensors in ((q, q_tangent, out), (k, v, k_tangent, v_tangent))
            )
            if hidden is not None:
                # Whatever a caller leaves in padding must not become a NaN.
                keys.masked_fill_(hidden[:, None], 0)
            of_out, of_lse = _tangent_of_head(
                plan, layouts[head if len(layouts) > 1 else 0],
                queries, lse[sample, head], _in_blocks(keys, block_kv), key_bias, scale,
            )  # fmt: skip
            out_tangent[sample, :, head], lse_tangent[sample, head] = of_out, of_lse
    return out_tangent, lse_tangent


def _tangent_of_head(
    plan: RowPlan,
    groups: tuple[RowGroup, ...],
    queries: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    key_bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of the output `(tokens, head_dim)` and of the LSE `(tokens,)` of one head.

    Args:
        queries: `(3, tokens, head_dim)`: queries, their tangents, and the output.
        lse: `(tokens,)`.
        keys: `(4, columns, block_kv, head_dim)`: keys, values, and the tangents of both.
        key_bias: `(columns, block_kv, 1)`, -inf for keys that the key mask hides; None if none.
    """
    # Queries without a block have no part in what follows.
    out_tangent, lse_tangent = torch.zeros_like(queries[0]), torch.zeros_like(lse)
    for group in groups:
        if not group.keys:
            continue
        k, v, k_tangent, v_tangent = group.gather(keys)  # (rows, keys, head_dim) each
        for part in _parts(group):
            bias = None if key_bias is None else group.gather(key_bias).mT
            of_layout = plan.bias(group, part, lse.dtype)
            if of_layout is not None:
                bias = of_layout.scores if bias is None else of_layout.scores + bias
            tokens = torch.tensor(group.starts)[:, None] + torch.arange(part.start, part.stop)
            q, q_tangent, out = queries[:, tokens]  # (rows, queries, head_dim) each
            moved, mean = add_tangent(
                q, k, v, q_tangent, k_tangent, v_tangent, lse[tokens], bias, scale
            )
            out_tangent[tokens] = moved.sub_(mean[..., None] * out)
            lse_tangent[tokens] = mean
    return out_tangent, lse_tangent


def _in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """`(..., tokens, n)` to `(..., columns, block, n)`, 0 past the end."""
    padding = -x.shape[-2] % block
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    return x.unflatten(-2, (-1, block))


def _parts(group: RowGroup) -> Iterator[slice]:
    """Some queries of each row at a time."""
    step = max(1, _SCORES_PER_PART // (len(group.starts) * group.keys))
    for start in range(0, group.queries, step):
        yield slice(start, min(start + step, group.queries))
