"""Launches of the kernels that attend to summary keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffattn.kernels.summary.triton_passes import backward, forward

from .launches import HEADS, Constants, Launch, Tile, Work

_TOKENS = 600
_KEYS = 90
_BLOCK = 64
# Loops that carry products, per kernel, and the products of one pair of tiles.
_PRODUCTS = {"forward_kernel": 2, "queries_kernel": 3, "keys_kernel": 4}


@dataclass(frozen=True)
class Case:
    """Arguments of a call."""

    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"d{self.head_dim} {str(self.dtype).removeprefix('torch.')}"


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration; float32, which is alike on all, comes once."""
    cases = [Case(head_dim, torch.bfloat16) for head_dim in (64, 80, 128, 256)]
    if arch == 80:
        cases += [Case(head_dim, torch.float32) for head_dim in (64, 128, 256)]
    for case in cases:
        yield from launches(case)


def launches(case: Case) -> Iterator[Launch]:
    """The launches of both passes."""
    q = torch.zeros(1, _TOKENS, HEADS, case.head_dim, dtype=case.dtype)
    k = torch.zeros(1, _KEYS, HEADS, case.head_dim)
    bias = torch.zeros(1, 1, _KEYS)
    hidden = torch.zeros(1, HEADS, -(-_TOKENS // _BLOCK), -(-_KEYS // 32), dtype=torch.int32)
    lse = torch.zeros(1, HEADS, _TOKENS)
    call = q, k, k, bias, hidden, _BLOCK, 0.1
    yield Launch("summary", "plain", str(case), lambda: forward(*call), _work)
    onto = torch.zeros_like(q), lse
    continued = f"{case} continued"
    yield Launch("summary", "plain", continued, lambda: forward(*call, onto=onto), _work)
    yield Launch("summary", "plain", str(case), lambda: backward(q, None, q, lse, *call), _work)


def _work(function: str, constants: Constants) -> Work | None:
    if function not in _PRODUCTS:
        return None
    queries, keys = constants["BLOCK_M"], constants["BLOCK_N"]
    macs = _PRODUCTS[function] * queries * keys * constants["BLOCK_D"]
    return Work(function.removesuffix("_kernel"), (Tile("all", f"{queries}x{keys}", macs),))
