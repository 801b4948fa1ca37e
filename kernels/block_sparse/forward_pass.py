"""The forward pass by the best kernel that takes a call."""

from __future__ import annotations

import torch

from ..checks import LayoutTensors
from ..common.tile_tables import Choice
from ..common.variants import first_that_compiles
from . import gluon_forward
from .forward import forward as forward_by_tiles
from .launch import Problem


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    choice: Choice | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp; arguments as of `block_sparse_attention`, already checked.

    Args:
        choice: the only variant and tiles to run; by default the best variant that takes the call
            and compiles.

    Raises:
        ValueError: if the choice does not take the call.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv, scale)

    def takes(variant: str) -> bool:
        if variant == "gluon":
            return gluon_forward.takes(problem, q, k, v)
        return variant == "plain" or problem.tma_takes(k, v)

    def run(best: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        if best.variant == "gluon":
            return gluon_forward.forward(problem, q, k, v, best.tiles)
        return forward_by_tiles(problem, q, k, v, best.tiles, tma=best.variant == "tma")

    return first_that_compiles("forward", problem, takes, run, choice)
