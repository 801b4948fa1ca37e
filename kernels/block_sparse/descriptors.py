"""Descriptors by which the copy engine (TMA) of Hopper GPUs and newer fetches tiles of a tensor."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16  # bytes: of addresses and of every stride but the last
_MAX_STRIDE = 2**40  # bytes
_DTYPES = (torch.float16, torch.bfloat16)


def describable(x: torch.Tensor) -> bool:
    """Whether the copy engine can fetch tiles of `(batch, tokens, heads, head_dim)`.

    The dtype, the strides and the address decide; the device is not waited for.
    """
    if x.dtype not in _DTYPES or x.stride(-1) != 1 or x.data_ptr() % _ALIGNMENT:
        return False
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        step = stride * x.itemsize
        if size > 1 and (not 0 < step < _MAX_STRIDE or step % _ALIGNMENT):
            return False
    return True


def tile_descriptor(x: torch.Tensor, tokens: int, block_d: int) -> TensorDescriptor:
    """A descriptor of tiles of `tokens` tokens of a head: 0 past the sequence and past head_dim.

    Args:
        x: `(batch, tokens, heads, head_dim)`, `describable`.
        tokens, block_d: shape of a tile; powers of 2 up to 256.
    """
    return TensorDescriptor(x, list(x.shape), tile_strides(x), [1, tokens, 1, block_d])


def tile_strides(x: torch.Tensor) -> list[int]:
    """The strides of a `describable` tensor as a descriptor takes them.

    No step is ever taken along a dimension of size 1: a valid stride replaces the tensor's own.
    """
    batch, tokens, heads, _ = x.shape
    s_b, s_t, s_h, _ = x.stride()
    return [
        s_b if batch > 1 else _ALIGNMENT,
        s_t if tokens > 1 else _ALIGNMENT,
        s_h if heads > 1 else _ALIGNMENT,
        1,
    ]
