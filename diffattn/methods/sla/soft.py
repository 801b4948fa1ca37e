"""Soft selections of blocks, which a router can be trained through (SLA2, arXiv 2602.12675).

A hard selection is 0 or 1 for each pair of blocks. A soft one is a weight M between 0 and 1.
Softmax attention has the weights M exp(scores), normalised, and linear attention the rest, 1 - M.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from diffattn.kernels.autocast import without_autocast

# A logit of this size is a weight of 0 or 1.
_CERTAIN = 40.0
# Bytes of scores of token pairs in memory at a time.
_BYTES_AT_ONCE = 1 << 28


def soft_top(
    scores: torch.Tensor, count: float, tau: float, candidates: torch.Tensor
) -> torch.Tensor:
    """The logits of weights that sum to `count` in each row; differentiable in the scores.

    The weights are M = sigmoid(scores / tau + shift), with one shift for each row. The smaller
    `tau`, the nearer they are to the hard choice of the `count` best.

    Args:
        scores: (batch, heads, rows, columns), in float32 at least.
        count: sum of the weights of a row. A row of fewer candidates has all weights at 1.
        tau: the temperature.
        candidates: bool, broadcastable to `scores`: False for columns with the weight 0.

    Returns:
        (batch, heads, rows, columns), with -inf for columns that are no candidates.
    """
    scaled = scores / tau
    candidates = candidates.expand(scores.shape)
    with torch.no_grad():
        least = scaled.masked_fill(~candidates, torch.inf).amin(-1, keepdim=True)
        most = scaled.masked_fill(~candidates, -torch.inf).amax(-1, keepdim=True)
        low, high = (x.nan_to_num(0, 0, 0) for x in (-most - _CERTAIN, -least + _CERTAIN))
        for _ in range(torch.finfo(scores.dtype).bits):
            middle = (low + high) / 2
            weights = (scaled + middle).sigmoid().masked_fill(~candidates, 0)
            enough = weights.sum(-1, keepdim=True) >= count
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    # The sum stays at `count`: where scores move it, the shift moves it back.
    weights = (scaled + high).sigmoid().masked_fill(~candidates, 0)
    slope = (weights * (1 - weights)).sum(-1, keepdim=True).detach()
    total = weights.sum(-1, keepdim=True)
    tiny = torch.finfo(scores.dtype).tiny
    shift = high - (total - total.detach()) / slope.clamp(min=tiny)
    return (scaled + shift).masked_fill(~candidates, -torch.inf)


@without_autocast
def soft_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_weights: torch.Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention with a weight for each pair of blocks; differentiable.

    All token pairs are computed, some query blocks at a time; backward computes them again.

    Args:
        query: (batch, queries, heads, head_dim).
        key, value: (batch, keys, heads, head_dim).
        log_weights: (batch, heads, query blocks, key blocks), the logarithms of the weights. Keys
            past the last block have the weight 1.
        block_q, block_kv: tokens per block; the last block may be short.
        scale: factor of the scores; 1 / sqrt(head_dim) when None.
        counted: bool (batch, keys), False for keys that do not count.

    Returns:
        (batch, queries, heads, head_dim), in float32 at least.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, _, heads, head_dim = query.shape
    if counted is not None:
        key, value = (x.masked_fill(~counted[:, :, None, None], 0) for x in (key, value))
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    q = q * (head_dim**-0.5 if scale is None else scale)
    step = max(1, _BYTES_AT_ONCE // (batch * heads * block_q * key.shape[1] * 8))
    outs = []
    for first in range(0, log_weights.shape[2], step):
        part = q[:, :, first * block_q : (first + step) * block_q]
        weights = log_weights[:, :, first : first + step]
        arguments = part, k, v, weights, counted, block_q, block_kv
        if torch.is_grad_enabled():
            outs.append(checkpoint(_rows, *arguments, use_reentrant=False))
        else:
            outs.append(_rows(*arguments))
    return torch.cat(outs, 2).transpose(1, 2)


def _rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    log_weights: torch.Tensor,
    counted: torch.Tensor | None,
    block_q: int,
    block_kv: int,
) -> torch.Tensor:
    """The output of some query blocks, (batch, heads, queries, head_dim)."""
    queries, keys = query.shape[2], key.shape[2]
    of_keys = log_weights.repeat_interleave(block_kv, -1)[..., :keys]
    of_keys = F.pad(of_keys, (0, keys - of_keys.shape[-1]))
    scores = query @ key.mT + of_keys.repeat_interleave(block_q, 2)[:, :, :queries]
    if counted is not None:
        scores = scores.masked_fill(~counted[:, None, None], -torch.inf)
    out: torch.Tensor = scores.softmax(-1) @ value
    return out
