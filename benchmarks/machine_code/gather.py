"""Launches of the gather kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from diffattn.kernels.gather.backward import backward
from diffattn.kernels.gather.forward import forward

from .block_sparse import PRODUCTS, attention_work
from .launches import HEADS, Constants, Launch, Work

# Ragged blocks; what is compiled depends on neither their lengths nor their number.
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


# Every entry of the tables of tiles for 16-bit inputs: the second one is for padding in the head
# dimension, which takes the most registers, and for key masks.
_ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16) for head_dim in (48, 80, 192)),
)
_KEY_MASKS = (Case(128, torch.bfloat16, key_mask=True),)
# One table of tiles for all chips, and no matrix units: slow to compile.
_FLOAT32 = tuple(Case(head_dim, torch.float32) for head_dim in (64, 128, 256))


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration, and none twice that is alike on another architecture."""
    for case in _ENTRIES + {80: _FLOAT32, 90: _KEY_MASKS}.get(arch, ()):
        yield from launches(case)


def launches(case: Case) -> Iterator[Launch]:
    """The forward and the backward pass."""
    tokens = _STARTS[-1]
    q, k, v = (torch.zeros(1, tokens, HEADS, case.head_dim, dtype=case.dtype) for _ in range(3))
    starts = torch.tensor(_STARTS, dtype=torch.int32)
    bits = torch.ones(1, HEADS, tokens, 1, dtype=torch.int32)
    key_mask = torch.ones(1, tokens, dtype=torch.bool) if case.key_mask else None
    inputs = (q, k, v, starts, bits, key_mask)
    yield Launch("gather", "plain", str(case), lambda: forward(*inputs, scale=0.1), _work)
    lse = q.new_zeros(1, HEADS, tokens, dtype=torch.float32)
    yield Launch(
        "gather", "plain", str(case),
        lambda: backward(q, None, q, k, v, q, lse, starts, bits, key_mask, scale=0.1), _work,
    )  # fmt: skip


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
    return attention_work(kernel, PRODUCTS[kernel], names, constants)
