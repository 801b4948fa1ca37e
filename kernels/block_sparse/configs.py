"""Tile sizes of the plain kernels: the largest that compile without spilled registers.

Larger tiles read keys and values less often, and matrix units want 64 and more of everything; what
limits them is registers (accumulators are float32) and shared memory. The tables come from
compiling for each architecture, not from timing: times will move entries, and the compile check
keeps them legal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


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


# By largest head_dim, for 16-bit inputs. A second entry is for calls with a key mask or a padded
# head_dim, which need registers for what is hidden.
_Row = tuple[TileConfig, TileConfig]
_Table = dict[int, _Row]


def _both(*config: int) -> _Row:
    return TileConfig(*config), TileConfig(*config)


def _plain_masked(plain: tuple[int, ...], masked: tuple[int, ...]) -> _Row:
    return TileConfig(*plain), TileConfig(*masked)


# mma.sync (sm_80 to sm_89 and sm_120): all within the 99 KiB of the consumer chips.
_AMPERE: dict[str, _Table] = {
    "forward": {
        64: _both(128, 64, 4, 3),
        128: _plain_masked((64, 64, 4, 2), (128, 32, 8, 3)),
        256: _both(64, 32, 8, 2),
    },
    "queries": {
        64: _plain_masked((128, 64, 8, 2), (64, 64, 8, 2)),
        128: _both(64, 64, 8, 2),
        256: _both(32, 32, 4, 2),
    },
    "keys": {
        64: _both(64, 128, 8, 2),
        128: _both(32, 64, 8, 2),
        256: _both(32, 32, 8, 2),
    },
}

# wgmma: tiles of 64 queries and more per group of four warps.
_HOPPER: dict[str, _Table] = {
    "forward": {
        64: _plain_masked((128, 128, 8, 2), (128, 64, 8, 3)),
        128: _plain_masked((128, 64, 8, 3), (128, 64, 8, 2)),
        256: _both(64, 32, 8, 2),
    },
    "queries": {
        64: _both(128, 64, 8, 2),
        128: _plain_masked((128, 64, 8, 2), (64, 64, 8, 2)),
        256: _both(64, 16, 8, 2),
    },
    "keys": {
        64: _both(64, 128, 8, 2),
        128: _both(32, 64, 8, 2),
        256: _both(32, 32, 8, 2),
    },
}

# tcgen05: accumulators are in tensor memory.
_BLACKWELL: dict[str, _Table] = {
    "forward": {
        64: _plain_masked((128, 128, 8, 2), (128, 64, 8, 3)),
        128: _both(128, 64, 8, 3),
        256: _plain_masked((128, 32, 8, 2), (64, 32, 8, 2)),
    },
    "queries": {
        64: _plain_masked((128, 128, 8, 2), (64, 64, 8, 2)),
        128: _both(128, 64, 8, 2),
        256: _both(64, 16, 8, 2),
    },
    "keys": {
        64: _plain_masked((64, 128, 8, 2), (64, 64, 4, 2)),
        128: _both(64, 64, 8, 2),
        256: _both(32, 32, 8, 2),
    },
}

# Other makers' GPUs, and NVIDIA's before sm_80: within 64 KiB of shared memory, and not tried.
_OTHER: dict[str, _Table] = {
    kernel: {64: _both(64, 32, 4, 1), 128: _both(64, 32, 4, 1), 256: _both(32, 16, 4, 1)}
    for kernel in ("forward", "queries", "keys")
}

# Twice the room; multiplied outside of the matrix units, unless TF32 is allowed.
_FLOAT32: dict[str, _Table] = {
    "forward": {64: _both(32, 32, 8, 2), 128: _both(16, 16, 8, 2), 256: _both(16, 32, 8, 2)},
    "queries": {64: _both(32, 32, 8, 2), 128: _both(32, 16, 8, 2), 256: _both(16, 16, 8, 2)},
    "keys": {
        64: _both(16, 32, 8, 2),
        128: _both(16, 32, 8, 2),
        256: _plain_masked((16, 16, 8, 1), (16, 16, 16, 1)),
    },
}


def tile_config(
    kernel: str, block_d: int, dtype: torch.dtype, block_q: int, block_kv: int, *, masked: bool
) -> TileConfig:
    """The tiles of a kernel on the current device.

    Args:
        kernel: "forward", "queries" (dQ) or "keys" (dK and dV).
        block_d: the padded head dimension.
        block_q, block_kv: tokens per block; tiles are not larger.
        masked: whether there is a key mask or padding in the head dimension.
    """
    table = (_FLOAT32 if dtype == torch.float32 else _chip_table())[kernel]
    config = next(row for largest, row in table.items() if block_d <= largest)[masked]
    return TileConfig(
        block_m=min(block_q, config.block_m),
        block_n=min(block_kv, config.block_n),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _chip_table() -> dict[str, _Table]:
    if triton.knobs.runtime.interpret:
        return _AMPERE
    target = triton.runtime.driver.active.get_current_target()
    if target.backend != "cuda" or target.arch < 80:
        return _OTHER
    return {9: _HOPPER, 10: _BLACKWELL}.get(target.arch // 10, _AMPERE)
