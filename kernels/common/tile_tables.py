"""How a kernel cuts its work into tiles, and tables of tiles by architecture and head_dim."""

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
        partial: tokens per tile of a partial block along the walked side, which is keys for
            "forward" and "queries", queries for "keys". Smaller than in full blocks where masks
            leave too few registers; None for as in full blocks.
        ahead: whether the product for a tile's scores runs one tile early ("forward" and
            "queries"). In the Gluon kernel, where all such products do: whether a mask's bits are
            read one tile early, and unpacked byte by byte.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    partial: int | None = None
    ahead: bool = False


@dataclass(frozen=True)
class Choice:
    """A variant of a kernel, and its tiles."""

    variant: str
    tiles: TileConfig


# Rows by largest head_dim. The second entry of a row is for calls with a key mask or a padded
# head_dim, whose masks need registers.
TileRow = tuple[TileConfig, TileConfig]
Table = dict[int, TileRow]


def both(*config: int, ahead: bool = False) -> TileRow:
    """A row with the same tiles for calls without and with masks."""
    return plain_masked(config, config, ahead=ahead)


def plain_masked(
    plain: tuple[int, ...], masked: tuple[int, ...], *, ahead: bool = False
) -> TileRow:
    """A row with tiles for calls without and with masks."""
    return _tiles(*plain, ahead=ahead), _tiles(*masked, ahead=ahead)


def _tiles(
    block_m: int, block_n: int, num_warps: int, num_stages: int, partial: int = 0, *, ahead: bool
) -> TileConfig:
    return TileConfig(block_m, block_n, num_warps, num_stages, partial or None, ahead)


@dataclass(frozen=True)
class Tables:
    """The tiles of some kernels, by name.

    Attributes:
        ampere: for mma.sync (sm_80 to sm_89 and sm_120).
        hopper: for wgmma.
        blackwell: for tcgen05 (sm_100).
        other: for other makers' GPUs, and NVIDIA's before sm_80.
        float32: for float32 on any GPU.
    """

    ampere: dict[str, Table]
    hopper: dict[str, Table]
    blackwell: dict[str, Table]
    other: dict[str, Table]
    float32: dict[str, Table]

    def find(self, kernel: str, block_d: int, dtype: torch.dtype, *, masked: bool) -> TileConfig:
        """The tiles of a kernel on the current device; arguments as of `tile_config`."""
        table = (self.float32 if dtype == torch.float32 else self._of_chip())[kernel]
        return row_of(table, block_d)[masked]

    def _of_chip(self) -> dict[str, Table]:
        if triton.knobs.runtime.interpret:
            return self.ampere
        target = triton.runtime.driver.active.get_current_target()
        if target.backend != "cuda" or target.arch < 80:
            return self.other
        return {9: self.hopper, 10: self.blackwell}.get(target.arch // 10, self.ampere)


def row_of(table: Table, block_d: int) -> TileRow:
    """The row of a head_dim; beyond the largest head_dim of the table, its last row."""
    *_, last = table.values()
    return next((row for largest, row in table.items() if block_d <= largest), last)
