"""Attention to summary keys as one differentiable operator, in Triton or in matrix products.

A summary key stands for many keys, such as the mean of a block of keys. Its bias, the logarithm of
their number, gives it their weight in the softmax. A query block that attends to the keys
themselves must not see their summary. One bit per query block and summary key hides it.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NoReturn

import torch

from ..checks import scale_of
from ..dispatch import operator
from ..operators import empty_outputs
from ..transforms import first_order, save, transformable
from .torch_passes import Gradients, TorchPasses

Backend = Literal["torch", "triton"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def summary_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    *,
    block_q: int,
    scale: float | None = None,
    backend: Backend = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of scores `scale * q . k + bias`; differentiable in q, k, v and bias.

    Args:
        q: `(batch, tokens, heads, head_dim)`, any strides.
        k, v: `(batch, keys, heads, head_dim)`, in the dtype of q or in float32. Products take them
            in the dtype of q. Their gradients have their own dtype.
        bias: float32 `(batch | 1, heads | 1, keys)`, added to the scores; -inf for no such key.
        hidden: int32 `(batch | 1, heads | 1, query blocks, ceil(keys / 32))`: bit `c % 32` of word
            `c // 32` hides key c from all queries of the block.
        block_q: queries per block; the last block may be short.
        scale: factor of the products; `head_dim ** -0.5` when None.
        backend: "torch" for matrix products on every device, "triton" for kernels on GPUs.

    Returns:
        out: like q; 0 for a query that sees no key.
        lse: float32, or float64 for float64, `(batch, heads, tokens)`: the natural logarithm of the
            sum of the exponentials of a query's scores, -inf for a query that sees no key.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    check(q, k, v, bias, hidden, block_q, backend)
    out, lse = _attend(q, k, v, bias, hidden, block_q, scale_of(scale, q), backend)
    return out, lse


@operator("summary")
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    block_q: int,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _passes(backend).forward(q, k, v, bias, hidden, block_q, scale)


@_forward_op.registered.register_fake
def _(
    q: torch.Tensor, *rest: torch.Tensor | int | float | str
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q)


@operator("summary_backward")
def _backward_op(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv, dbias = _passes(backend).backward(
        grad_out, grad_lse, out, lse, q, k, v, bias, hidden, block_q, scale
    )
    return dq, *as_inputs(dk, dv, dbias, k, v, bias)


@_backward_op.registered.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    *rest: torch.Tensor | int | float | str,
) -> Gradients:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        bias.new_empty(bias.shape),
    )


def as_inputs(
    dk: torch.Tensor,
    dv: torch.Tensor,
    dbias: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the passes in the dtypes of k, v and bias, and in the shape of the bias."""
    for dim, size in enumerate(bias.shape[:2]):
        if size == 1:
            dbias = dbias.sum(dim, keepdim=True)
    return dk.to(k.dtype), dv.to(v.dtype), dbias.to(bias.dtype).contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, bias, hidden, *ctx.options = inputs
    save(ctx, *output, q, k, v, bias, hidden)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = first_order(_backward_op, grad_out, grad_lse, out, lse, *tensors, *ctx.options)
    return (*grads, None, *[None] * len(ctx.options))


def no_tangents(ctx: Any, *of_arguments: torch.Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "attention to summary keys has no forward-mode derivative (torch.func.jvp, dual_level);"
        " differentiate by backward(), or leave the summaries out"
    )


_attend = transformable(_forward_op, _setup, _gradients, no_tangents)


def _passes(backend: str) -> Any:
    return _triton_passes() if backend == "triton" else TorchPasses


@functools.cache
def _triton_passes() -> Any:
    # Imported late: there are platforms without Triton.
    from . import triton_passes

    return triton_passes


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    block_q: int,
    backend: str,
) -> None:
    """Check the arguments of `summary_attention`.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend must be 'torch' or 'triton'; got {backend!r}")
    if q.dtype not in DTYPES or k.dtype not in (q.dtype, torch.float32) or v.dtype != k.dtype:
        raise ValueError(
            f"q must be of {', '.join(map(str, DTYPES))}, k and v of the dtype of q or"
            f" torch.float32; got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.ndim != 4 or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            "q, k, v must be non-empty (batch, tokens, heads, head_dim);"
            f" got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, tokens, heads, head_dim = q.shape
    expected = (batch, k.shape[1], heads, head_dim)
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        raise ValueError(
            "k and v must have the batch, heads and head_dim of q, and the same number of keys;"
            f" got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    keys = k.shape[1]
    if block_q < 1:
        raise ValueError(f"block_q must be at least 1 query; got {block_q}")
    shared = ((1, batch), (1, heads))
    rows, words = -(-tokens // block_q), -(-keys // 32)
    for name, x, dtype, last in (
        ("bias", bias, torch.float32, (keys,)),
        ("hidden", hidden, torch.int32, (rows, words)),
    ):
        if (
            x.dtype != dtype
            or tuple(x.shape[2:]) != last
            or any(size not in of for size, of in zip(x.shape, shared, strict=False))
        ):
            raise ValueError(
                f"{name} must be {dtype} (1 or {batch}, 1 or {heads},"
                f" {', '.join(map(str, last))}); got {x.dtype} {tuple(x.shape)}"
            )
    for name, x in (("k", k), ("v", v), ("bias", bias), ("hidden", hidden)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q on {q.device}")
    if backend == "triton":
        _triton_passes().check_supported(q, block_q)
