"""Launches of the forward-mode kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffattn.kernels.block_sparse.tangent import tangent
from diffattn.kernels.common.tile_tables import TileConfig

from .block_sparse import Case, attention_work, call_of, options_of
from .launches import HEADS, Constants, Launch, Work

# One for the scores, two for the tangents of the scores, two for the tangent of the output.
_PRODUCTS = 5
# Every entry of the table of tiles, without and with padding, except for the float32 entries
# beyond a head_dim of 64, which are known to spill.
_ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16, key_mask=True) for head_dim in (48, 80, 192)),
)
_FLOAT32 = (Case(64, torch.float32), Case(48, torch.float32, key_mask=True))


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration; one that is alike on several architectures comes once."""
    for case in _ENTRIES + (_FLOAT32 if arch == 80 else ()):
        yield launch(case)


def launch(case: Case, tiles: TileConfig | None = None) -> Launch:
    """The tangents of the output and of the log-sum-exp.

    Args:
        tiles: used instead of the shipped tiles.
    """
    q, k, v, layout, key_mask = call_of(case)
    lse = q.new_zeros(1, HEADS, q.shape[1], dtype=torch.float32)

    def run() -> object:
        return tangent(
            (q, k, v), q, k, v, q, lse, layout, key_mask, **options_of(case), config=tiles
        )

    return Launch("tangent", "plain", str(case), run, _work)


def _work(function: str, constants: Constants) -> Work:
    return attention_work("tangent", _PRODUCTS, ("full", "partial"), constants)
