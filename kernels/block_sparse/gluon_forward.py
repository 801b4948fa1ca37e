"""The forward pass in Gluon, Triton's lower language, for Hopper GPUs: softmax beside products.

The variant is the fastest on a Hopper GPU (benchmarks); it also demands the most of a call and
of the compiler.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..common.launch import is_hopper
from ..common.launching import launch
from ..common.tile_tables import TileConfig
from ..common.variants import has_gluon
from .descriptors import tile_strides
from .launch import Problem
from .walk import cached_rows

if TYPE_CHECKING:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Gluon is experimental: names and meanings change. The kernel was compiled with these versions.
TRITON_VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_HEAD_DIMS = (64, 128)
_QUERIES = 128  # per program: two groups of 64
_SHARED_MEMORY = 227 * 1024  # bytes that a program on a Hopper GPU can have
_SMALL_BUFFERS = 1024  # bytes: row sums and barriers, and some to spare


@cache
def available() -> bool:
    """Whether the installed Triton has the parts of Gluon that the kernel is written in."""
    return has_gluon(TRITON_VERSIONS, _kernel_module)


def takes(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `forward` takes a call.

    Shapes, strides, dtypes and addresses decide; the device is not waited for. False on anything
    but a Hopper GPU, and where `available` is false.
    """
    return (
        available()
        and is_hopper(problem.device)
        and not problem.has_key_mask
        and problem.scale > 0
        and problem.head_dim in _HEAD_DIMS
        and problem.block_q % _QUERIES == 0
        and problem.tma_takes(q, k, v)
    )


def forward(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: TileConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp, for calls that this module `takes`.

    Lists of full blocks may be in any order.

    Args:
        config: tiles of 128 queries and 64 or 128 keys, the same in full and in partial blocks; 4
            warps for each group of 64 queries; 2 or more stages, as many as shared memory holds;
            ahead or not.

    Raises:
        ValueError: if the tiles are not what the kernel takes.
    """
    _check_config(config, problem.head_dim, problem.block_kv)
    batch, tokens_q, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    rows = cached_rows(problem.layout, k.shape[1], problem.block_kv)
    n_rows = rows.order.shape[-1]
    group = _QUERIES // 2
    with problem.on_device():
        launch(
            _kernel_module().forward_kernel,
            batch * heads * n_rows * (problem.block_q // _QUERIES),
            (_tiles(q, group), _tiles(k, config.block_n), _tiles(v, config.block_n),
             _tiles(out, group), lse, rows.order, *problem.rows_layout(rows)),
            (*problem.layout_strides,
             tokens_q, k.shape[1], heads, n_rows,
             problem.layout[1].shape[-1], problem.layout[3].shape[-1]),
            (problem.scale,),
            D=head_dim, BLOCK_Q=problem.block_q, BLOCK_KV=problem.block_kv, BLOCK_N=config.block_n,
            STAGES=config.num_stages, AHEAD=config.ahead,
            num_warps=config.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _kernel_module() -> ModuleType:
    # Imported late: a change of an experimental API must not break the other kernels.
    return import_module(".gluon_kernel", __package__)


def _check_config(config: TileConfig, head_dim: int, block_kv: int) -> None:
    block_n, stages = config.block_n, config.num_stages
    if config != TileConfig(_QUERIES, block_n, 4, stages, ahead=config.ahead) or stages < 2:
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


def _tiles(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """Descriptor of tiles (1, tokens, 1, head_dim) of `(batch, tokens, heads, head_dim)`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    head_dim = x.shape[-1]
    layout = _shared_layout(tokens, head_dim, x.dtype)
    return TensorDescriptor(x, list(x.shape), tile_strides(x), [1, tokens, 1, head_dim], layout)


@cache  # Triton takes 10 us to choose a layout, and a launch needs four
def _shared_layout(tokens: int, head_dim: int, dtype: torch.dtype) -> NVMMASharedLayout:
    """How a tile (1, tokens, 1, head_dim) lies in shared memory."""
    from triton.experimental.gluon import language as gl

    of_elements = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, tokens, 1, head_dim], of_elements)
