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
        block_m, block_n: queries and keys per tile in full blocks; at most those of a block.
        num_warps, num_stages: as Triton takes them.
        partial: tokens of the walked side per tile in partial blocks (queries for dK and dV, keys
            for the others); None: as in full ones.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    partial: int | None = None


@dataclass(frozen=True)
class Choice:
    """A form of a kernel, and how it is cut into tiles."""

    variant: str
    tiles: TileConfig


# By largest head_dim, for 16-bit inputs. A second entry is for calls with a key mask or a padded
# head_dim, which need registers for what is hidden.
_Row = tuple[TileConfig, TileConfig]
Table = dict[int, _Row]


def both(*config: int) -> _Row:
    return TileConfig(*config), TileConfig(*config)


def plain_masked(plain: tuple[int, ...], masked: tuple[int, ...]) -> _Row:
    return TileConfig(*plain), TileConfig(*masked)


@dataclass(frozen=True)
class Tables:
    """The tiles of some kernels, by name.

    Attributes:
        ampere: for mma.sync (sm_80 to sm_89 and sm_120).
        hopper: for wgmma.
        blackwell: for tcgen05 (sm_100).
        other: for other makers' GPUs, and NVIDIA's before sm_80.
        float32: for float32 on any of them.
    """

    ampere: dict[str, Table]
    hopper: dict[str, Table]
    blackwell: dict[str, Table]
    other: dict[str, Table]
    float32: dict[str, Table]

    def find(self, kernel: str, block_d: int, dtype: torch.dtype, *, masked: bool) -> TileConfig:
        """The tiles of a kernel on the current device; arguments as `tile_config`."""
        table = (self.float32 if dtype == torch.float32 else self._of_chip())[kernel]
        return next(row for largest, row in table.items() if block_d <= largest)[masked]

    def _of_chip(self) -> dict[str, Table]:
        if triton.knobs.runtime.interpret:
            return self.ampere
        target = triton.runtime.driver.active.get_current_target()
        if target.backend != "cuda" or target.arch < 80:
            return self.other
        return {9: self.hopper, 10: self.blackwell}.get(target.arch // 10, self.ampere)


# mma.sync (sm_80 to sm_89 and sm_120): all within the 99 KiB of the consumer chips.
_AMPERE: dict[str, Table] = {
    "forward": {
        64: both(128, 64, 4, 3),
        128: plain_masked((64, 64, 4, 2), (128, 32, 8, 3)),
        256: both(64, 32, 8, 2),
    },
    "queries": {
        64: plain_masked((128, 64, 8, 2), (64, 64, 8, 2)),
        128: both(64, 64, 8, 2),
        256: both(32, 32, 4, 2),
    },
    "keys": {
        64: both(64, 128, 8, 2),
        128: both(32, 64, 8, 2),
        256: both(32, 32, 8, 2),
    },
}

# wgmma: tiles of 64 queries and more per group of four warps.
_HOPPER: dict[str, Table] = {
    "forward": {
        64: plain_masked((128, 128, 8, 2), (128, 64, 8, 3)),
        128: plain_masked((128, 64, 8, 3), (128, 64, 8, 2)),
        256: both(64, 32, 8, 2),
    },
    "queries": {
        64: both(128, 64, 8, 2),
        128: plain_masked((128, 64, 8, 2), (64, 64, 8, 2)),
        256: both(64, 16, 8, 2),
    },
    "keys": {
        64: both(64, 128, 8, 2),
        128: both(32, 64, 8, 2),
        256: both(32, 32, 8, 2),
    },
}

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
        256: both(32, 32, 8, 2),
    },
}

# Other makers' GPUs, and NVIDIA's before sm_80: within 64 KiB of shared memory, and not tried.
_OTHER: dict[str, Table] = {
    kernel: {64: both(64, 32, 4, 1), 128: both(64, 32, 4, 1), 256: both(32, 16, 4, 1)}
    for kernel in ("forward", "queries", "keys")
}

# Twice the room; multiplied outside of the matrix units, unless TF32 is allowed.
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
    kernel: str, block_d: int, dtype: torch.dtype, block_q: int, block_kv: int, *, masked: bool
) -> TileConfig:
    """The tiles of a kernel on the current device.

    Args:
        kernel: "forward", "queries" (dQ) or "keys" (dK and dV).
        block_d: the padded head dimension.
        block_q, block_kv: tokens per block; tiles are not larger.
        masked: whether there is a key mask or padding in the head dimension.
    """
    config = _TABLES.find(kernel, block_d, dtype, masked=masked)
    return TileConfig(
        block_m=min(block_q, config.block_m),
        block_n=min(block_kv, config.block_n),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
