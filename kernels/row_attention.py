"""Dense attention of a few query rows over the keys they visit: the arithmetic of the CPU path.

Two forms of the same thing, chosen by what the CPU is fast at. All tensors are `(heads, tokens,
head_dim)` of one sample; `hidden` is bool `(rows | 1, keys)`, true where a key is not seen.
"""

from __future__ import annotations

from typing import Protocol

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Keys whose scores give the LSE of a bf16 row back, see `_lse`.
_PROBES = 32


class RowAttention(Protocol):
    """Forward and backward of one group of rows."""

    keeps_scores: bool  # needs memory for heads x rows x keys

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` like q, and `lse` `(heads, rows)` in accumulation precision."""

    def backward(
        self,
        grad: tuple[torch.Tensor, torch.Tensor | None],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k, v from those of `out` and `lse`."""


def pick_row_attention(dtype: torch.dtype) -> RowAttention:
    """The faster form for this dtype on this CPU."""
    fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return MatmulRows() if dtype == torch.bfloat16 and fast_bf16 else FlashRows()


class FlashRows:
    """Torch's fused CPU attention: no scores in memory; float32 speed in every dtype."""

    keeps_scores = False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bias = _bias(hidden, q.dtype)
        out, lse = _flash(_rows(q)[None], k[None], v[None], attn_mask=bias, scale=scale)
        lse = lse[0]
        if hidden is not None:
            lse = lse.masked_fill(hidden.all(-1), -torch.inf)  # the fused op says 0
        return out[0], lse

    def backward(
        self,
        grad: tuple[torch.Tensor, torch.Tensor | None],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_out, grad_lse = grad
        head_dim = q.shape[-1]
        if grad_lse is not None:
            # The op subtracts rowsum(grad_out * out) from the gradient of the probabilities. One
            # more column, 1 in grad_out and -grad_lse in out, makes it subtract grad_lse as well.
            q, k, v = (torch.nn.functional.pad(x, (0, 1)) for x in (q, k, v))
            grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1)
            out = torch.cat([out, -grad_lse[..., None].to(out.dtype)], -1)
        if hidden is not None:
            # exp(-inf - 0) is the 0 that a row without keys needs.
            lse = lse.masked_fill(lse == -torch.inf, 0)
        grads = _flash_backward(
            _rows(grad_out)[None], _rows(q)[None], k[None], v[None], out[None], lse[None],
            0.0, False, attn_mask=_bias(hidden, q.dtype), scale=scale,
        )  # fmt: skip
        dq, dk, dv = (g[0, ..., :head_dim] for g in grads)
        return dq, dk, dv


class MatmulRows:
    """Matmul, softmax, matmul: several times faster where the CPU multiplies bfloat16 itself.

    Scores and probabilities are rounded to bfloat16, as in plain eager attention.
    """

    keeps_scores = True

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _scores(q, k, hidden, scale)
        weights = _softmax(scores, hidden)
        return torch.bmm(weights, v), _lse(scores, weights)

    def backward(
        self,
        grad: tuple[torch.Tensor, torch.Tensor | None],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_out, grad_lse = grad
        weights = _softmax(_scores(q, k, hidden, scale), hidden)
        dv = torch.bmm(weights.transpose(1, 2), grad_out)
        d_scores = torch.bmm(grad_out, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_scores, weights, -1, weights.dtype)
        if grad_lse is not None:
            d_scores.addcmul_(weights, grad_lse[..., None].to(weights.dtype))
        return (
            _scaled_bmm(d_scores, k, scale),
            _scaled_bmm(d_scores.transpose(1, 2), q, scale),
            dv,
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The fused op takes the last dimension for contiguous without looking."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias(hidden: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Additive mask in the form the fused op reads without expanding it over heads."""
    if hidden is None:
        return None
    bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return bias[None, None]


def _scaled_bmm(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * a @ b`, scaled before the rounding to bfloat16."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _scores(
    q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor | None, scale: float
) -> torch.Tensor:
    scores = _scaled_bmm(q, k.transpose(1, 2), scale)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _softmax(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    weights = torch.softmax(scores, -1)
    if hidden is not None:
        sees_nothing = hidden.all(-1, keepdim=True)
        if sees_nothing.any():
            weights.masked_fill_(sees_nothing, 0)
    return weights


def _lse(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp of the scores, in float32 at least, mostly without another pass over them.

    Every key gives it back as score - log(weight), with the rounding of the weight as error; the
    mean over a few keys is more accurate than any one of them. Keys with a tiny weight are left
    out; should a row have no other among those looked at, all is computed again.
    """
    step = max(1, scores.shape[-1] // _PROBES)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    score, weight = scores[..., ::step].to(dtype), weights[..., ::step].to(dtype)
    usable = weight > 1e-30
    count = usable.sum(-1)
    if bool((count == 0).any()):
        return torch.logsumexp(scores.to(dtype), -1)
    each = torch.where(usable, score - weight.log(), 0)
    return each.sum(-1) / count
