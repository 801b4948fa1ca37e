"""Compiles every kernel of linear attention for GPUs that need not be there; prints what came out.

    python tests/kernels/compile_linear.py [--arch 80 90 ...] [--all]

As compile_configurations.py does for the block-sparse kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from compile_configurations import HEADS, examine, main

from diffattn.kernels.linear_triton import apply, collect, denominator_gradient, pull_back

TOKENS = 600


@dataclass(frozen=True)
class Case:
    """Arguments of a call."""

    head_dim: int
    dtype: torch.dtype
    rotation: bool = False
    key_mask: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("rotation", "key_mask") if getattr(self, name)]
        return f"d{self.head_dim} {str(self.dtype).removeprefix('torch.')} {' '.join(flags)}"


# Every entry of the tables of tiles, with what needs most registers and with what needs least.
ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(d, torch.float16, rotation=True, key_mask=True) for d in (64, 128, 256)),
    *(Case(head_dim, torch.bfloat16) for head_dim in (40, 80, 160)),
)
# No matrix units: slow to compile.
FLOAT32 = tuple(Case(d, torch.float32, rotation=True, key_mask=True) for d in (64, 128, 256))


def launches(case: Case) -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.zeros(1, TOKENS, HEADS, case.head_dim, dtype=case.dtype)
    rotation = torch.zeros(2, TOKENS, case.head_dim // 2) if case.rotation else None
    key_mask = torch.ones(1, TOKENS, dtype=torch.bool) if case.key_mask else None
    factor = torch.zeros(1, TOKENS, HEADS)
    state = torch.zeros(1, HEADS, case.head_dim, case.head_dim)
    mean = torch.zeros(1, HEADS, case.head_dim)
    yield "state", lambda: collect(x, x, rotation, key_mask)
    yield "output", lambda: apply(x, state, mean, 1e-4, rotation, None)
    yield "dk", lambda: pull_back(x, x, state, mean, rotation, key_mask)
    yield "dv", lambda: apply(x, state, None, 0.0, rotation, key_mask)
    yield "denominator", lambda: denominator_gradient(x, x, factor)
    yield "dq", lambda: pull_back(x, x, state, mean, rotation, None, factor, factor)
    yield "d_state", lambda: collect(x, x, rotation, None, factor, factor)


def check(arch: int, everything: bool = False) -> tuple[int, list[str]]:
    """Compile everything for one architecture; how many kernels there were, and what is wrong."""
    cases = ENTRIES + FLOAT32 if everything or arch == 80 else ENTRIES
    return examine(
        arch, ((name, str(case), launch) for case in cases for name, launch in launches(case))
    )


if __name__ == "__main__":
    sys.exit(main(check))
