"""Launches of the kernels of linear attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from diffattn.kernels.linear.triton_passes import apply, collect, denominator_gradient, pull_back

from .launches import HEADS, Constants, Launch, Tile, Work

_TOKENS = 600
SLA_FEATURES = ("softmax", "relu")  # beside those of LinFusion
_WITH_PRODUCTS = ("collect_kernel", "apply_kernel", "pull_back_kernel")


@dataclass(frozen=True)
class Case:
    """Arguments of a call."""

    head_dim: int
    dtype: torch.dtype
    rotation: bool = False
    key_mask: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("rotation", "key_mask") if getattr(self, name)]
        return " ".join([f"d{self.head_dim} {str(self.dtype).removeprefix('torch.')}", *flags])


# Every entry of the tables of tiles, with the options that take most registers.
_ENTRIES = tuple(Case(d, torch.float16, rotation=True, key_mask=True) for d in (64, 128, 256))
# Every other constant that a kernel is compiled for.
_CONSTANTS = tuple(Case(head_dim, torch.bfloat16) for head_dim in (80, 128))
# float32 uses no matrix units: slow to compile.
_FLOAT32 = tuple(Case(d, torch.float32, rotation=True, key_mask=True) for d in (64, 128, 256))


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration; one that is alike on several architectures comes once."""
    for case in _ENTRIES + (_CONSTANTS + _FLOAT32 if arch == 80 else ()):
        yield from launches(case)


def launches(case: Case) -> Iterator[Launch]:
    """The launches of all passes."""
    x = torch.zeros(1, _TOKENS, HEADS, case.head_dim, dtype=case.dtype)
    rotation = torch.zeros(2, _TOKENS, case.head_dim // 2) if case.rotation else None
    key_mask = torch.ones(1, _TOKENS, dtype=torch.bool) if case.key_mask else None
    factor = torch.zeros(1, _TOKENS, HEADS)
    state = torch.zeros(1, HEADS, case.head_dim, case.head_dim)
    mean = torch.zeros(1, HEADS, case.head_dim)
    passes: dict[str, Callable[[], object]] = {
        "state": lambda: collect(x, x, rotation, key_mask),
        "output": lambda: apply(x, state, mean, 1e-4, rotation, None),
        "dk": lambda: pull_back(x, x, state, mean, rotation, key_mask),
        "dv": lambda: apply(x, state, None, 0.0, rotation, key_mask),
        "denominator": lambda: denominator_gradient(x, x, factor),
        "dq": lambda: pull_back(x, x, state, mean, rotation, None, factor, factor),
        "d_state": lambda: collect(x, x, rotation, None, factor, factor),
    }
    for name in SLA_FEATURES:
        passes[f"{name} state"] = partial(collect, x, x, None, key_mask, features=name)
        passes[f"{name} output"] = partial(apply, x, state, mean, 1e-4, None, None, features=name)
    for name, run in passes.items():
        yield Launch("linear", name, str(case), run, _work)


def _work(function: str, constants: Constants) -> Work | None:
    if function not in _WITH_PRODUCTS:
        return None
    tokens, columns = constants["BLOCK_T"], constants["BLOCK_E"]
    macs = tokens * columns * constants["BLOCK_D"]
    # Only this kernel loops over columns.
    trips = -(-constants["D"] // columns) if function == "pull_back_kernel" else 1
    tile = Tile("all", f"{tokens}x{columns}", macs, trips)
    return Work(function.removesuffix("_kernel"), (tile,))
