"""Launches of the kernels that select blocks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from diffattn.kernels.selection import best_of_rows, listed, pooled, scores_of_parts

from .launches import HEADS, Constants, Launch, Tile, Work

_TOKENS = 600
_BLOCK = 64
_PARTS = 4
# From rows of one warp to the longest row.
_COLUMNS = (40, 1182, 1 << 14)


def shipped(arch: int) -> Iterator[Launch]:
    """Every form of the kernels; those that are alike on all chips come once."""
    for head_dim in (64, 80, 128, 256):
        yield from _of_parts(head_dim, torch.bfloat16)
    if arch != 90:
        return
    yield from _of_parts(128, torch.float32)
    for head_dim in (64, 80, 128, 256):
        yield from _pooling(head_dim, torch.bfloat16)
    yield from _pooling(128, torch.float32)
    for columns in _COLUMNS:
        yield from _of_rows(columns)


def _of_parts(head_dim: int, dtype: torch.dtype) -> Iterator[Launch]:
    means = torch.zeros(1, 70, _PARTS, HEADS, head_dim)
    there = torch.ones(1, 70, _PARTS, dtype=torch.bool)
    call = partial(scores_of_parts, means, means, there, there, 0.1, dtype)
    yield Launch("selection", "plain", f"d{head_dim} {_name(dtype)}", call, _work)


def _pooling(head_dim: int, dtype: torch.dtype) -> Iterator[Launch]:
    x = torch.zeros(1, _TOKENS, HEADS, head_dim, dtype=dtype)
    starts = torch.arange(0, _TOKENS + 1, _BLOCK, dtype=torch.int32)
    token, counted = torch.arange(_TOKENS), torch.ones(1, _TOKENS, dtype=torch.bool)
    for options in ({}, {"token": token}, {"token": token, "counted": counted}):
        case = " ".join([f"d{head_dim} {_name(dtype)}", *options])
        call = partial(pooled, x, starts, _BLOCK, **options)
        yield Launch("selection", "plain", case, call, _nothing)


def _of_rows(columns: int) -> Iterator[Launch]:
    scores = torch.zeros(1, HEADS, 3, columns)
    candidates = torch.ones(1, 1, 3, columns, dtype=torch.bool)
    counts = torch.ones(3, dtype=torch.int32)
    for case, call in {
        "list": partial(listed, candidates, columns),
        "best": partial(best_of_rows, scores, 2),
        "best candidates": partial(best_of_rows, scores, counts, candidates, ruled_out=True),
    }.items():
        yield Launch("selection", "plain", f"{columns} columns {case}", call, _nothing)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nothing(function: str, constants: Constants) -> None:
    return None


def _work(function: str, constants: Constants) -> Work | None:
    rows, columns = constants["BLOCK_R"], constants["BLOCK_C"]
    tile = Tile("all", f"{rows}x{columns}", rows * columns * constants["BLOCK_D"])
    return Work("parts", (tile,))
