"""What every attention operator tells the compiler and autograd: its results, its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import CustomOpDef


def empty_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `(batch, tokens, heads, head_dim)` and the LSE `(batch, heads, tokens)`, unset."""
    batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=lse_dtype)


def register_gradients(forward_op: CustomOpDef, backward_op: CustomOpDef) -> None:
    """Make an attention operator differentiable in q, k and v, by the output's and the LSE's.

    Args:
        forward_op: `(q, k, v, *tensors, *options) -> (out, lse)`; tensors may be None, options are
            numbers.
        backward_op: `(grad_out, grad_lse | None, q, k, v, out, lse, *tensors, *options)`, which
            returns the gradients of q, k and v.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*output, *tensors)
        ctx.options = inputs[len(tensors) :]
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        out, lse, q, k, v, *rest = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = backward_op(grad_out, grad_lse, q, k, v, out, lse, *rest, *ctx.options)
        return (*grads, *[None] * (len(rest) + len(ctx.options)))

    def empty_gradients(
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *rest: torch.Tensor | float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    forward_op.register_autograd(gradients, setup_context=setup_context)
    backward_op.register_fake(empty_gradients)
