"""Attention to summary keys in torch's matrix products, for every device and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Scores that are in memory at a time.
_SCORES_AT_ONCE = 1 << 22


class TorchPasses:
    """The forward and the backward pass; arguments as of `summary_attention`."""

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        hidden: torch.Tensor,
        block_q: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tokens, heads, _ = q.shape
        dtype = torch.promote_types(q.dtype, torch.float32)
        k, v = (_existing(x.to(q.dtype), bias).to(dtype) for x in (k, v))
        out = q.new_empty(q.shape)
        lse = q.new_empty((batch, heads, tokens), dtype=dtype)
        for some, rows in _parts(q, k, block_q):
            scores = _scores(_by_head(q[:, some]).to(dtype), k, bias, hidden, rows, block_q, scale)
            highest = scores.amax(-1, keepdim=True)
            # A query without a key has no maximum: with 0 its weights are 0 instead of NaN.
            highest = highest.masked_fill(highest == -torch.inf, 0)
            weights = (scores - highest).exp_()
            total = weights.sum(-1, keepdim=True)
            out[:, some] = (weights @ v / total.masked_fill(total == 0, 1)).transpose(1, 2)
            lse[:, :, some] = (highest + total.log())[..., 0]
        return out, lse

    @staticmethod
    def backward(
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor,
        hidden: torch.Tensor,
        block_q: int,
        scale: float,
    ) -> Gradients:
        """The gradients of q, k, v, and of the bias for every sample and head."""
        dtype = lse.dtype
        k, v = (_existing(x.to(q.dtype), bias).to(dtype) for x in (k, v))
        dq = q.new_empty(q.shape)
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        dbias = k.new_zeros(k.shape[:3])
        for some, rows in _parts(q, k, block_q):
            queries, grad, result = (_by_head(x[:, some]).to(dtype) for x in (q, grad_out, out))
            scores = _scores(queries, k, bias, hidden, rows, block_q, scale)
            of_query = lse[:, :, some, None]
            sees_nothing = of_query == -torch.inf
            weights = (scores - of_query.masked_fill(sees_nothing, torch.inf)).exp_()
            delta = (grad * result).sum(-1, keepdim=True)
            if grad_lse is not None:
                # The log-sum-exp of a query without a key is constant, whatever gradient arrives.
                delta -= grad_lse[:, :, some, None].masked_fill(sees_nothing, 0)
            dv += weights.transpose(2, 3) @ grad
            d_scores = weights * (grad @ v.transpose(2, 3) - delta)
            dq[:, some] = (d_scores @ k * scale).transpose(1, 2)
            dk += d_scores.transpose(2, 3) @ queries * scale
            dbias += d_scores.sum(2)
        return dq, dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous(), dbias


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """`(batch, tokens, heads, head_dim)` as `(batch, heads, tokens, head_dim)`."""
    return x.transpose(1, 2)


def _existing(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`x` by head, with 0 for keys that do not exist: a NaN there must not reach a sum."""
    return _by_head(x).masked_fill((bias == -torch.inf)[..., None], 0)


def _parts(q: torch.Tensor, k: torch.Tensor, block_q: int) -> Iterator[tuple[slice, slice]]:
    """Parts of whole query blocks: the queries and the blocks of each."""
    batch, tokens, heads, _ = q.shape
    blocks = max(1, _SCORES_AT_ONCE // (batch * heads * k.shape[2] * block_q))
    for first in range(0, -(-tokens // block_q), blocks):
        stop = first + blocks
        yield slice(first * block_q, min(stop * block_q, tokens)), slice(first, stop)


def _scores(
    queries: torch.Tensor,
    k: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    rows: slice,
    block_q: int,
    scale: float,
) -> torch.Tensor:
    """Scores of some queries, `(batch, heads, queries, keys)`, -inf for keys they do not see."""
    words = hidden[:, :, rows]
    bits = torch.arange(k.shape[2], device=k.device)
    is_hidden = (words[..., bits // 32] >> (bits % 32) & 1).bool()
    seen = bias[:, :, None].to(k.dtype).masked_fill(is_hidden, -torch.inf)
    seen = seen.repeat_interleave(block_q, 2)[:, :, : queries.shape[2]]
    return torch.add(seen, queries @ k.transpose(2, 3), alpha=scale)
