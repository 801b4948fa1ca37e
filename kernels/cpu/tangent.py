"""Forward-mode derivative of block-sparse attention on the CPU, over the blocks that it visits."""

from __future__ import annotations

import torch

from ..checks import LayoutTensors
from .row_plan import Group, RowPlan, cached_row_plan, rows_share
from .row_tangent import add_tangent

# Rows are split into parts if their scores, (queries, keys), have more elements than this.
_SCORES_PER_PART = 1 << 20


def tangent(
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of the output and of the log-sum-exp, computed in the dtype of the log-sum-exp.

    Args:
        tangents: the tangents of q, k and v.
        out, lse: results of the forward pass for the other arguments.
    """
    q_tangent, k_tangent, v_tangent = tangents
    plan = cached_row_plan(
        layout, tokens_q=q.shape[1], tokens_kv=k.shape[1], block_q=block_q, block_kv=block_kv,
        share=rows_share(q.dtype),
    )  # fmt: skip
    out_tangent, lse_tangent = q.new_empty(q.shape), lse.new_empty(lse.shape)
    for sample in range(q.shape[0]):
        layouts = plan.groups[sample if len(plan.groups) > 1 else 0]
        seen = None if key_mask is None else key_mask[sample]
        for head in range(q.shape[2]):
            queries, keys = (
                torch.stack([x[sample, :, head].to(lse.dtype) for x in tensors])
                for tensors in ((q, q_tangent, out), (k, v, k_tangent, v_tangent))
            )
            of_out, of_lse = _tangent_of_head(
                plan, layouts[head if len(layouts) > 1 else 0],
                queries, lse[sample, head], keys, seen, scale,
            )  # fmt: skip
            out_tangent[sample, :, head], lse_tangent[sample, head] = of_out, of_lse
    return out_tangent, lse_tangent


def _tangent_of_head(
    plan: RowPlan,
    groups: tuple[Group, ...],
    queries: torch.Tensor,
    lse: torch.Tensor,
    keys: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents of the output `(tokens, head_dim)` and of the LSE `(tokens,)` of one head.

    Args:
        queries: `(3, tokens, head_dim)`: queries, their tangents, and the output.
        lse: `(tokens,)`.
        keys: `(4, tokens_kv, head_dim)`: keys, values, and the tangents of both.
        key_mask: bool `(tokens_kv,)`, false for keys that no query sees; None if there is none.
    """
    # Queries that see no key keep tangents of 0.
    moved, mean = torch.zeros_like(queries[0]), torch.zeros_like(lse)
    for group in groups:
        of_group = torch.cat([torch.arange(*span) for span in group.spans])
        for tile in group.tiles:
            visit = plan.visit(tile, key_mask, lse.dtype)
            if visit is None:
                continue
            k, v, k_tangent, v_tangent = keys[:, visit.keys]  # (keys, head_dim) each
            tokens = of_group[tile.start : tile.stop]
            step = max(1, _SCORES_PER_PART // len(k))
            for start in range(0, len(tokens), step):
                part = tokens[start : start + step]
                bias = None if visit.bias is None else visit.bias.scores[0, start : start + step]
                q, q_tangent, _ = queries[:, part]  # (queries, head_dim) each
                more, more_mean = add_tangent(
                    q, k, v, q_tangent, k_tangent, v_tangent, lse[part], bias, scale
                )
                moved[part] += more
                mean[part] += more_mean
    return moved.sub_(mean[:, None] * queries[2]), mean
