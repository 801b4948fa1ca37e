"""Operators of torch, and the way around its dispatcher.

A custom operator takes the host 0.1 ms, twice that with gradients: as long as the rest of a call.
So the function of an operator is called directly where nothing notices the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.library import CustomOpDef

from .autocast import without_autocast

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Operator:
    """An operator of torch and its function.

    Attributes:
        registered: the operator, with its gradients if there are any.
        compute: the function, which has no gradients.
    """

    registered: CustomOpDef
    compute: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """The results, without the dispatcher where nothing notices the operator."""
        if is_noticed(arguments) or needs_gradients(arguments):
            return self.registered(*arguments)
        return self.compute(*arguments)


def operator(
    name: str, *, device_types: str | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the operator `diffattn::{name}`, which runs with autocast switched off.

    The function has type hints of tensors, lists of tensors and numbers, and changes no argument.

    Args:
        name: of the operator.
        device_types: the only type of device that the operator serves; None for any.
    """

    def of(function: Callable[..., Any]) -> Operator:
        compute = without_autocast(function)
        registered = torch.library.custom_op(
            f"diffattn::{name}", compute, mutates_args=(), device_types=device_types
        )
        return Operator(registered, compute)

    return of


def is_noticed(arguments: tuple[Any, ...]) -> bool:
    """Whether anything may tell a call of an operator from a call of its function.

    Compilers, tracers, profilers, modes and transforms see operators. A subclass of `torch.Tensor`
    may say what an operator does with it. The dispatcher gives tensors without data results without
    data, and negates tensors that are yet to be negated.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        or is_forward_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or any(type(x) not in _PLAIN or x.is_meta or x.is_neg() for x in _tensors(arguments))
    )


def needs_gradients(arguments: tuple[Any, ...]) -> bool:
    """Whether autograd records a call with these arguments."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(arguments))


def is_forward_mode() -> bool:
    """Whether tensors may have tangents: within `torch.func.jvp` or `dual_level`."""
    return forward_ad._current_level >= 0


def _tensors(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, list):
            found += x
    return found
