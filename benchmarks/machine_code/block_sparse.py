"""Launches of the block-sparse kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from diffattn.blocks import FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import gluon_forward, queries_gradient
from diffattn.kernels.block_sparse.backward import key_gradients, query_gradients
from diffattn.kernels.block_sparse.configs import fitted, tile_config
from diffattn.kernels.block_sparse.forward_pass import forward
from diffattn.kernels.block_sparse.launch import Problem
from diffattn.kernels.common.launch import padded_head_dim
from diffattn.kernels.common.row_sums import RowSums, row_sums
from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.common.variants import KERNELS

from .launches import HEADS, Constants, Launch, Tile, Work

_BLOCKS_PER_SIDE = 2
# Matrix products per tile of scores.
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}
_GLUON_QUERIES = 128  # per tile; its kernel has no such constant
_GLUON_GROUPS = 2  # of four warps that multiply, while others copy


@dataclass(frozen=True)
class Case:
    """Arguments of a call.

    Attributes:
        ragged: whether the last block is short.
    """

    head_dim: int
    dtype: torch.dtype
    block_q: int = 128
    block_kv: int = 128
    partial: bool = True
    ragged: bool = True
    key_mask: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("partial", "ragged", "key_mask") if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([f"d{self.head_dim} {dtype} {self.block_q}x{self.block_kv}", *flags])

    def layout(self) -> BlockLayout:
        states = torch.full((_BLOCKS_PER_SIDE, _BLOCKS_PER_SIDE), FULL, dtype=torch.uint8)
        if self.partial:
            states[0, 1] = PARTIAL
        tokens = [_BLOCKS_PER_SIDE * n - 5 * self.ragged for n in (self.block_q, self.block_kv)]

        def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return torch.eye(self.block_q, self.block_kv, dtype=torch.bool).expand(len(row), -1, -1)

        return layout_from_states(
            states, bits, tokens_q=tokens[0], tokens_kv=tokens[1],
            block_q=self.block_q, block_kv=self.block_kv,
        )  # fmt: skip


# Every entry of the tables of tiles for 16-bit inputs, with and without a need for masks.
_ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16, key_mask=True) for head_dim in (64, 128, 256)),
)
# Every other constant that a kernel is compiled for.
_CONSTANTS = (
    Case(128, torch.bfloat16, 64, 64),
    Case(128, torch.bfloat16, partial=False, ragged=False),
    Case(32, torch.bfloat16, 16, 256),
)
# Layouts of full blocks only; the last one has blocks that are not square.
_FULL_ONLY = (
    *(Case(head_dim, torch.bfloat16, partial=False) for head_dim in (64, 128, 256)),
    Case(128, torch.bfloat16, 256, 64, partial=False),
)
# A padded head_dim, for the variant that runs by default.
_PADDED = Case(80, torch.bfloat16)
# float32 has one table of tiles for all chips, and no matrix units: slow to compile. A key mask
# takes the most registers.
_FLOAT32 = tuple(Case(d, torch.float32, key_mask=True) for d in (64, 128, 256))
# The only float32 entry that differs without a mask.
_FLOAT32_UNMASKED = (Case(256, torch.float32), "keys")


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration; one that is alike on several architectures comes once."""
    for case in _ENTRIES + {80: _FLOAT32, 90: _CONSTANTS}.get(arch, ()):
        yield row_sums_launch(case)
        for kernel in PRODUCTS:
            for variant in KERNELS[kernel]:
                if variant == "plain" or (arch == 90 and _takes(case, kernel, variant)):
                    yield launch(case, kernel, variant)
                    if variant == "gluon":  # in its other way, too, until a GPU has timed both
                        tiles = _shipped_tiles(case, kernel, variant)
                        yield launch(case, kernel, variant, replace(tiles, ahead=not tiles.ahead))
    if arch == 80:
        yield launch(*_FLOAT32_UNMASKED)
    if arch == 90:
        for kernel in PRODUCTS:
            yield launch(_PADDED, kernel, "tma")
        for case in _FULL_ONLY:
            yield launch(case, "forward", "tma")


def launch(
    case: Case, kernel: str, variant: str = "plain", tiles: TileConfig | None = None
) -> Launch:
    """The launch of one kernel.

    Args:
        kernel, variant: a kernel and one of its variants in `KERNELS`.
        tiles: used instead of the shipped tiles.
    """
    call = call_of(case)
    q, k, v, layout, key_mask = call
    per_query = q.new_zeros(1, HEADS, -(-q.shape[1] // case.block_q) * case.block_q).float()
    sums = RowSums(per_query, per_query)

    def run() -> object:
        choice = Choice(variant, tiles or _shipped_tiles(case, kernel, variant))
        options = {**options_of(case), "choice": choice}
        with _as_on_hopper():
            if kernel == "forward":
                return forward(*call, **options)
            gradients = query_gradients if kernel == "queries" else key_gradients
            return gradients(q, k, v, q, sums, layout, key_mask, **options)

    def work(function: str, constants: Constants) -> Work:
        has_masks = constants.get("HAS_PARTIAL", variant == "gluon")
        names = ("full", "partial") if has_masks else ("full",)
        groups = _GLUON_GROUPS if variant == "gluon" else 1
        return attention_work(kernel, PRODUCTS[kernel], names, constants, groups)

    way = " ahead" if variant == "gluon" and tiles and tiles.ahead else ""
    return Launch("block_sparse", variant, f"{case}{way}", run, work)


def row_sums_launch(case: Case) -> Launch:
    """The launch of the kernel of row sums."""
    q, *_ = call_of(case)
    lse = q.new_zeros(1, HEADS, q.shape[1], dtype=torch.float32)

    def run() -> object:
        return row_sums(q, q, lse, None, block_q=case.block_q, wide=False)

    return Launch("block_sparse", "plain", str(case), run, lambda *_: None)


def attention_work(
    kernel: str, products: int, names: tuple[str, ...], constants: Constants, groups: int = 1
) -> Work:
    """The work of a kernel that loops over tiles of queries and keys."""
    full = (constants.get("BLOCK_M", _GLUON_QUERIES), constants["BLOCK_N"])
    partial = (constants.get("PARTIAL_M", full[0]), constants.get("PARTIAL_N", full[1]))
    block_d = constants.get("BLOCK_D", constants["D"])
    tiles = []
    for name in names:
        m, n = partial if name == "partial" else full
        tiles.append(Tile(name, f"{m}x{n}", products * m * n * block_d))
    return Work(kernel, tuple(tiles), groups)


def call_of(case: Case) -> tuple[Any, ...]:
    """q, k, v, the tensors of the layout, and the key mask or None."""
    layout = case.layout()
    q = torch.zeros(1, layout.tokens_q, HEADS, case.head_dim, dtype=case.dtype)
    k, v = (q.new_zeros(1, layout.tokens_kv, HEADS, case.head_dim) for _ in range(2))
    key_mask = torch.ones(k.shape[:2], dtype=torch.bool) if case.key_mask else None
    return q, k, v, layout.tensors, key_mask


def options_of(case: Case) -> dict[str, Any]:
    """Block sizes and the scale."""
    scale = case.head_dim**-0.5
    return {"block_q": case.block_q, "block_kv": case.block_kv, "scale": scale}


def _takes(case: Case, kernel: str, variant: str) -> bool:
    """Whether a variant that is for Hopper GPUs takes a call."""
    call, options = call_of(case), options_of(case)
    q, k, v, *_ = call
    problem = Problem.of(*call, **options)
    if variant == "gluon":
        with _as_on_hopper():
            return gluon_forward.takes(problem, q, k, v)
    if kernel == "queries":
        return queries_gradient.tma_takes(problem, k, v)
    return problem.tma_takes(q, k, v)


def _as_on_hopper() -> Any:
    """A context in which the Gluon kernel takes the tensors' CPU for a Hopper GPU."""
    return mock.patch.object(gluon_forward, "is_hopper", return_value=True)


def _shipped_tiles(case: Case, kernel: str, variant: str) -> TileConfig:
    block_d = padded_head_dim(case.head_dim)
    masked = case.key_mask or case.head_dim != block_d
    tiles = tile_config(kernel, variant, block_d, case.dtype, masked=masked)
    return fitted(kernel, tiles, case.block_q, case.block_kv)
