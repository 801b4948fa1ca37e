"""Tile sizes of the plain kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts a block into tiles.

    Attributes:
        block_m, block_n: queries and keys per tile; at most those of a block.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_config(head_dim: int, dtype: torch.dtype, block_q: int, block_kv: int) -> TileConfig:
    """The forward kernel's tiles."""
    if dtype == torch.float32 or head_dim > 128:
        return TileConfig(min(block_q, 64), min(block_kv, 32), 4, 2)
    return TileConfig(min(block_q, 128), min(block_kv, 64), 8, 2)


def queries_config(head_dim: int, dtype: torch.dtype, block_q: int, block_kv: int) -> TileConfig:
    """The tiles of dQ."""
    return TileConfig(min(block_q, 64), min(block_kv, 32), 4, 2)


def keys_config(head_dim: int, dtype: torch.dtype, block_q: int, block_kv: int) -> TileConfig:
    """The tiles of dK and dV."""
    return TileConfig(min(block_q, 32), min(block_kv, 64), 4, 2)
