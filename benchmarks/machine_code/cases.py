"""What is launched: every shipped configuration of every Triton kernel, or one of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from diffattn.blocks import FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import hopper
from diffattn.kernels.block_sparse.backward import backward
from diffattn.kernels.block_sparse.configs import TileConfig
from diffattn.kernels.block_sparse.forward import forward
from diffattn.kernels.block_sparse.launch import Problem

HEADS = 2
BLOCKS_PER_SIDE = 2
# Matrix products per tile.
PRODUCTS = {"forward": 2, "queries": 3, "keys": 4}


@dataclass(frozen=True)
class Tile:
    """What a loop works on per iteration.

    Attributes:
        name: of the loop.
        shape: for the table.
        macs: multiplications that its matrix products need.
    """

    name: str
    shape: str
    macs: int


@dataclass(frozen=True)
class Work:
    """The loops with matrix products of a kernel.

    Attributes:
        tiles: in the order of the loops in the code.
        groups: of warps that each work on their part of a tile, with a copy of the loops.
    """

    tiles: tuple[Tile, ...]
    groups: int = 1


@dataclass(frozen=True)
class Launch:
    """One call that starts kernels.

    Attributes:
        kernel, variant, case: for the table.
        run: the call.
        work: that of a kernel, from its function's name and its compile-time arguments.
        specialized: whether some of the warps are to do nothing but copy.
    """

    kernel: str
    variant: str
    case: str
    run: Callable[[], object]
    work: Callable[[str, dict[str, Any]], Work | None]
    specialized: bool = False


@dataclass(frozen=True)
class Case:
    """Arguments of a block-sparse call.

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
        return f"d{self.head_dim} {dtype} {self.block_q}x{self.block_kv} {' '.join(flags)}".strip()

    def layout(self) -> BlockLayout:
        states = torch.full((BLOCKS_PER_SIDE, BLOCKS_PER_SIDE), FULL, dtype=torch.uint8)
        if self.partial:
            states[0, 1] = PARTIAL
        tokens = [BLOCKS_PER_SIDE * n - 5 * self.ragged for n in (self.block_q, self.block_kv)]

        def bits(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return torch.eye(self.block_q, self.block_kv, dtype=torch.bool).expand(len(row), -1, -1)

        return layout_from_states(
            states, bits, tokens_q=tokens[0], tokens_kv=tokens[1],
            block_q=self.block_q, block_kv=self.block_kv,
        )  # fmt: skip


def block_sparse(
    case: Case, kernel: str, variant: str = "plain", tiles: TileConfig | None = None
) -> Launch:
    """The launch of one block-sparse kernel.

    Args:
        kernel: "forward", "queries" or "keys".
        tiles: instead of the shipped ones.
    """
    layout = case.layout()
    q = torch.zeros(1, layout.tokens_q, HEADS, case.head_dim, dtype=case.dtype)
    k, v = (q.new_zeros(1, layout.tokens_kv, HEADS, case.head_dim) for _ in range(2))
    key_mask = torch.ones(k.shape[:2], dtype=torch.bool) if case.key_mask else None
    options: dict[str, Any] = {
        "block_q": case.block_q, "block_kv": case.block_kv, "scale": case.head_dim**-0.5,
    }  # fmt: skip
    inputs = (q, k, v, layout.tensors, key_mask)
    if kernel == "forward":
        call = {
            "plain": forward,
            "tma": hopper.forward_tma,
            "tma_ws": hopper.forward_warp_specialized,
        }[variant]
        run: Callable[[], object] = lambda: call(*inputs, **options, config=tiles)  # noqa: E731
    else:
        lse = q.new_zeros(1, HEADS, layout.tokens_q, dtype=torch.float32)

        def run() -> object:
            with _tiles(tiles):
                return backward(q, None, q, k, v, q, lse, layout.tensors, key_mask, **options)

    specialized = variant in ("tma_ws", "gluon")
    groups = 2 if specialized else 1
    names = ("full",) if specialized and not case.partial else ("full", "partial")

    def work(function: str, constants: dict[str, Any]) -> Work | None:
        if kernel not in function and kernel != "forward":
            return None
        return _attention(PRODUCTS[kernel], names, groups, constants)

    return Launch(kernel, variant, str(case), run, work, specialized)


def _tiles(tiles: TileConfig | None) -> AbstractContextManager[object]:
    if tiles is None:
        return nullcontext()
    return mock.patch.object(Problem, "tiles", lambda self, kernel: tiles)


def _attention(
    products: int, names: tuple[str, ...], groups: int, constants: dict[str, Any]
) -> Work:
    """Loops over tiles of queries and keys."""
    block_m, block_n = constants["BLOCK_M"], constants["BLOCK_N"]
    macs = products * block_m * block_n * constants["BLOCK_D"]
    return Work(tuple(Tile(name, f"{block_m}x{block_n}", macs) for name in names), groups)


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration."""
    for head_dim in (64, 128, 256):
        case = Case(head_dim, torch.bfloat16)
        yield block_sparse(case, "forward")
        if arch == 90:
            yield block_sparse(case, "forward", "tma")
            full = Case(head_dim, torch.bfloat16, partial=False)
            yield block_sparse(full, "forward", "tma_ws")
        yield block_sparse(case, "queries")
        yield block_sparse(case, "keys")
