<<<<<<< HEAD
"""Launches of the kernel of forward-mode derivatives."""
=======
"""Launches of the forward-mode kernel."""
>>>>>>> static

from __future__ import annotations

from collections.abc import Iterator

import torch

<<<<<<< HEAD
from diffattn.kernels.block_sparse.tangent import tangent

from .block_sparse import Case, attention_work
from .launches import HEADS, Constants, Launch, Work

# Scores, two products of their tangents, and the weights' and their tangents' with values.
_PRODUCTS = 5

# Every entry of the table of tiles, without and with padding in the head dimension and key mask.
=======
from diffattn.kernels.block_sparse.configs import TileConfig
from diffattn.kernels.block_sparse.tangent import tangent

from .block_sparse import Case, attention_work, call_of, options_of
from .launches import HEADS, Constants, Launch, Work

# Scores, two tangents of them, and the two of the output.
_PRODUCTS = 5
# Every entry of the table of tiles, without and with padding, except for the float32 ones beyond a
# head_dim of 64, which are known to spill.
>>>>>>> static
_ENTRIES = (
    *(Case(head_dim, torch.bfloat16) for head_dim in (64, 128, 256)),
    *(Case(head_dim, torch.float16, key_mask=True) for head_dim in (48, 80, 192)),
)
<<<<<<< HEAD
# One table of tiles for all chips. Those of larger head dimensions are known to spill.
=======
>>>>>>> static
_FLOAT32 = (Case(64, torch.float32), Case(48, torch.float32, key_mask=True))


def shipped(arch: int) -> Iterator[Launch]:
    """Every shipped configuration, and none twice that is alike on another architecture."""
<<<<<<< HEAD
    for case in _ENTRIES + _FLOAT32 if arch == 80 else _ENTRIES:
        yield launch(case)


def launch(case: Case) -> Launch:
    layout = case.layout()
    q = torch.zeros(1, layout.tokens_q, HEADS, case.head_dim, dtype=case.dtype)
    k = q.new_zeros(1, layout.tokens_kv, HEADS, case.head_dim)
    lse = q.new_zeros(1, HEADS, layout.tokens_q, dtype=torch.float32)
    key_mask = torch.ones(k.shape[:2], dtype=torch.bool) if case.key_mask else None

    def run() -> object:
        return tangent(
            (q, k, k), q, k, k, q, lse, layout.tensors, key_mask,
            block_q=case.block_q, block_kv=case.block_kv, scale=0.1,
        )  # fmt: skip
=======
    for case in _ENTRIES + (_FLOAT32 if arch == 80 else ()):
        yield launch(case)


def launch(case: Case, tiles: TileConfig | None = None) -> Launch:
    """The tangents of the output and of the log-sum-exp.

    Args:
        tiles: instead of the shipped ones.
    """
    q, k, v, layout, key_mask = call_of(case)
    lse = q.new_zeros(1, HEADS, q.shape[1], dtype=torch.float32)

    def run() -> object:
        return tangent(
            (q, k, v), q, k, v, q, lse, layout, key_mask, **options_of(case), config=tiles
        )
>>>>>>> static

    return Launch("tangent", "plain", str(case), run, _work)


<<<<<<< HEAD
def _work(function: str, constants: Constants) -> Work | None:
    if function != "tangent_kernel":
        return None
=======
def _work(function: str, constants: Constants) -> Work:
>>>>>>> static
    return attention_work("tangent", _PRODUCTS, ("full", "partial"), constants)
