"""Attention to summary keys in Triton.

All queries see most of the keys, so the kernels walk all keys and read the bits tile by tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..common.launch import float32_precision, on_device, padded_head_dim
from ..common.primitives import (
    LN_2,
    LOG2_E,
    load_tile,
    store_tile,
    tile_of_program,
    token_offsets,
)
from ..common.row_sums import row_sums
from ..common.softmax import weigh
from ..common.tile_tables import Table, both, row_of
from ..operators import empty_outputs
from .torch_passes import Gradients

MAX_HEAD_DIM = 256
# The smallest tile of a matrix product.
_LEAST_TILE = 16
# The largest offset from the first token of a head that 32 bits hold.
_MAX_OFFSET = 2**31 - 1

# Chosen by the machine code for sm_80, sm_90 and sm_100; untried on a GPU.
_TILES: dict[str, Table] = {
    "forward": {64: both(64, 64, 4, 2), 128: both(64, 64, 4, 2), 256: both(32, 32, 4, 2)},
    "queries": {64: both(64, 64, 4, 2), 128: both(64, 64, 4, 2), 256: both(32, 32, 4, 2)},
    "keys": {64: both(64, 128, 8, 2), 128: both(32, 64, 4, 2), 256: both(32, 32, 4, 2)},
}
_FLOAT32: dict[str, Table] = {
    "forward": {64: both(32, 32, 4, 2), 128: both(32, 32, 8, 2), 256: both(16, 32, 8, 2)},
    "queries": {64: both(32, 32, 4, 2), 128: both(32, 16, 8, 2), 256: both(16, 32, 8, 2)},
    "keys": {64: both(32, 32, 8, 2), 128: both(16, 32, 16, 2), 256: both(16, 16, 16, 1)},
}


@triton.jit
def visible_keys(p_bias, p_hidden, o_n, keys):
    """Bias to base 2 of keys `o_n`, and whether the query block of `p_hidden` sees them."""
    m_n = o_n < keys
    b_bias = tl.load(p_bias + o_n, mask=m_n, other=float("-inf"))  # (BLOCK_N,)
    b_words = tl.load(p_hidden + o_n // 32, mask=m_n, other=-1)  # (BLOCK_N,)
    m_n = (b_bias > float("-inf")) & ((b_words >> (o_n % 32)) & 1 == 0)
    return tl.where(m_n, b_bias * LOG2_E, 0.0), m_n


@triton.jit(do_not_specialize=["tokens_q", "keys"])
def forward_kernel(
    p_q, p_k, p_v, p_bias, p_hidden, p_out, p_lse,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_bb, s_bh, s_hb, s_hh, s_hr, tokens_q, keys, heads, block_q, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, CONTINUED: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a tile of queries, which lies in one query block.

    If CONTINUED, both hold those of an attention to other keys, and become those over all keys.
    """
    i_tile, i_b, i_h, _ = tile_of_program(tl.cdiv(tokens_q, BLOCK_M), heads, 0, 0)
    start_m = i_tile.to(tl.int64) * BLOCK_M
    o_m = token_offsets(BLOCK_M, WIDE)
    m_m = start_m + o_m < tokens_q
    p_q += i_b * s_qb + i_h * s_qh + start_m * s_qt
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_bias += i_b * s_bb + i_h * s_bh
    p_hidden += i_b * s_hb + i_h * s_hh + start_m // block_q * s_hr
    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    p_out += ((i_b * tokens_q + start_m) * heads + i_h) * D
    p_lse += (i_b * heads + i_h) * tokens_q + start_m
    if CONTINUED:
        b_acc = load_tile(p_out, heads * D, 1, o_m, m_m, True, D, BLOCK_D).to(tl.float32)
        b_max = tl.load(p_lse + o_m, mask=m_m, other=float("-inf")) * LOG2_E  # (BLOCK_M,)
        b_sum = tl.where(b_max > float("-inf"), 1.0, 0.0)
    else:
        b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    for start_n in tl.range(0, keys, BLOCK_N):
        b_bias, m_n = visible_keys(p_bias, p_hidden, start_n + o_n, keys)  # twice (BLOCK_N,)
        # Hidden keys are read as 0: a NaN in the mean of a block must not reach a sum.
        # Both (BLOCK_N, BLOCK_D).
        b_k = load_tile(p_k, s_kt, s_kd, start_n + o_n, m_n, True, D, BLOCK_D)
        b_v = load_tile(p_v, s_vt, s_vd, start_n + o_n, m_n, True, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_s = b_s * (scale * LOG2_E) + b_bias[None, :]
        b_p, b_max, b_old = weigh(b_s, b_max, 1.0, m_n[None, :], True)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        # b_acc: (BLOCK_M, BLOCK_D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
    b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
    store_tile(p_out, heads * D, o_m, m_m, b_acc / b_norm[:, None], D, BLOCK_D)
    tl.store(p_lse + o_m, (b_max + tl.log2(b_norm)) * LN_2, mask=m_m)


@triton.jit(do_not_specialize=["tokens_q", "tokens_padded", "keys"])
def queries_kernel(
    p_q, p_k, p_v, p_bias, p_hidden, p_grad, p_delta, p_lse, p_dq,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_bb, s_bh, s_hb, s_hh, s_hr,
    tokens_q, tokens_padded, keys, heads, block_q, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries."""
    i_tile, i_b, i_h, _ = tile_of_program(tl.cdiv(tokens_q, BLOCK_M), heads, 0, 0)
    start_m = i_tile.to(tl.int64) * BLOCK_M
    o_m = token_offsets(BLOCK_M, WIDE)
    m_m = start_m + o_m < tokens_q
    p_q += i_b * s_qb + i_h * s_qh + start_m * s_qt
    p_grad += i_b * s_gb + i_h * s_gh + start_m * s_gt
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_bias += i_b * s_bb + i_h * s_bh
    p_hidden += i_b * s_hb + i_h * s_hh + start_m // block_q * s_hr
    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    b_grad = load_tile(p_grad, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)
    first = (i_b * heads + i_h) * tokens_padded + start_m
    b_delta = tl.load(p_delta + first + o_m)  # (BLOCK_M,)
    b_lse = tl.load(p_lse + first + o_m)  # (BLOCK_M,)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    o_n = tl.arange(0, BLOCK_N)
    for start_n in tl.range(0, keys, BLOCK_N):
        b_bias, m_n = visible_keys(p_bias, p_hidden, start_n + o_n, keys)  # twice (BLOCK_N,)
        # Both (BLOCK_N, BLOCK_D).
        b_k = load_tile(p_k, s_kt, s_kd, start_n + o_n, m_n, True, D, BLOCK_D)
        b_v = load_tile(p_v, s_vt, s_vd, start_n + o_n, m_n, True, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_s = b_s * (scale * LOG2_E) + b_bias[None, :]
        b_p = tl.where(m_n[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
    first = (i_b * tokens_q + start_m) * heads + i_h
    store_tile(p_dq + first * D, heads * D, o_m, m_m, b_dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens_q", "tokens_padded", "keys"])
def keys_kernel(
    p_q, p_k, p_v, p_bias, p_hidden, p_grad, p_delta, p_lse, p_dk, p_dv, p_dbias,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_bb, s_bh, s_hb, s_hh, s_hr,
    tokens_q, tokens_padded, keys, heads, block_q, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK, dV and the gradient of the bias of a tile of keys, over all queries."""
    i_tile, i_b, i_h, _ = tile_of_program(tl.cdiv(keys, BLOCK_N), heads, 0, 0)
    start_n = i_tile * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    o_m = token_offsets(BLOCK_M, WIDE)
    m_n = start_n + o_n < keys
    p_q += i_b * s_qb + i_h * s_qh
    p_grad += i_b * s_gb + i_h * s_gh
    p_bias += i_b * s_bb + i_h * s_bh
    p_hidden += i_b * s_hb + i_h * s_hh
    p_k += i_b * s_kb + i_h * s_kh + start_n.to(tl.int64) * s_kt
    p_v += i_b * s_vb + i_h * s_vh + start_n.to(tl.int64) * s_vt
    p_delta += (i_b * heads + i_h) * tokens_padded
    p_lse += (i_b * heads + i_h) * tokens_padded
    m_bias = tl.load(p_bias + start_n + o_n, mask=m_n, other=float("-inf")) > float("-inf")
    b_k = load_tile(p_k, s_kt, s_kd, o_n, m_bias, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_v = load_tile(p_v, s_vt, s_vd, o_n, m_bias, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dbias = tl.zeros((BLOCK_N,), tl.float32)
    for i_m in tl.range(0, tl.cdiv(tokens_q, BLOCK_M)):
        start_m = tl.full((), BLOCK_M, tl.int64) * i_m
        m_m = start_m + o_m < tokens_q
        p_row = p_hidden + start_m // block_q * s_hr
        b_bias, m_seen = visible_keys(p_bias, p_row, start_n + o_n, keys)  # twice (BLOCK_N,)
        # Both (BLOCK_M, BLOCK_D).
        b_q = load_tile(p_q + start_m * s_qt, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)
        b_grad = load_tile(p_grad + start_m * s_gt, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)
        b_delta = tl.load(p_delta + start_m + o_m)  # (BLOCK_M,)
        b_lse = tl.load(p_lse + start_m + o_m)  # (BLOCK_M,), inf past the end
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        b_s = b_s * (scale * LOG2_E) + b_bias[:, None]
        b_p = tl.where(m_seen[:, None], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        # b_dv: (BLOCK_N, BLOCK_D)
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])  # (BLOCK_N, BLOCK_M)
        b_dbias += tl.sum(b_ds, 1)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    first = (i_b * keys + start_n) * heads + i_h
    store_tile(p_dk + first * D, heads * D, o_n, m_n, b_dk * scale, D, BLOCK_D)
    store_tile(p_dv + first * D, heads * D, o_n, m_n, b_dv, D, BLOCK_D)
    tl.store(p_dbias + (i_b * heads + i_h) * keys + start_n + o_n, b_dbias, mask=m_n)


_INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    hidden: torch.Tensor,
    block_q: int,
    scale: float,
    onto: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp; arguments as of `summary_attention`.

    Args:
        onto: contiguous output and log-sum-exp of an attention to other keys, which are overwritten
            with those over all keys, and returned.
    """
    batch, tokens, heads, _ = q.shape
    out, lse = empty_outputs(q) if onto is None else onto
    k, v = k.to(q.dtype), v.to(q.dtype)
    constants = _constants("forward", q, k, block_q)
    with on_device(q.device):
        forward_kernel[(batch * heads * triton.cdiv(tokens, constants["BLOCK_M"]),)](
            q, k, v, bias, hidden, out, lse,
            *q.stride(), *k.stride(), *v.stride(), *_shared_strides(bias, hidden),
            tokens, k.shape[1], heads, block_q, scale, CONTINUED=onto is not None, **constants,
        )  # fmt: skip
    return out, lse


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
    batch, tokens, heads, _ = q.shape
    keys = k.shape[1]
    k, v, grad_out = (x.to(q.dtype) for x in (k, v, grad_out))
    of_queries, of_keys = (
        _constants(kernel, q, k, block_q, grad_out) for kernel in ("queries", "keys")
    )
    block_m = max(of_queries["BLOCK_M"], of_keys["BLOCK_M"])
    sums = row_sums(out, grad_out, lse, grad_lse, block_q=block_m, wide=of_queries["WIDE"])
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (k, v))
    dbias = dk.new_empty((batch, heads, keys))
    inputs = q, k, v, bias, hidden, grad_out, sums.delta, sums.log2_lse
    numbers = (
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *_shared_strides(bias, hidden),
        tokens, sums.tokens, keys, heads, block_q, scale,
    )  # fmt: skip
    with on_device(q.device):
        queries_kernel[(batch * heads * triton.cdiv(tokens, of_queries["BLOCK_M"]),)](
            *inputs, dq, *numbers, **of_queries
        )
        keys_kernel[(batch * heads * triton.cdiv(keys, of_keys["BLOCK_N"]),)](
            *inputs, dk, dv, dbias, *numbers, **of_keys
        )
    return dq, dk, dv, dbias


def check_supported(q: torch.Tensor, block_q: int) -> None:
    """Check that the kernels take queries in blocks of `block_q`.

    Raises:
        ValueError: if they do not.
    """
    if q.dtype == torch.float64:
        raise ValueError("the Triton kernels take no float64; pass backend='torch'")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim may be 1 to {MAX_HEAD_DIM}; got {q.shape[-1]}")
    if block_q % _LEAST_TILE:
        raise ValueError(
            f"block_q must be a multiple of {_LEAST_TILE} queries for the Triton kernels; got"
            f" {block_q}; pass backend='torch'"
        )
    if q.device.type == "cpu" and not _INTERPRETED:
        raise ValueError(
            "the Triton kernels run on a GPU, but q is on cpu; pass backend='torch', or set"
            " TRITON_INTERPRET=1 before Triton is imported to run them in its interpreter"
        )


def _constants(
    kernel: str, q: torch.Tensor, k: torch.Tensor, block_q: int, *more: torch.Tensor
) -> dict[str, Any]:
    block_d = padded_head_dim(q.shape[-1])
    tables = _FLOAT32 if q.dtype == torch.float32 else _TILES
    tiles, _ = row_of(tables[kernel], block_d)
    # Tiles of queries must not lie in two query blocks.
    block_m = min(tiles.block_m, block_q & -block_q)
    tokens = max(block_m, tiles.block_n)
    reach = tokens * max(abs(x.stride(1)) for x in (q, k, *more))
    return {
        "D": q.shape[-1],
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": tiles.block_n,
        "WIDE": reach > _MAX_OFFSET,
        "PRECISION": float32_precision(),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _shared_strides(bias: torch.Tensor, hidden: torch.Tensor) -> tuple[int, ...]:
    """Strides of samples and heads, 0 where all share, then of the rows of `hidden`."""
    strides = [x.stride(dim) * (x.shape[dim] > 1) for x in (bias, hidden) for dim in (0, 1)]
    return (*strides, hidden.stride(2))
