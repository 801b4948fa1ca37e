"""Dense attention in float64 with a boolean mask: the truth that kernels are tested against."""

from __future__ import annotations

import torch


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a token mask, computed in float64; differentiable by autograd.

    The function takes memory for every token pair: it is meant for tests.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)`; key length may differ from query length.
        mask: bool, broadcastable to `(batch, heads, tokens_q, tokens_kv)`, true where a query sees
            a key; None when every query sees every key.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that no query sees.

    Returns:
        out: float64 `(batch, tokens_q, heads, head_dim)`; 0 for a query that sees nothing.
        lse: float64 `(batch, heads, tokens_q)`, natural logarithm of the sum of the exponentials
            of a query's scores; -inf for a query that sees nothing.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    # A row without keys has no maximum; 0 keeps its exponentials at 0 instead of NaN.
    highest = scores.detach().amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -torch.inf, 0)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    sees_nothing = total == 0
    total = total.masked_fill(sees_nothing, 1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / total, v.double())
    lse = (highest + total.log()).masked_fill(sees_nothing, -torch.inf).squeeze(-1)
    return out, lse
