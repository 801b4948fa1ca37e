"""The forward in Gluon, Triton's lower language, for Hopper GPUs: softmax while products run.

Faster than the other forms by what the compiler shows, and by far the most demanding one: chosen
only where a table of measured tiles names it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import triton

from ..checks import LayoutTensors
from .configs import TileConfig
from .launch import on_device
from .plan import cached_row_order

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Gluon is experimental: names and meanings change. The kernel was compiled with these versions.
TRITON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_HOPPER = (9, 0)
_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128)
_QUERIES = 128  # of a program: two groups of 64
_TMA_ALIGNMENT = 16  # bytes: of addresses and of every stride but the last
_MAX_TMA_STRIDE = 2**40  # bytes
_SHARED_MEMORY = 227 * 1024  # bytes that a program on a Hopper GPU can have
_SMALL_BUFFERS = 1024  # bytes: row sums and barriers, and some to spare


@cache
def available() -> bool:
    """Whether the installed Triton has the parts of Gluon that the kernel is written in."""
    if not triton.__version__.startswith(TRITON_VERSIONS):
        return False
    try:
        _kernel_module()
    except (ImportError, AttributeError):  # a build of Triton without Gluon
        return False
    return True


def takes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> bool:
    """Whether `forward` can do a call: from shapes, strides, dtypes and addresses, without waiting.

    False on anything but a Hopper GPU, and where `available` is false.
    """
    return (
        available()
        and _on_hopper(q.device)
        and key_mask is None
        and scale > 0
        and q.dtype in _DTYPES
        and q.shape[-1] in _HEAD_DIMS
        and block_q % _QUERIES == 0
        and block_kv % 64 == 0
        and all(_describable(x) for x in (q, k, v))
    )


def default_config(head_dim: int, block_kv: int) -> TileConfig:
    """Tiles of `forward`: 64 queries for each of two groups, and the keys that registers allow."""
    block_n = 128 if block_kv % 128 == 0 else 64
    stages = 2 if head_dim * block_n == 128 * 128 else 3
    return TileConfig(block_m=_QUERIES, block_n=block_n, num_warps=4, num_stages=stages)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward.forward`, for calls that `takes`. Lists of full blocks may be in any order.

    Args:
        config: tiles to use instead of `default_config`: 128 queries, 64 or 128 keys for both
            kinds of blocks, 4 warps (for each group of 64 queries), as many stages of keys and of
            values as shared memory holds.

    Raises:
        ValueError: if the call or the tiles are not what the kernel takes.
    """
    if not takes(q, k, v, layout, key_mask, block_q=block_q, block_kv=block_kv, scale=scale):
        raise ValueError(
            "the Gluon kernel does not take the call: it needs a Hopper GPU, Triton"
            f" {', '.join(f'{v}x' for v in TRITON_VERSIONS)} (found {triton.__version__}),"
            f" 16-bit inputs of head_dim {' or '.join(map(str, _HEAD_DIMS))} that the copy engine"
            f" can fetch, blocks of a multiple of {_QUERIES} queries and 64 keys, a positive scale"
            " and no key mask;"
            f" given {q.device}, {q.dtype}, head_dim {q.shape[-1]}, blocks {block_q}x{block_kv},"
            f" scale {scale}, key mask: {key_mask is not None}. Another variant takes it"
        )
    if config is None:
        config = default_config(q.shape[-1], block_kv)
    _check_config(config, q.shape[-1], block_kv)
    batch, tokens_q, heads, head_dim = q.shape
    samples, layout_heads, _ = layout[0].shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    order = cached_row_order(layout)
    rows = order.shape[-1]
    group = _QUERIES // 2
    with on_device(q.device):
        _kernel_module().forward_kernel[(batch * heads * rows * (block_q // _QUERIES),)](
            _tiles(q, group), _tiles(k, config.block_n), _tiles(v, config.block_n),
            _tiles(out, group), lse, order, *(x.contiguous() for x in layout),
            layout_heads if samples > 1 else 0, 1 if layout_heads > 1 else 0,
            tokens_q, k.shape[1], heads, rows, layout[1].shape[-1], layout[3].shape[-1], scale,
            D=head_dim, BLOCK_Q=block_q, BLOCK_KV=block_kv, BLOCK_N=config.block_n,
            STAGES=config.num_stages,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _kernel_module() -> ModuleType:
    # Imported late: an experimental API that has changed must not break everything else.
    return import_module(".gluon_kernel", __package__)


def _on_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == _HOPPER


def _check_config(config: TileConfig, head_dim: int, block_kv: int) -> None:
    block_n, stages = config.block_n, config.num_stages
    if config != TileConfig(_QUERIES, block_n, 4, stages) or stages < 2:
        raise ValueError(
            f"tiles of the Gluon kernel have {_QUERIES} queries, 4 warps, 2 or more stages and"
            f" no size of their own in partial blocks, got {config}"
        )
    if block_n not in (64, 128) or block_kv % block_n:
        raise ValueError(
            "tiles of the Gluon kernel have 64 or 128 keys, a divisor of a block's, got"
            f" {block_n} for blocks of {block_kv} keys"
        )
    needed = (_QUERIES + 2 * stages * block_n) * head_dim * 2 + _SMALL_BUFFERS
    if needed > _SHARED_MEMORY:
        raise ValueError(
            f"{stages} stages of {block_n} keys at head_dim {head_dim} take {needed} bytes of"
            f" shared memory, a program has {_SHARED_MEMORY}: use fewer stages"
        )


def _describable(x: torch.Tensor) -> bool:
    *strides, channel = x.stride()
    return (
        channel == 1
        and x.data_ptr() % _TMA_ALIGNMENT == 0
        and all(
            stride * x.element_size() % _TMA_ALIGNMENT == 0
            and 0 < stride * x.element_size() < _MAX_TMA_STRIDE
            for stride, size in zip(strides, x.shape, strict=False)
            if size > 1
        )
    )


def _tiles(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """Descriptor of tiles (1, tokens, 1, head_dim) of `(batch, tokens, heads, head_dim)`."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Nothing is a stride away from the only one, and what is written there need not be aligned.
    strides = [
        s if n > 1 else x.shape[-1] for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    ]
    block = [1, tokens, 1, x.shape[-1]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)
