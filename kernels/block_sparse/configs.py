"""Tile sizes of the kernels, chosen by the machine code that the compiler makes.

Larger tiles read keys and values less often, and matrix units want tiles of 64 or more rows and
columns. Registers (accumulators are float32) and shared memory limit the tiles. The tiles for
Hopper at head_dim 64 and 128, fetched by the copy engine or in Gluon, are the fastest on an H200
(`benchmarks`). All others come from the machine code of each architecture
(`benchmarks/machine_code`), not from timing. A table that has been measured on a GPU takes
precedence: see `common/tuned.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..common.tile_tables import Table, Tables, TileConfig, both, plain_masked, row_of

# mma.sync (sm_80 to sm_89 and sm_120): all tiles fit the 99 KiB of the consumer chips.
_AMPERE: dict[str, Table] = {
    "forward": {
        64: both(128, 64, 4, 3),
        128: plain_masked((64, 64, 4, 2), (128, 32, 8, 3)),
        256: both(64, 32, 4, 2),
    },
    "queries": {
        64: plain_masked((128, 64, 8, 2), (64, 64, 4, 2)),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
    "keys": {
        64: both(64, 128, 8, 2),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
}

# wgmma: a group of four warps takes 64 rows of a product and all of its columns. Two groups need
# 128 rows (of keys for "keys", else of queries): with 64 rows both groups would compute the same.
_HOPPER: dict[str, Table] = {
    "forward": {
        64: both(128, 128, 8, 2, 64, ahead=True),
        128: both(128, 64, 8, 2, ahead=True),
        256: both(64, 32, 4, 2),
    },
    "queries": {
        64: both(128, 64, 8, 2),
        128: plain_masked((128, 64, 8, 2), (64, 64, 4, 2), ahead=True),
        256: both(64, 16, 4, 2),
    },
    "keys": {
        64: both(64, 64, 4, 2),
        128: both(32, 128, 8, 2),
        256: both(32, 32, 4, 2),
    },
}

# Hopper by TMA, which takes no registers for addresses.
_HOPPER_TMA: dict[str, Table] = {
    "forward": {
        64: both(128, 64, 4, 3, 64, ahead=True),
        128: both(128, 64, 8, 3, 64, ahead=True),
        256: plain_masked((128, 64, 8, 2, 32), (128, 32, 8, 2, 32)),
    },
    "queries": {
        64: both(64, 128, 4, 2, 64),
        128: both(128, 64, 8, 3, 64),
        256: both(64, 32, 4, 2, 32),
    },
    "keys": {
        64: both(64, 64, 4, 3, 64),
        128: both(64, 64, 4, 2, 32),
        256: both(32, 32, 4, 2, 32),
    },
}

_GLUON: Table = {64: both(128, 128, 4, 3), 128: both(128, 128, 4, 2)}

# tcgen05: accumulators are in tensor memory.
_BLACKWELL: dict[str, Table] = {
    "forward": {
        64: plain_masked((128, 128, 8, 2), (128, 64, 8, 3)),
        128: both(128, 64, 8, 3),
        256: plain_masked((128, 32, 8, 2), (64, 32, 8, 2)),
    },
    "queries": {
        64: plain_masked((128, 128, 8, 2), (64, 64, 8, 2)),
        128: both(128, 64, 8, 2),
        256: both(64, 16, 8, 2),
    },
    "keys": {
        64: plain_masked((64, 128, 8, 2), (64, 64, 4, 2)),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
}

# Other makers' GPUs, and NVIDIA's before sm_80: tiles fit 64 KiB of shared memory, and are untried.
_OTHER: dict[str, Table] = {
    kernel: {64: both(64, 32, 4, 1), 128: both(64, 32, 4, 1), 256: both(32, 16, 4, 1)}
    for kernel in ("forward", "queries", "keys")
}

# float32 takes twice the room, and no matrix unit multiplies it unless TF32 is allowed.
_FLOAT32: dict[str, Table] = {
    "forward": {64: both(32, 32, 8, 2), 128: both(16, 16, 8, 2), 256: both(16, 32, 8, 2)},
    "queries": {64: both(32, 32, 8, 2), 128: both(32, 16, 8, 2), 256: both(16, 16, 8, 2)},
    "keys": {
        64: both(16, 32, 8, 2),
        128: both(16, 32, 8, 2),
        256: plain_masked((16, 16, 8, 1), (16, 16, 16, 1)),
    },
}


_TABLES = Tables(_AMPERE, _HOPPER, _BLACKWELL, _OTHER, _FLOAT32)


def tile_config(
    kernel: str, variant: str, block_d: int, dtype: torch.dtype, *, masked: bool
) -> TileConfig:
    """The shipped tiles of a kernel on the current device.

    Args:
        kernel: "forward", "queries" (dQ) or "keys" (dK and dV).
        variant: one of `variants.KERNELS[kernel]`.
        block_d: the padded head dimension.
        masked: whether there is a key mask or padding in the head dimension.
    """
    if variant == "plain":
        return _TABLES.find(kernel, block_d, dtype, masked=masked)
    table = _GLUON if variant == "gluon" else _HOPPER_TMA[kernel]
    return row_of(table, block_d)[masked]


def fitted(kernel: str, config: TileConfig, block_q: int, block_kv: int) -> TileConfig:
    """Tiles no larger than a block, with no more warps than have rows of their own."""
    rows, most = (config.block_n, block_kv) if kernel == "keys" else (config.block_m, block_q)
    warps = config.num_warps
    while rows > most and warps > 4:
        rows, warps = rows // 2, warps // 2
    walked = block_q if kernel == "keys" else block_kv
    return replace(
        config,
        block_m=min(block_q, config.block_m),
        block_n=min(block_kv, config.block_n),
        num_warps=warps,
        partial=None if config.partial is None else min(walked, config.partial),
    )
