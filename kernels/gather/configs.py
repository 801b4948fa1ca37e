"""Tile sizes of the gather kernels: the largest tiles that compile without spilled registers.

As for the block-sparse kernels, the sizes come from compiling for each architecture; for Hopper at
head_dim 128 they come from timing on an H200. A program reads and writes its running sums once for
every tile of queries and every key block. The longer the key blocks and the larger the tiles of
queries, the less that costs.
"""

from __future__ import annotations

import torch

from ..common.tile_tables import Table, Tables, TileConfig, both, plain_masked

_AMPERE: dict[str, Table] = {
    "forward": {
        64: both(128, 64, 8, 3),
        128: both(128, 32, 8, 3),
        256: both(64, 32, 4, 2),
    },
    "queries": {
        64: plain_masked((64, 64, 4, 2), (64, 32, 4, 2)),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
    "keys": {
        64: plain_masked((64, 128, 8, 2), (64, 64, 4, 2)),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
}

_HOPPER: dict[str, Table] = {
    "forward": {
        64: both(128, 128, 8, 2, ahead=True),
        128: both(128, 64, 8, 3),
        256: both(64, 32, 4, 2),
    },
    "queries": {
        64: both(64, 128, 4, 2),
        128: plain_masked((128, 64, 8, 2), (64, 32, 4, 2)),
        256: both(64, 16, 4, 2),
    },
    "keys": {
        64: both(64, 64, 4, 2),
        128: both(32, 64, 4, 2),
        256: both(32, 32, 4, 2),
    },
}

_BLACKWELL: dict[str, Table] = {
    "forward": {
        64: both(128, 64, 8, 3),
        128: plain_masked((128, 32, 8, 3), (64, 32, 8, 2)),
        256: both(32, 32, 4, 2),
    },
    "queries": {
        64: both(128, 64, 8, 2),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
    "keys": {
        64: both(64, 128, 8, 2),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
}

# Tiles fit 64 KiB of shared memory, and are untried.
_OTHER: dict[str, Table] = {
    kernel: {64: both(64, 32, 4, 1), 128: both(64, 32, 4, 1), 256: both(32, 16, 4, 1)}
    for kernel in ("forward", "queries", "keys")
}

_FLOAT32: dict[str, Table] = {
    "forward": {64: both(32, 32, 8, 2), 128: both(16, 32, 8, 2), 256: both(16, 32, 16, 2)},
    "queries": {64: both(32, 32, 8, 2), 128: both(32, 16, 8, 2), 256: both(16, 32, 8, 2)},
    "keys": {64: both(32, 32, 8, 2), 128: both(16, 32, 16, 2), 256: both(16, 16, 16, 1)},
}

_TABLES = Tables(_AMPERE, _HOPPER, _BLACKWELL, _OTHER, _FLOAT32)


def tile_config(kernel: str, block_d: int, dtype: torch.dtype, *, masked: bool) -> TileConfig:
    """The shipped tiles of a kernel on the current device.

    Args:
        kernel: "gather_forward", "gather_queries" (dQ) or "gather_keys" (dK and dV).
        block_d: the padded head dimension.
        masked: whether there is a key mask or padding in the head dimension.
    """
    return _TABLES.find(kernel.removeprefix("gather_"), block_d, dtype, masked=masked)
