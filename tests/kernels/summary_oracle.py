"""Attention to summary keys by the definition, pair by pair in float64."""

from __future__ import annotations

import torch

from diffattn.blocks import unpack_bits


def summary_truth(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    *,
    block_q: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `(batch, tokens, heads, head_dim)` and LSE `(batch, heads, tokens)`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    is_hidden = unpack_bits(hidden, k.shape[1])
    is_hidden = is_hidden.repeat_interleave(block_q, 2)[:, :, : q.shape[1]]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    scores = (scores + bias[:, :, None].double()).masked_fill(is_hidden, -torch.inf)
    # A query without a key would have a gradient of NaN: its scores are constants.
    blind = scores.isneginf().all(-1, keepdim=True)
    some = scores.masked_fill(blind, 0)
    lse = some.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    weights = some.softmax(-1).masked_fill(blind, 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()), lse
