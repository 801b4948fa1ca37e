"""Autocast for attention: what `torch.autocast` does for `scaled_dot_product_attention`.

Norms and rotary embeddings give float32 in an autocast region, projections the dtype of the region.
So queries, keys and values come in different dtypes, and torch's attention casts them to the dtype
of the region. The kernels themselves choose their precision, and run with autocast switched off.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def cast_as_sdpa(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Tensors in the dtype of the autocast region; unchanged outside of a region.

    As torch does for its own attention, float64 and tensors of integers stay as they are.
    """
    device = tensors[0].device.type
    if not autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def without_autocast(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute` with autocast switched off, for a function whose first tensor tells the device."""

    @functools.wraps(compute)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        with autocast_off(device):
            return compute(*args, **kwargs)

    return run


def autocast_off(device: str) -> AbstractContextManager[object]:
    """A context with autocast switched off for a type of device."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


def autocast_is_on(device: str) -> bool:
    """Whether the caller is in an autocast region of a type of device."""
    # Of the devices that attention runs on, only "meta" has no autocast. The question that torch
    # has for that does not compile in torch 2.11.
    return device != "meta" and torch.is_autocast_enabled(device)
