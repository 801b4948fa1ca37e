"""Compiles every gather kernel for GPUs that need not be there, and prints what came out.

    python tests/kernels/compile_gather.py [--arch 80 90 ...] [--all]

As compile_configurations.py does for the block-sparse kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from compile_configurations import HEADS, examine, main

from diffattn.kernels.gather.backward import backward
from diffattn.kernels.gather.forward import forward

# Ragged blocks; what is compiled depends on neither their lengths nor their number.
STARTS = (0, 37, 300)


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
ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16) for head_dim in (48, 80, 192)),
)
KEY_MASKS = tuple(Case(head_dim, torch.bfloat16, key_mask=True) for head_dim in (64, 128, 256))
PADDED_KEY_MASKS = tuple(Case(head_dim, torch.float16, key_mask=True) for head_dim in (48, 80, 192))
# One table of tiles for all chips, and no matrix units: slow to compile.
FLOAT32 = tuple(Case(head_dim, torch.float32) for head_dim in (64, 128, 256))
PADDED_FLOAT32 = tuple(Case(head_dim, torch.float32, key_mask=True) for head_dim in (48, 80, 192))


def cases(arch: int, everything: bool) -> tuple[Case, ...]:
    """What to compile for an architecture: by default nothing twice that is alike on another."""
    if everything:
        return ENTRIES + KEY_MASKS + PADDED_KEY_MASKS + FLOAT32 + PADDED_FLOAT32
    return {80: ENTRIES + FLOAT32, 90: ENTRIES + KEY_MASKS}.get(arch, ENTRIES)


def launches(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    tokens = STARTS[-1]
    q, k, v = (torch.zeros(1, tokens, HEADS, case.head_dim, dtype=case.dtype) for _ in range(3))
    starts = torch.tensor(STARTS, dtype=torch.int32)
    bits = torch.ones(1, HEADS, tokens, 1, dtype=torch.int32)
    key_mask = torch.ones(1, tokens, dtype=torch.bool) if case.key_mask else None
    arguments = (q, k, v, starts, bits, key_mask)
    yield "forward", lambda: forward(*arguments, scale=0.1)
    lse = q.new_zeros(1, HEADS, tokens, dtype=torch.float32)
    yield (
        "backward",
        lambda: backward(q, None, q, k, v, q, lse, starts, bits, key_mask, scale=0.1),
    )


def check(arch: int, everything: bool = False) -> tuple[int, list[str]]:
    """Compile everything for one architecture; how many kernels there were, and what is wrong."""
    return examine(
        arch,
        (
            (name, str(case), launch)
            for case in cases(arch, everything)
            for name, launch in launches(case)
        ),
    )


if __name__ == "__main__":
    sys.exit(main(check))
