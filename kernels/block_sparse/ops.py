"""Block-sparse attention in Triton as one differentiable operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from ..checks import check_inputs, check_layout, scale_of
from ..operators import over_layout
from .backward import backward
from .forward import forward_kernel
from .forward_pass import forward
from .tangent import tangent

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
BLOCKS = (16, 32, 64, 128, 256)

_INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Sequence[torch.Tensor],
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the blocks of a layout; differentiable, and one operator to `torch.compile`.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)` of one dtype, any strides; the key length may
            differ from the query length. float32 is multiplied in full, unless
            `torch.set_float32_matmul_precision` allows TF32.
        layout: the index lists of a `BlockLayout` (its `tensors`), shared (size 1) or separate per
            sample and per head. Plans derived from the lists are remembered as long as these
            tensors live. Values must be in range: a check would wait for the device.
        block_q, block_kv: tokens per query block and per key block: 16, 32, 64, 128 or 256.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that no query sees.

    Returns:
        out: like q; 0 for a query that sees nothing.
        lse: float32 `(batch, heads, tokens_q)`, natural logarithm of the sum of the exponentials
            of a query's scores, -inf for a query that sees nothing.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check_call(q, k, v, layout, key_mask, block_q, block_kv)
    return _attend(q, k, v, list(layout), key_mask, block_q, block_kv, scale_of(scale, q))


def block_sparse_attention_gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Sequence[torch.Tensor],
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention` with respect to q, k and v, outside of autograd.

    Args:
        grad_out: gradient of the output, `(batch, tokens, heads, head_dim)`.
        out, lse: results of `block_sparse_attention` for the other arguments.

    Returns:
        dq, dk, dv: like q, k and v.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check_call(q, k, v, layout, key_mask, block_q, block_kv)
    _check_results(q, grad_out, out, lse)
    scale = scale_of(scale, q)
    return _gradients(
        grad_out, None, q, k, v, out, lse, list(layout), key_mask, block_q, block_kv, scale
    )


def check_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Sequence[torch.Tensor],
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
) -> None:
    """Check the arguments of `block_sparse_attention`.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_supported(q, k, v, key_mask, block_q, block_kv)
    check_layout(q, layout, block_q, block_kv)


_attend, _gradients = over_layout("block_sparse_triton", forward, backward, tangent)


def _check_supported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
) -> None:
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim may be 1 to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size not in BLOCKS:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, BLOCKS))} on this device; got {size}"
            )
    for name, x in (("k", k), ("v", v), ("key_mask", key_mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q on {q.device}")
    if q.device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            "the Triton kernels run on a GPU, but q is on cpu; use diffattn.kernels.cpu, or set"
            " TRITON_INTERPRET=1 before Triton is imported to run them in its interpreter"
        )


def _check_results(
    q: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    batch, tokens, heads, _ = q.shape
    for name, x, shape, dtype in (
        ("grad_out", grad_out, tuple(q.shape), q.dtype),
        ("out", out, tuple(q.shape), q.dtype),
        ("lse", lse, (batch, heads, tokens), torch.float32),
    ):
        if x.shape != shape or x.dtype != dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be {dtype} {shape} on {q.device};"
                f" got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
