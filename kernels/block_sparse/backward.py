"""The backward pass by the best kernels that take a call: dQ by rows, dK and dV by columns."""

from __future__ import annotations

import torch

from ..checks import LayoutTensors
from ..common.row_sums import RowSums, row_sums
from ..common.tile_tables import Choice
from ..common.variants import first_that_compiles
from .keys_gradient import keys_gradient
from .launch import Problem
from .queries_gradient import queries_gradient, tma_takes


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v; every call gives the same bits.

    Args:
        grad_out: gradient of the output, `(batch, tokens_q, heads, head_dim)`.
        grad_lse: gradient of the log-sum-exp, `(batch, heads, tokens_q)`; None for 0.
        q, k, v, layout, key_mask, block_q, block_kv, scale: arguments of the forward pass.
        out, lse: results of the forward pass.

    Returns:
        dq, dk, dv: like q, k and v.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv, scale, more=(out, grad_out))
    sums = row_sums(out, grad_out, lse, grad_lse, block_q=block_q, wide=problem.wide)
    dk, dv = _key_gradients(problem, q, k, v, grad_out, sums, None)
    return _query_gradients(problem, q, k, v, grad_out, sums, None), dk, dv


def query_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    sums: RowSums,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    choice: Choice | None = None,
) -> torch.Tensor:
    """The gradient of q, like q; arguments as those of `backward`.

    Args:
        sums: the row sums of the output and its gradient.
        choice: the only variant and tiles to run; by default the best variant that takes the call
            and compiles.

    Raises:
        ValueError: if the choice does not take the call.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv, scale, more=(grad_out,))
    return _query_gradients(problem, q, k, v, grad_out, sums, choice)


def _query_gradients(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    sums: RowSums,
    choice: Choice | None,
) -> torch.Tensor:
    def takes(variant: str) -> bool:
        return variant == "plain" or tma_takes(problem, k, v)

    def run(best: Choice) -> torch.Tensor:
        tma = best.variant == "tma"
        return queries_gradient(problem, q, k, v, grad_out, sums, best.tiles, tma=tma)

    return first_that_compiles("queries", problem, takes, run, choice)


def key_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    sums: RowSums,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    choice: Choice | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of k and v, like k and v; arguments as those of `backward`.

    Args:
        sums: the row sums of the output and its gradient.
        choice: the only variant and tiles to run; by default the best variant that takes the call
            and compiles.

    Raises:
        ValueError: if the choice does not take the call.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv, scale, more=(grad_out,))
    return _key_gradients(problem, q, k, v, grad_out, sums, choice)


def _key_gradients(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    sums: RowSums,
    choice: Choice | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    def takes(variant: str) -> bool:
        return variant == "plain" or problem.tma_takes(q, grad_out)

    def run(best: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        tma = best.variant == "tma"
        return keys_gradient(problem, q, k, v, grad_out, sums, best.tiles, tma=tma)

    return first_that_compiles("keys", problem, takes, run, choice)
