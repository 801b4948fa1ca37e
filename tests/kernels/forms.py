"""Attention by one given form of each block-sparse kernel, differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffattn.kernels.block_sparse.backward import key_gradients, query_gradients
from diffattn.kernels.block_sparse.forward_pass import forward
from diffattn.kernels.common.row_sums import row_sums
from diffattn.kernels.common.tile_tables import Choice, TileConfig


@dataclass(frozen=True)
class Forms:
    """Which form of which kernel runs."""

    forward: Choice
    queries: Choice
    keys: Choice


def forms(variant: str, **tiles: Any) -> Forms:
    """The same variant and tiles for all kernels."""
    config = TileConfig(**{"block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, **tiles})
    choice = Choice(variant, config)
    return Forms(choice, choice, choice)


def attend_by(
    forms: Forms,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: tuple[torch.Tensor, ...],
    key_mask: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of `(batch, tokens, heads, head_dim)` by the forms."""
    return _Attention.apply(q, k, v, layout, key_mask, forms, options)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, layout: Any, key_mask: Any, forms: Forms, options: Any
    ) -> Any:
        out, lse = forward(q, k, v, layout, key_mask, **options, choice=forms.forward)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (layout, key_mask, forms, options)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Any, grad_lse: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        layout, key_mask, forms, options = ctx.rest
        sums = row_sums(out, grad_out, lse, grad_lse, block_q=options["block_q"], wide=False)
        call = (q, k, v, grad_out, sums, layout, key_mask)
        dk, dv = key_gradients(*call, **options, choice=forms.keys)
        dq = query_gradients(*call, **options, choice=forms.queries)
        return dq, dk, dv, None, None, None, None
