"""Launches of the gather kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffattn.kernels.common.tile_tables import Choice, TileConfig
from diffattn.kernels.gather.backward import backward
from diffattn.kernels.gather.forward import forward

from .block_sparse import PRODUCTS, attention_work
from .launches import HEADS, Constants, Launch, Work

# Ragged blocks; the compiled kernels depend neither on the lengths nor on the number of blocks.
_STARTS = (0, 37, 300)


@dataclass(frozen=True)
class Case:
    """Arguments of a call."""

    head_dim: int
    dtype: torch.dtype
    key_mask: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"d{self.head_dim} {dtype}{' key_mask' * self.key_mask}"


# Every entry of the tables of tiles for 16-bit inputs. The second entry of a row is for padding in
# the head dimension, which takes the most registers, and for key masks.
_ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16) for head_dim in (48, 80, 192)),
)
_KEY_MASKS = (Case(128, torch.bfloat16, key_mask=True),)
# float32 has one table of tiles for all chips, and no matrix units: slow to compile.
_FLOAT32 = tuple(Case(head_dim, torch.float32) for head_dim in (64, 128, 256))


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration; one that is alike on several architectures comes once."""
    for case in _ENTRIES + {80: _FLOAT32, 90: _KEY_MASKS}.get(arch, ()):
        yield _forward(case, None)
        yield _backward(case)


def launch(case: Case, kernel: str, tiles: TileConfig) -> Launch:
    """A launch with given tiles for "forward", "queries" or "keys", else with shipped tiles."""
    choice = Choice("plain", tiles)
    if kernel == "forward":
        return _forward(case, choice)
    return _backward(
        case,
        queries=choice if kernel == "queries" else None,
        keys=choice if kernel == "keys" else None,
    )


def _forward(case: Case, choice: Choice | None) -> Launch:
    call = _call(case)
    return Launch(
        "gather", "plain", str(case), lambda: forward(*call, scale=0.1, choice=choice), _work
    )


def _backward(case: Case, queries: Choice | None = None, keys: Choice | None = None) -> Launch:
    q, k, v, *selection = _call(case)
    lse = q.new_zeros(1, HEADS, q.shape[1], dtype=torch.float32)

    def run() -> object:
        return backward(q, None, q, k, v, q, lse, *selection, scale=0.1, queries=queries, keys=keys)

    return Launch("gather", "plain", str(case), run, _work)


def _call(case: Case) -> tuple[Any, ...]:
    tokens = _STARTS[-1]
    q, k, v = (torch.zeros(1, tokens, HEADS, case.head_dim, dtype=case.dtype) for _ in range(3))
    starts = torch.tensor(_STARTS, dtype=torch.int32)
    bits = torch.ones(1, HEADS, tokens, 1, dtype=torch.int32)
    key_mask = torch.ones(1, tokens, dtype=torch.bool) if case.key_mask else None
    return q, k, v, starts, bits, key_mask


def _work(function: str, constants: Constants) -> Work | None:
    kernel = function.removesuffix("_kernel")
    if kernel not in PRODUCTS:
        return None
    if kernel == "keys":
        names: tuple[str, ...] = ("all",)
    elif constants["HAS_KEY_MASK"]:  # no tile is whole
        names = ("rest",)
    else:
        names = ("whole", "rest")
    work = attention_work(kernel, PRODUCTS[kernel], names, constants)
    if "REST_N" not in constants:
        return work
    of_rest = attention_work(
        kernel, PRODUCTS[kernel], ("rest",), {**constants, "BLOCK_N": constants["REST_N"]}
    )
    return replace(work, tiles=(*work.tiles[:-1], *of_rest.tiles))
