"""The backward pass by the best kernels for a call: dQ over rows, dK and dV over columns."""

from __future__ import annotations

from typing import TypedDict

import torch

from ..checks import LayoutTensors
from .configs import Choice
from .keys_gradient import keys_gradient, one_pass_takes
from .launch import Problem, tma_takes
from .queries_gradient import queries_gradient
from .row_sums import RowSums, row_sums
from .variants import first_that_compiles


class _Options(TypedDict):
    block_q: int
    block_kv: int
    scale: float


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
    """Gradients of q, k and v.

    The same bits at every call, unless dQ is computed in one pass with dK and dV: that is never the
    case under `torch.use_deterministic_algorithms`.

    Args:
        grad_out, grad_lse: gradients of the output and of the log-sum-exp, the latter or None.
        out, lse: what the forward pass returned; the rest is what it was given.
    """
    options = _Options(block_q=block_q, block_kv=block_kv, scale=scale)
    problem = Problem.of(q, k, v, layout, key_mask, **options, more=(out, grad_out))
    sums = row_sums(out, grad_out, lse, grad_lse, block_q=block_q, wide=problem.wide)
    call = (q, k, v, grad_out, sums, layout, key_mask)
    dq, dk, dv = key_gradients(*call, **options)
    if dq is None:
        dq = query_gradients(*call, **options)
    return dq, dk, dv


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
    """The gradient of q; arguments as `backward`.

    Args:
        choice: the only thing to run; by default the best that takes the call and compiles.

    Raises:
        ValueError: if the choice does not take the call.
    """
    options = _Options(block_q=block_q, block_kv=block_kv, scale=scale)

    def takes(variant: str) -> bool:
        return variant == "plain" or tma_takes(
            q, k, v, grad_out, block_q=block_q, block_kv=block_kv
        )

    def run(best: Choice) -> torch.Tensor:
        call = (q, k, v, grad_out, sums, layout, key_mask)
        return queries_gradient(*call, **options, config=best.tiles, tma=best.variant == "tma")

    problem = Problem.of(q, k, v, layout, key_mask, **options)
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
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of k and v, and that of q where it came along; arguments as `backward`.

    Args:
        choice: the only thing to run; by default the best that takes the call and compiles.

    Returns:
        dq: None but for the "one_pass" variant.
        dk, dv: like k and v.

    Raises:
        ValueError: if the choice does not take the call.
    """
    options = _Options(block_q=block_q, block_kv=block_kv, scale=scale)

    def takes(variant: str) -> bool:
        if variant == "one_pass" and not one_pass_takes(q, key_mask):
            return False
        return variant == "plain" or tma_takes(
            q, k, v, grad_out, block_q=block_q, block_kv=block_kv
        )

    def run(best: Choice) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        return keys_gradient(
            q, k, v, grad_out, sums, layout, key_mask, **options, config=best.tiles,
            tma=best.variant != "plain", one_pass=best.variant == "one_pass",
        )  # fmt: skip

    problem = Problem.of(q, k, v, layout, key_mask, **options)
    return first_that_compiles("keys", problem, takes, run, choice)
