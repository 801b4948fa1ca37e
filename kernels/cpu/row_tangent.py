"""Forward-mode derivative of attention of some query rows over some of the keys they visit.

Let p be the weights of the keys, which the log-sum-exp gives, t the tangents of the keys' scores, v
the values and dv the tangents of the values. A query's output then has the tangent
sum(p t v) + sum(p dv) - sum(p t) out, and its log-sum-exp has the tangent sum(p t).
"""

from __future__ import annotations

import torch


def add_tangent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor,
    k_tangent: torch.Tensor,
    v_tangent: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The terms of some keys in sum(p t v) + sum(p dv) and in sum(p t) of each query.

    Args:
        q, q_tangent: `(..., queries, head_dim)`.
        k, v, k_tangent, v_tangent: `(..., keys, head_dim)`.
        lse: `(..., queries)`, over all keys that a query sees; -inf where it sees none.
        bias: -inf where a key is hidden and 0 elsewhere, `(..., queries | 1, keys)`; None if none.

    Returns:
        The two sums over these keys, `(..., queries, head_dim)` and `(..., queries)`.
    """
    scores = (q @ k.mT).mul_(scale)
    if bias is not None:
        scores = scores.add_(bias)
    # A query without keys needs weights of 0: exp(-inf - 0).
    weights = scores.sub_(lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp_()
    moved = (q_tangent @ k.mT).add_(q @ k_tangent.mT).mul_(scale).mul_(weights)
    return moved @ v + weights @ v_tangent, moved.sum(-1)
