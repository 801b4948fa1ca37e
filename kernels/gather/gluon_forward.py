"""The forward pass in Gluon, Triton's lower language, for Hopper GPUs: softmax beside products."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from ..block_sparse.descriptors import describable, tile_strides
from ..common.launch import is_hopper
from ..common.tile_tables import TileConfig
from ..common.variants import has_gluon
from .launch import SelectionProblem
from .selecting import Lists, QueryTiles

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Gluon is experimental: names and meanings change. The kernel was compiled with these versions.
TRITON_VERSIONS = ("3.6.", "3.9.")
_HEAD_DIMS = (64, 128)
_GROUP = 64  # queries of four warps


@cache
def available() -> bool:
    """Whether the installed Triton has the parts of Gluon that the kernel is written in."""
    return has_gluon(TRITON_VERSIONS, _kernel_module)


def takes(
    problem: SelectionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
) -> bool:
    """Whether `attend` takes a call.

    Shapes, strides, dtypes and addresses decide; the device is not waited for. False on anything
    but a Hopper GPU, and where `available` is false.
    """
    return (
        is_hopper(problem.device)
        and available()
        and not problem.has_key_mask
        and scale > 0
        and problem.head_dim in _HEAD_DIMS
        and all(map(describable, (q, k, v)))
    )


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    lists: Lists,
    tiles: QueryTiles,
    part: torch.Tensor,
    part_lse: torch.Tensor,
    *,
    first_pair: int,
    scale: float,
    config: TileConfig,
) -> None:
    """Write partial results, as `forward.forward_kernel` does, for calls that this module `takes`.

    Args:
        config: tiles of 128 queries and 64 or 128 keys; 4 warps for each group of 64 queries; 2 or
            more stages, as many as shared memory holds.
    """
    from triton.experimental.gluon import language as gl

    head_dim = q.shape[-1]
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    layout = gl.NVMMASharedLayout.get_default_for([_GROUP, head_dim], _dtype(q))
    _kernel_module().forward_kernel[(min(programs, tiles.list.numel()),)](
        q, _tiles(k, config.block_n), _tiles(v, config.block_n), part, part_lse,
        starts, lists.first, lists.query, lists.earlier, tiles.stop, tiles.list,
        *q.stride()[:3], first_pair, q.shape[1], q.shape[2], starts.shape[0] - 1,
        lists.first.shape[-1] - 1, tiles.stop.numel(), scale,
        D=head_dim, BLOCK_N=config.block_n, STAGES=config.num_stages, QUERIES=layout,
        num_warps=config.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _kernel_module() -> ModuleType:
    # Imported late: a change of an experimental API must not break the other kernels.
    return import_module(".gluon_kernel", __package__)


def _dtype(x: torch.Tensor) -> object:
    from triton.experimental.gluon import language as gl

    return gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16


def _tiles(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """Descriptor of tiles (1, tokens, 1, head_dim) of `(batch, tokens, heads, head_dim)`."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    block = [1, tokens, 1, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, _dtype(x))
    return TensorDescriptor(x, list(x.shape), tile_strides(x), block, layout)
