"""Which calls the kernels of block selection take, in place of torch's operators."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from diffattn.kernels.transforms import is_transformed
from diffattn.operator import backend_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.bool)


def selection_kernels(x: torch.Tensor) -> ModuleType | None:
    """The module `diffattn.kernels.selection` if its kernels take `x`; None for torch's operators.

    The kernels have no gradients and no tangents. They run where attention runs on "triton".
    """
    device = x.device.type
    if backend_of(x.device) != "triton" or x.dtype not in _DTYPES:
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or is_transformed():
        return None
    if device == "meta" or torch.compiler.is_dynamo_compiling():
        return None
    kernels = _kernels()
    return None if kernels is None or (device == "cpu") != kernels.INTERPRETED else kernels


@functools.cache
def _kernels() -> ModuleType | None:
    # Where Triton is missing, attention says so.
    try:
        from diffattn.kernels import selection
    except ImportError:
        return None
    return selection
