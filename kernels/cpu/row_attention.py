"""Dense attention of a few query rows over the keys they visit: the arithmetic of the CPU path.

`FlashRows` and `MatmulRows` compute the same; the CPU decides which is faster. All tensors are
`(heads, rows, queries or keys, head_dim)` of one sample, and each of `rows` is an attention of its
own. The last dimension of k and v is contiguous. `bias` is None where no key is hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Number of keys whose scores give back the LSE of a row, see `_lse`.
_PROBES = 16
_SMALLEST_WEIGHT = 1e-30  # a smaller weight may have too few bits left


@dataclass(frozen=True)
class RowBias:
    """A bias of scores that hides keys from queries.

    Attributes:
        scores: `(rows, queries | 1, keys)` in the dtype of q: -inf where a key is hidden, 0
            elsewhere; the last dimension is contiguous.
        blind: bool `(rows, queries | 1)`, true for queries that see no key; None if there are none.
    """

    scores: torch.Tensor
    blind: torch.Tensor | None


class RowAttention(Protocol):
    """Forward and backward of one group of rows."""

    keeps_scores: bool  # whether it takes memory for heads x rows x queries x keys
    takes_some_keys: bool  # whether `out` and `lse` in backward may be over more keys

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: RowBias | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output like q, and the LSE `(heads, rows, queries)` in accumulation precision."""

    def backward(
        self,
        grad: tuple[torch.Tensor, torch.Tensor | None],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias: RowBias | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of q, k and v from `grad`, the gradients of `out` and of `lse`."""


def pick_row_attention(dtype: torch.dtype) -> RowAttention:
    """The faster form for this dtype on this CPU."""
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return MatmulRows() if dtype == torch.bfloat16 and fast_bf16 else FlashRows()


class FlashRows:
    """Torch's fused CPU attention: no scores in memory; float32 speed in every dtype."""

    keeps_scores = False
    takes_some_keys = True

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: RowBias | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _flash(unit_stride(q), k, v, attn_mask=_attn_mask(bias), scale=scale)
        if bias is not None and bias.blind is not None:
            lse = lse.masked_fill(bias.blind, -torch.inf)  # the fused op returns 0
        return out, lse

    def backward(
        self,
        grad: tuple[torch.Tensor, torch.Tensor | None],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias: RowBias | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_out, grad_lse = grad
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # The op subtracts rowsum(grad_out * out) from the gradient of the probabilities. One
            # more column, 1 in grad_out and -grad_lse in out, makes the op add grad_lse to it.
            q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
            grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1)
            out = torch.cat([out, -grad_lse[..., None].to(out.dtype)], -1)
        if bias is not None and bias.blind is not None:
            # A row without keys needs weights of 0: exp(-inf - 0).
            lse = lse.masked_fill(lse == -torch.inf, 0)
        grads = _flash_backward(
            unit_stride(grad_out), unit_stride(q), k, v, out, lse, 0.0, False,
            attn_mask=_attn_mask(bias), scale=scale,
        )  # fmt: skip
        dq, dk, dv = (g[..., :head_dim] for g in grads)
        return dq, dk, dv


class MatmulRows:
    """Matmul, softmax, matmul: several times faster where the CPU multiplies bfloat16 itself.

    Scores and probabilities are rounded to bfloat16, as in plain eager attention.
    """

    keeps_scores = True
    takes_some_keys = False  # it computes weights as if there were no other keys

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: RowBias | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.contiguous() for x in (q, k, v))
        scores = _scores(q, k, bias, scale)
        weights = _softmax(scores, bias)
        return _matmul(weights, v), _lse(scores, weights)

    def backward(
        self,
        grad: tuple[torch.Tensor, torch.Tensor | None],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias: RowBias | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_out, grad_lse = grad
        q, k, v, grad_out = (x.contiguous() for x in (q, k, v, grad_out))
        weights = _softmax(_scores(q, k, bias, scale), bias)
        dv = _matmul(weights.mT, grad_out)
        d_scores = _matmul(grad_out, v.mT)
        d_scores = torch._softmax_backward_data(d_scores, weights, -1, weights.dtype)
        if grad_lse is not None:
            d_scores.addcmul_(weights, grad_lse[..., None].to(weights.dtype))
        return (
            _matmul(d_scores, k, scale),
            _matmul(d_scores.mT, q, scale),
            dv,
        )


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """`x` with a contiguous last dimension, which the fused op assumes without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _attn_mask(bias: RowBias | None) -> torch.Tensor | None:
    """The bias in four dimensions, which the fused op broadcasts over heads and queries."""
    return None if bias is None else bias.scores[None]


def _matmul(a: torch.Tensor, b: torch.Tensor, scale: float = 1) -> torch.Tensor:
    """`scale * a @ b`, scaled before the rounding to bfloat16."""
    a, b, batch = a.flatten(0, 1), b.flatten(0, 1), a.shape[:2]
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out).unflatten(0, batch)


def _scores(q: torch.Tensor, k: torch.Tensor, bias: RowBias | None, scale: float) -> torch.Tensor:
    scores = _matmul(q, k.mT, scale)
    return scores if bias is None else scores.add_(bias.scores)


def _softmax(scores: torch.Tensor, bias: RowBias | None) -> torch.Tensor:
    weights = torch.softmax(scores, -1)
    if bias is not None and bias.blind is not None:
        weights.masked_fill_(bias.blind[..., None], 0)
    return weights


def _lse(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the scores, in float32 at least, mostly without another pass over them.

    Every key gives back the LSE as score - log(weight), with the rounding of the weight as error.
    The mean over a few keys is more accurate than the value of one key. If a row has only hidden
    keys or tiny weights among those, the LSE is computed from all scores.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    step = max(1, scores.shape[-1] // _PROBES)
    score, weight = scores[..., ::step].to(dtype), weights[..., ::step].to(dtype)
    usable = weight > _SMALLEST_WEIGHT
    count = usable.sum(-1)
    if count.amin() == 0:
        return torch.logsumexp(scores.to(dtype), -1)
    return torch.where(usable, score - weight.log(), 0).sum(-1) / count
