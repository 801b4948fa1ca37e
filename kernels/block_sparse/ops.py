"""Block-sparse attention in Triton as one differentiable operator."""

from __future__ import annotations

import torch
import triton

from ..checks import check_inputs, check_layout
from ..operators import differentiable, empty_outputs
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
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
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
        full_count, full_index, partial_count, partial_index, partial_mask, bit_masks: the index
            lists of a `BlockLayout`, shared (size 1) or separate per sample and per head. What is
            derived from them is remembered for as long as these very tensors live. Their values
            are taken to be in range: looking at them would wait for the device.
        block_q, block_kv: tokens per query block and per key block: 16, 32, 64, 128 or 256.
        scale: factor of the scores; `head_dim ** -0.5` when None.
        key_mask: bool `(batch, tokens_kv)`, false for keys that nobody sees.

    Returns:
        out: like q; 0 for a query that sees nothing.
        lse: float32 `(batch, heads, tokens_q)`, natural logarithm of the sum of the exponentials
            of a query's scores, -inf for a query that sees nothing.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_supported(q, k, v, key_mask, block_q, block_kv)
    check_layout(q, layout, block_q, block_kv)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _attend(q, k, v, *layout, key_mask, block_q, block_kv, scale)


def block_sparse_attention_gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    *,
    block_q: int,
    block_kv: int,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `block_sparse_attention` with respect to q, k and v, outside of autograd.

    Args:
        grad_out: gradient of the output, `(batch, tokens, heads, head_dim)`.
        out, lse: what `block_sparse_attention` returned for the other arguments.

    Raises:
        ValueError: if dtypes, devices or shapes do not fit together or are not supported.
    """
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    check_inputs(q, k, v, key_mask, dtypes=DTYPES)
    _check_supported(q, k, v, key_mask, block_q, block_kv)
    check_layout(q, layout, block_q, block_kv)
    _check_results(q, grad_out, out, lse)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return _backward_op(
        grad_out, None, q, k, v, out, lse, *layout, key_mask, block_q, block_kv, scale
    )


@torch.library.custom_op("diffattn::block_sparse_triton", mutates_args=())
def _forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    return forward(q, k, v, layout, key_mask, block_q=block_q, block_kv=block_kv, scale=scale)


@_forward_op.register_fake
def _(
    q: torch.Tensor, *rest: torch.Tensor | int | float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(q)


@torch.library.custom_op("diffattn::block_sparse_triton_backward", mutates_args=())
def _backward_op(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    return backward(
        grad_out, grad_lse, q, k, v, out, lse, layout, key_mask,
        block_q=block_q, block_kv=block_kv, scale=scale,
    )  # fmt: skip


@torch.library.custom_op("diffattn::block_sparse_triton_tangent", mutates_args=())
def _tangent_op(
    q_tangent: torch.Tensor,
    k_tangent: torch.Tensor,
    v_tangent: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    full_count: torch.Tensor,
    full_index: torch.Tensor,
    partial_count: torch.Tensor,
    partial_index: torch.Tensor,
    partial_mask: torch.Tensor,
    bit_masks: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = (full_count, full_index, partial_count, partial_index, partial_mask, bit_masks)
    return tangent(
        (q_tangent, k_tangent, v_tangent), q, k, v, out, lse, layout, key_mask,
        block_q=block_q, block_kv=block_kv, scale=scale,
    )  # fmt: skip


_attend = differentiable(_forward_op, _backward_op, _tangent_op)


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
