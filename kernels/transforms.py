"""Operators under forward-mode derivatives and torch.func, for which torch has no registration.

A custom operator silently drops the tangents of its inputs: its `torch.func.jvp` is zero. A custom
operator with gradients cannot be called under `torch.func.grad`. An `autograd.Function` around the
operator supports both. So operators are called from within such a function under a transform.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .dispatch import Operator, is_forward_mode, is_noticed, needs_gradients

SECOND_ORDER = (
    "attention has first derivatives only, and a second one is asked for: a derivative of its"
    " gradient or of its tangent. Detach the tangent from the loss, call backward() outside of"
    " torch.func.jvp and dual_level, or pass backend='reference', which has second derivatives"
)


def is_transformed() -> bool:
    """Whether an operator has to be called from within an `autograd.Function`.

    In code that is being compiled only tangents count: the compiler handles the other transforms by
    itself.
    """
    return is_forward_mode() or (
        not torch.compiler.is_dynamo_compiling() and torch._C._are_functorch_transforms_active()
    )


def save(ctx: Any, *tensors: torch.Tensor | None) -> None:
    """Keep tensors for gradients, and for tangents where there may be any."""
    ctx.save_for_backward(*tensors)
    if is_forward_mode():
        ctx.save_for_forward(*tensors)


def transformable(
    operator: Operator,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., Any],
    tangents: Callable[..., Any],
) -> Callable[..., Any]:
    """Register an operator's gradients; a function to call in place of the operator.

    The function has tangents as well, and obeys torch.func.

    Args:
        setup_context, gradients: the functions that `register_autograd` takes. `setup_context`
            keeps tensors by `save`.
        tangents: `(ctx, *tangents of the arguments) -> tangents of the results`; None for an
            argument that has no tangent.
    """

    operator.registered.register_autograd(gradients, setup_context=setup_context)

    def of_arguments(ctx: Any, *grads: torch.Tensor | None) -> Any:
        # A list of tensors is one argument of a function, and several to the operator.
        return tuple(None if isinstance(x, list) else x for x in gradients(ctx, *grads))

    class Unnoticed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = operator.compute(*arguments)
            setup_context(ctx, arguments, output)
            return output

        backward = staticmethod(of_arguments)

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        backward = staticmethod(of_arguments)

        @staticmethod
        def jvp(ctx: Any, *of_arguments: torch.Tensor | None) -> Any:
            return tangents(ctx, *of_arguments)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
            return _one_by_one(call, info.batch_size, in_dims, arguments)

    def call(*arguments: Any) -> Any:
        if is_transformed():
            return _apply(Transformable, *arguments)
        if is_noticed(arguments):
            return operator.registered(*arguments)
        if needs_gradients(arguments):
            return Unnoticed.apply(*arguments)
        return operator.compute(*arguments)

    return call


def materialized(
    tangents: tuple[torch.Tensor | None, ...], *tensors: torch.Tensor
) -> list[torch.Tensor]:
    """The tangents of `tensors`, the first arguments of an operator: 0 where a tensor has none."""
    return [
        torch.zeros_like(x) if tangent is None else tangent
        for x, tangent in zip(tensors, tangents, strict=False)
    ]


def first_order(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that computes gradients or tangents and is itself not differentiable.

    Raises:
        NotImplementedError: under a transform, where an argument has a tangent, or from a
            backward() that goes through a result.
    """
    return _apply(_FirstOrder, function, *arguments) if is_transformed() else function(*arguments)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: all derivatives raise."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> NoReturn:
        raise NotImplementedError(SECOND_ORDER)

    @staticmethod
    def jvp(ctx: Any, *of_arguments: torch.Tensor | None) -> NoReturn:
        raise NotImplementedError(SECOND_ORDER)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _one_by_one(first_order, info.batch_size, in_dims, arguments)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    from .outside_graphs import apply_outside  # which imports Dynamo

    return apply_outside(function, *arguments)


def _one_by_one(
    call: Callable[..., Any], size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Call an operator for each entry of a mapped dimension, as torch.vmap does."""

    def entry(x: Any, dim: Any, i: int) -> Any:
        if isinstance(x, list):
            return [entry(part, of_part, i) for part, of_part in zip(x, dim, strict=True)]
        return x if dim is None else x.select(dim, i)

    results = [
        call(*(entry(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    stacked = tuple(torch.stack(of_all) for of_all in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
