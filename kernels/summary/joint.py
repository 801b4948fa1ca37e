"""Attention to blocks of a layout and to summary keys in Triton: one softmax, one operator.

The pass over the summaries continues the softmax that the pass over the blocks has begun. The
gradients of both parts follow from the output and the log-sum-exp over all keys: no result of one
part alone is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..block_sparse import ops as blocks
from ..checks import scale_of
from ..dispatch import operator
from ..operators import empty_outputs, six
from ..transforms import first_order, save, transformable
from . import triton_passes as summaries
from .ops import as_inputs, check, no_tangents


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Sequence[torch.Tensor],
    summary_k: torch.Tensor,
    summary_v: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of a layout and over summary keys.

    Differentiable in q, k, v, summary_k, summary_v and bias.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)`.
        layout, block_q, block_kv, key_mask: the blocks, as of `block_sparse_attention`.
        summary_k, summary_v, bias, hidden: the summaries, as `k`, `v`, `bias` and `hidden` of
            `summary_attention`.
        scale: factor of the products; `head_dim ** -0.5` when None.

    Returns:
        out: like q; 0 for a query that sees neither a key nor a summary.
        lse: float32 `(batch, heads, tokens)`; -inf for such a query.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    blocks.check_call(q, k, v, layout, key_mask, block_q, block_kv)
    check(q, summary_k, summary_v, bias, hidden, block_q, "triton")
    out, lse = _attend(
        q, k, v, summary_k, summary_v, bias, hidden, list(layout), key_mask,
        block_q, block_kv, scale_of(scale, q),
    )  # fmt: skip
    return out, lse


@operator("joint_triton")
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    summary_k: torch.Tensor, summary_v: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor,
    layout: list[torch.Tensor], key_mask: torch.Tensor | None,
    block_q: int, block_kv: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    of_blocks = blocks.forward(
        q, k, v, six(layout), key_mask, block_q=block_q, block_kv=block_kv, scale=scale
    )
    out, lse = summaries.forward(
        q, summary_k, summary_v, bias, hidden, block_q, scale, onto=of_blocks
    )
    return out, lse


@_forward_op.registered.register_fake
def _(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q)


@operator("joint_triton_backward")
def _backward_op(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    summary_k: torch.Tensor, summary_v: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor,
    layout: list[torch.Tensor], key_mask: torch.Tensor | None,
    block_q: int, block_kv: int, scale: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    dq, dk, dv = blocks.backward(
        grad_out, grad_lse, q, k, v, out, lse, six(layout), key_mask,
        block_q=block_q, block_kv=block_kv, scale=scale,
    )  # fmt: skip
    more_dq, dsk, dsv, dbias = summaries.backward(
        grad_out, grad_lse, out, lse, q, summary_k, summary_v, bias, hidden, block_q, scale
    )
    of_summary = as_inputs(dsk, dsv, dbias, summary_k, summary_v, bias)
    return dq.add_(more_dq), dk, dv, *of_summary


@_backward_op.registered.register_fake
def _(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    *inputs: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in inputs[:6])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *moving, hidden, layout, key_mask, ctx.block_q, ctx.block_kv, ctx.scale = inputs
    save(ctx, *output, *moving, hidden, key_mask, *layout)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | list[None] | None, ...]:
    out, lse, q, k, v, summary_k, summary_v, bias, hidden, key_mask, *layout = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = first_order(
        _backward_op, grad_out, grad_lse, out, lse, q, k, v, summary_k, summary_v, bias, hidden,
        layout, key_mask, ctx.block_q, ctx.block_kv, ctx.scale,
    )  # fmt: skip
    return (*grads, None, [None] * len(layout), *[None] * 4)


_attend = transformable(_forward_op, _setup, _gradients, no_tangents)
