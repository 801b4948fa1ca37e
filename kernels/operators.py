"""What every attention operator tells the compiler and autograd: its results, its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import CustomOpDef

from .transforms import first_order, materialized, save, transformable

Results = tuple[torch.Tensor, torch.Tensor]


def empty_outputs(q: torch.Tensor) -> Results:
    """The output `(batch, tokens, heads, head_dim)` and the LSE `(batch, heads, tokens)`, unset."""
    batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=lse_dtype)


def differentiable(
    forward_op: CustomOpDef, backward_op: CustomOpDef, tangent_op: CustomOpDef | str
) -> Callable[..., Results]:
    """Make an attention operator differentiable in q, k and v, in reverse and in forward mode.

    Args:
        forward_op: `(q, k, v, *tensors, *options) -> (out, lse)`; tensors may be None, options are
            numbers.
        backward_op: `(grad_out, grad_lse | None, q, k, v, out, lse, *tensors, *options)`, which
            returns the gradients of q, k and v.
        tangent_op: `(q_tangent, k_tangent, v_tangent, q, k, v, out, lse, *tensors, *options)`,
            which returns the tangents of the output and of the LSE; or the message of the error
            that is raised instead, if there is none.

    Returns:
        What to call in place of `forward_op`, which knows nothing of tangents.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, torch.Tensor)]
        save(ctx, *output, *tensors)
        ctx.options = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        out, lse, q, k, v, *rest = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = first_order(backward_op, grad_out, grad_lse, q, k, v, out, lse, *rest, *ctx.options)
        return (*grads, *[None] * (len(rest) + len(ctx.options)))

    def tangents(ctx: Any, *of_arguments: torch.Tensor | None) -> Results:
        if isinstance(tangent_op, str):
            raise NotImplementedError(tangent_op)
        out, lse, q, k, v, *rest = ctx.saved_tensors
        of_qkv = materialized(of_arguments, q, k, v)
        found: Results = first_order(tangent_op, *of_qkv, q, k, v, out, lse, *rest, *ctx.options)
        return found

    def empty_gradients(
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *rest: torch.Tensor | float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def empty_tangents(
        q_tangent: torch.Tensor,
        k_tangent: torch.Tensor,
        v_tangent: torch.Tensor,
        q: torch.Tensor,
        *rest: torch.Tensor | float | None,
    ) -> Results:
        return empty_outputs(q)

    forward_op.register_autograd(gradients, setup_context=setup_context)
    backward_op.register_fake(empty_gradients)
    if not isinstance(tangent_op, str):
        tangent_op.register_fake(empty_tangents)
    return transformable(forward_op, setup_context, gradients, tangents)
