"""Attention as operators that `torch.compile` and autograd know, for every backend.

Operators over a layout have the same signature on every backend, and so have operators over
selected blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .checks import LayoutTensors
from .dispatch import Operator, operator
from .transforms import first_order, materialized, save, transformable

Results = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def empty_outputs(q: torch.Tensor) -> Results:
    """Empty output `(batch, tokens, heads, head_dim)` and LSE `(batch, heads, tokens)`."""
    batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=lse_dtype)


def over_layout(
    name: str,
    forward: Callable[..., Results],
    backward: Callable[..., Gradients],
    tangent: Callable[..., Results],
    *,
    device_types: str | None = None,
) -> tuple[Callable[..., Results], Callable[..., Gradients]]:
    """Register block-sparse attention as the operators `diffattn::{name}` and two more.

    Args:
        name: of the operator; its gradient is `{name}_backward`, its tangent `{name}_tangent`.
        forward: `(q, k, v, layout, key_mask, *, block_q, block_kv, scale) -> (out, lse)`.
        backward: `(grad_out, grad_lse | None, q, k, v, out, lse, layout, key_mask, ...)`, which
            returns the gradients of q, k and v.
        tangent: `((q_tangent, k_tangent, v_tangent), q, k, v, out, lse, layout, key_mask, ...)`,
            which returns the tangents of the output and of the LSE.
        device_types: the only type of device that the operators serve; None for any.

    Returns:
        attend: `(q, k, v, layout, key_mask, block_q, block_kv, scale) -> (out, lse)`,
            differentiable in q, k and v, in reverse and in forward mode.
        gradients: `(grad_out, grad_lse | None, q, k, v, out, lse, layout, key_mask, block_q,
            block_kv, scale)`, outside of autograd.
    """

    @operator(name, device_types=device_types)
    def forward_op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: list[torch.Tensor],
        key_mask: torch.Tensor | None, block_q: int, block_kv: int, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return forward(
            q, k, v, six(layout), key_mask, block_q=block_q, block_kv=block_kv, scale=scale
        )

    @operator(f"{name}_backward", device_types=device_types)
    def backward_op(
        grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        layout: list[torch.Tensor],
        key_mask: torch.Tensor | None, block_q: int, block_kv: int, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        return backward(
            grad_out, grad_lse, q, k, v, out, lse, six(layout), key_mask,
            block_q=block_q, block_kv=block_kv, scale=scale,
        )  # fmt: skip

    @operator(f"{name}_tangent", device_types=device_types)
    def tangent_op(
        q_tangent: torch.Tensor, k_tangent: torch.Tensor, v_tangent: torch.Tensor,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        layout: list[torch.Tensor],
        key_mask: torch.Tensor | None, block_q: int, block_kv: int, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return tangent(
            (q_tangent, k_tangent, v_tangent), q, k, v, out, lse, six(layout), key_mask,
            block_q=block_q, block_kv=block_kv, scale=scale,
        )  # fmt: skip

    return _differentiable(forward_op, backward_op, tangent_op), backward_op


def over_selection(
    name: str,
    forward: Callable[..., Results],
    backward: Callable[..., Gradients],
    tangent: Callable[..., Results] | str,
    *,
    device_types: str | None = None,
) -> Callable[..., Results]:
    """Register attention to selected key blocks as the operators `diffattn::{name}` and two more.

    Args:
        name, forward, backward, device_types: as for `over_layout`, but instead of a layout and its
            block sizes the functions take `(starts, bits)`.
        tangent: as for `over_layout`; or, if there is no tangent, the message of the error that is
            raised.

    Returns:
        `(q, k, v, [starts, bits], key_mask, scale) -> (out, lse)`, differentiable in q, k and v.
    """

    @operator(name, device_types=device_types)
    def forward_op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: list[torch.Tensor],
        key_mask: torch.Tensor | None, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        return forward(q, k, v, *selection, key_mask, scale=scale)

    @operator(f"{name}_backward", device_types=device_types)
    def backward_op(
        grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        selection: list[torch.Tensor], key_mask: torch.Tensor | None, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        return backward(grad_out, grad_lse, q, k, v, out, lse, *selection, key_mask, scale=scale)

    if isinstance(tangent, str):
        return _differentiable(forward_op, backward_op, tangent)

    @operator(f"{name}_tangent", device_types=device_types)
    def tangent_op(
        q_tangent: torch.Tensor, k_tangent: torch.Tensor, v_tangent: torch.Tensor,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
        selection: list[torch.Tensor], key_mask: torch.Tensor | None, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        tangents = (q_tangent, k_tangent, v_tangent)
        return tangent(tangents, q, k, v, out, lse, *selection, key_mask, scale=scale)

    return _differentiable(forward_op, backward_op, tangent_op)


def six(layout: list[torch.Tensor]) -> LayoutTensors:
    """The tensors of a layout, which operators take as a list."""
    full_count, full_index, partial_count, partial_index, partial_mask, bit_masks = layout
    return full_count, full_index, partial_count, partial_index, partial_mask, bit_masks


def _differentiable(
    forward_op: Operator, backward_op: Operator, tangent_op: Operator | str
) -> Callable[..., Results]:
    """Make an attention operator differentiable in q, k and v, in reverse and in forward mode.

    Args:
        forward_op: `(q, k, v, index, key_mask | None, *options) -> (out, lse)`, where index is a
            list of integer tensors and options are numbers.
        backward_op: `(grad_out, grad_lse | None, q, k, v, out, lse, index, key_mask, *options)`,
            which returns the gradients of q, k and v.
        tangent_op: `(q_tangent, k_tangent, v_tangent, q, k, v, out, lse, index, key_mask,
            *options)`, which returns the tangents of the output and of the LSE; or, if there is no
            tangent, the message of the error that is raised.

    Returns:
        A function to call in place of `forward_op`, which has no tangents.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        q, k, v, index, key_mask, *ctx.options = inputs
        save(ctx, *output, q, k, v, key_mask, *index)
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | list[None] | None, ...]:
        out, lse, q, k, v, key_mask, *index = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = first_order(
            backward_op, grad_out, grad_lse, q, k, v, out, lse, index, key_mask, *ctx.options
        )
        return (*grads, [None] * len(index), None, *[None] * len(ctx.options))

    def tangents(ctx: Any, *of_arguments: torch.Tensor | None) -> Results:
        if isinstance(tangent_op, str):
            raise NotImplementedError(tangent_op)
        out, lse, q, k, v, key_mask, *index = ctx.saved_tensors
        of_qkv = materialized(of_arguments, q, k, v)
        found: Results = first_order(
            tangent_op, *of_qkv, q, k, v, out, lse, index, key_mask, *ctx.options
        )
        return found

    def empty_gradients(
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *rest: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def empty_tangents(
        q_tangent: torch.Tensor,
        k_tangent: torch.Tensor,
        v_tangent: torch.Tensor,
        q: torch.Tensor,
        *rest: Any,
    ) -> Results:
        return empty_outputs(q)

    def empty_results(q: torch.Tensor, *rest: Any) -> Results:
        return empty_outputs(q)

    forward_op.registered.register_fake(empty_results)
    backward_op.registered.register_fake(empty_gradients)
    if not isinstance(tangent_op, str):
        tangent_op.registered.register_fake(empty_tangents)
    return transformable(forward_op, setup_context, gradients, tangents)
