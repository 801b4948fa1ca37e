"""The backward kernels: dQ over the rows of a layout, dK and dV over its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import LayoutTensors
from .launch import Problem
from .plan import cached_row_order, cached_transpose
from .primitives import (
    LOG2_E,
    load_bits,
    load_tile,
    row_lists,
    store_tile,
    tile_of_program,
    token_offsets,
)

# Queries per program of the first kernel, which only streams through memory.
DELTA_TILE = 64


@triton.jit(do_not_specialize=["tokens_q"])
def delta_kernel(
    p_out, p_grad_out, p_lse, p_grad_lse, p_delta, p_log2_lse,
    s_ob, s_ot, s_oh, s_od, s_gb, s_gt, s_gh, s_gd, s_lb, s_lh, s_lt, s_nb, s_nh, s_nt,
    tokens_q, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """What the other two need of a query: sum(out * grad_out) - grad_lse, and the LSE to base 2."""
    i_tile, i_b, i_h, _ = tile_of_program(tl.cdiv(tokens_q, BLOCK_M), heads, 0, 0)
    start_m = i_tile.to(tl.int64) * BLOCK_M
    o_m = token_offsets(BLOCK_M, WIDE)
    m_m = start_m + o_m < tokens_q
    p_out += i_b * s_ob + i_h * s_oh + start_m * s_ot
    p_grad_out += i_b * s_gb + i_h * s_gh + start_m * s_gt
    b_out = load_tile(p_out, s_ot, s_od, o_m, m_m, True, D, BLOCK_D).to(tl.float32)
    b_grad = load_tile(p_grad_out, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_out * b_grad, 1)
    o_m = start_m + o_m
    b_lse = tl.load(p_lse + i_b * s_lb + i_h * s_lh + o_m * s_lt, mask=m_m, other=0.0)
    if HAS_GRAD_LSE:
        p_grad_lse += i_b * s_nb + i_h * s_nh
        b_delta -= tl.load(p_grad_lse + o_m * s_nt, mask=m_m, other=0.0).to(tl.float32)
    # Nothing depends on a query that sees nothing: weights of exp2(s - inf) = 0.
    m_empty = b_lse == float("-inf")
    first = (i_b * heads + i_h) * tokens_q
    tl.store(p_delta + first + o_m, tl.where(m_empty, 0.0, b_delta), mask=m_m)
    tl.store(p_log2_lse + first + o_m, tl.where(m_empty, float("inf"), b_lse * LOG2_E), mask=m_m)


@triton.jit
def add_to_queries(
    b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, scale, m_s,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_p = tl.exp2(b_s * scale - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
    return tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap", "partial_cap"])
def queries_kernel(
    p_q, p_k, p_v, p_grad_out, p_key_mask, p_delta, p_log2_lse, p_dq,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_mb, s_mt, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ: walks the rows as the forward kernel does."""
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    i_tile, i_b, i_h, i_layout = tile_of_program(rows * TILES_M, heads, s_layout_b, s_layout_h)
    i_row = tl.load(p_order + i_layout * rows + i_tile // TILES_M)
    i_list = i_layout * rows + i_row
    start_in_block = (i_tile % TILES_M) * BLOCK_M
    start_m = i_row * BLOCK_Q + start_in_block
    if start_m >= tokens_q:
        return

    o_m = token_offsets(BLOCK_M, WIDE)
    o_n = token_offsets(BLOCK_N, WIDE)
    o_w = tl.arange(0, BLOCK_M)
    m_m = start_m + o_m < tokens_q
    p_q += i_b * s_qb + i_h * s_qh + start_m.to(tl.int64) * s_qt
    p_grad_out += i_b * s_gb + i_h * s_gh + start_m.to(tl.int64) * s_gt
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_key_mask += i_b * s_mb
    p_partial_index += i_list.to(tl.int64) * partial_cap
    p_partial_mask += i_list.to(tl.int64) * partial_cap

    first = (i_b * heads + i_h) * tokens_q + start_m
    b_lse = tl.load(p_log2_lse + first + o_w, mask=m_m, other=float("inf"))
    b_delta = tl.load(p_delta + first + o_w, mask=m_m, other=0.0)
    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)
    b_grad = load_tile(p_grad_out, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    p_full, n_full, n_partial, n_short = row_lists(
        p_full_count, p_full_index, p_partial_count, i_list, full_cap, tokens_kv, BLOCK_KV
    )
    i_block = tl.load(p_full, mask=n_full > 0, other=0)
    for i in tl.range(0, n_full * TILES_N):
        start_n = i_block * BLOCK_KV + (i % TILES_N) * BLOCK_N
        i_block = tl.load(p_full + tl.minimum((i + 1) // TILES_N, n_full - 1))
        p_kt = p_k + start_n.to(tl.int64) * s_kt
        p_vt = p_v + start_n.to(tl.int64) * s_vt
        m_n = o_n < BLOCK_N
        if HAS_KEY_MASK:
            m_n = tl.load(p_key_mask + (start_n + o_n) * s_mt) != 0
        b_k = load_tile(p_kt, s_kt, s_kd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_v = load_tile(p_vt, s_vt, s_vd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_dq = add_to_queries(
            b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, scale * LOG2_E, m_n[None, :],
            HAS_KEY_MASK, PRECISION,
        )  # fmt: skip

    i_short = tokens_kv // BLOCK_KV
    i_block = tl.load(p_partial_index, mask=n_partial > 0, other=i_short)
    i_mask = tl.load(p_partial_mask, mask=n_partial > 0, other=0)
    for i in tl.range(0, (n_partial + n_short) * TILES_N):
        m_w = o_w < tl.where(i // TILES_N < n_partial, BLOCK_M, 0)
        start_in_kv = (i % TILES_N) * BLOCK_N
        start_n = i_block * BLOCK_KV + start_in_kv
        p_words = p_bit_masks + (i_mask.to(tl.int64) * BLOCK_Q + start_in_block) * WORDS
        m_s = load_bits(p_words, WORDS, o_w, m_w, start_in_kv, BLOCK_M, BLOCK_N, False)
        i_next = (i + 1) // TILES_N
        i_block = tl.load(p_partial_index + i_next, mask=i_next < n_partial, other=i_short)
        i_mask = tl.load(p_partial_mask + i_next, mask=i_next < n_partial, other=0)
        p_kt = p_k + start_n.to(tl.int64) * s_kt
        p_vt = p_v + start_n.to(tl.int64) * s_vt
        m_n = start_n + o_n < tokens_kv
        if HAS_KEY_MASK:
            m_n = tl.load(p_key_mask + (start_n + o_n) * s_mt, mask=m_n, other=0) != 0
        b_k = load_tile(p_kt, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D)
        b_v = load_tile(p_vt, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D)
        b_dq = add_to_queries(
            b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, scale * LOG2_E, m_s & m_n[None, :],
            True, PRECISION,
        )  # fmt: skip

    p_dq += (i_b * tokens_q + start_m) * heads * D + i_h * D
    store_tile(p_dq, heads * D, o_w, m_m, b_dq * scale, D, BLOCK_D)


@triton.jit
def add_to_keys(
    b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, scale, m_s,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    b_p = tl.exp2(b_s * scale - b_lse[None, :])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    return tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION), b_dv


@triton.jit(
    do_not_specialize=["tokens_q", "tokens_kv", "columns", "full_entries", "partial_entries"]
)
def keys_kernel(
    p_q, p_k, p_v, p_grad_out, p_key_mask, p_delta, p_log2_lse, p_dk, p_dv,
    p_order, p_full_start, p_full_row, p_partial_start, p_partial_row, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_mb, s_mt, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, columns, full_entries, partial_entries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV: one program per tile of keys walks the query rows that visit its block."""
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    i_tile, i_b, i_h, i_layout = tile_of_program(columns * TILES_N, heads, s_layout_b, s_layout_h)
    i_column = tl.load(p_order + i_layout * columns + i_tile // TILES_N)
    start_in_block = (i_tile % TILES_N) * BLOCK_N
    start_n = i_column * BLOCK_KV + start_in_block
    if start_n >= tokens_kv:
        return

    o_m = token_offsets(BLOCK_M, WIDE)
    o_n = token_offsets(BLOCK_N, WIDE)
    o_w = tl.arange(0, BLOCK_M)
    p_q += i_b * s_qb + i_h * s_qh
    p_grad_out += i_b * s_gb + i_h * s_gh
    p_k += i_b * s_kb + i_h * s_kh + start_n.to(tl.int64) * s_kt
    p_v += i_b * s_vb + i_h * s_vh + start_n.to(tl.int64) * s_vt
    p_delta += (i_b * heads + i_h) * tokens_q
    p_log2_lse += (i_b * heads + i_h) * tokens_q
    p_full_row += i_layout.to(tl.int64) * full_entries
    p_partial_row += i_layout.to(tl.int64) * partial_entries
    p_partial_mask += i_layout.to(tl.int64) * partial_entries

    m_n = start_n + o_n < tokens_kv
    b_k = load_tile(p_k, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D)
    b_v = load_tile(p_v, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)

    # A key's gradients come from its own scores only: hidden keys, and NaN in them, need no mask
    # until the end. Queries past the end have weights of exp2(0 - inf) = 0.
    i_list = i_layout * (columns + 1) + i_column
    i_entry = tl.load(p_full_start + i_list)
    i_stop = tl.load(p_full_start + i_list + 1)
    i_row = tl.load(p_full_row + i_entry, mask=i_entry < i_stop, other=0)
    for i in tl.range(0, (i_stop - i_entry) * TILES_M):
        start_m = i_row * BLOCK_Q + (i % TILES_M) * BLOCK_M
        i_row = tl.load(p_full_row + tl.minimum(i_entry + (i + 1) // TILES_M, i_stop - 1))
        m_m = start_m + o_m < tokens_q
        p_qt = p_q + start_m.to(tl.int64) * s_qt
        p_gt = p_grad_out + start_m.to(tl.int64) * s_gt
        b_q = load_tile(p_qt, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)
        b_grad = load_tile(p_gt, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)
        b_lse = tl.load(p_log2_lse + start_m + o_w, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + start_m + o_w, mask=m_m, other=0.0)
        b_dk, b_dv = add_to_keys(
            b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, scale * LOG2_E, True,
            False, PRECISION,
        )  # fmt: skip

    i_entry = tl.load(p_partial_start + i_list)
    i_stop = tl.load(p_partial_start + i_list + 1)
    i_row = tl.load(p_partial_row + i_entry, mask=i_entry < i_stop, other=0)
    i_mask = tl.load(p_partial_mask + i_entry, mask=i_entry < i_stop, other=0)
    for i in tl.range(0, (i_stop - i_entry) * TILES_M):
        start_in_q = (i % TILES_M) * BLOCK_M
        start_m = i_row * BLOCK_Q + start_in_q
        m_m = start_m + o_m < tokens_q
        p_words = p_bit_masks + (i_mask.to(tl.int64) * BLOCK_Q + start_in_q) * WORDS
        m_s = load_bits(p_words, WORDS, o_w, m_m, start_in_block, BLOCK_M, BLOCK_N, True)
        i_next = tl.minimum(i_entry + (i + 1) // TILES_M, i_stop - 1)
        i_row = tl.load(p_partial_row + i_next)
        i_mask = tl.load(p_partial_mask + i_next)
        p_qt = p_q + start_m.to(tl.int64) * s_qt
        p_gt = p_grad_out + start_m.to(tl.int64) * s_gt
        b_q = load_tile(p_qt, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)
        b_grad = load_tile(p_gt, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)
        b_lse = tl.load(p_log2_lse + start_m + o_w, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + start_m + o_w, mask=m_m, other=0.0)
        b_dk, b_dv = add_to_keys(
            b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, scale * LOG2_E, m_s,
            True, PRECISION,
        )  # fmt: skip

    b_dk *= scale
    if HAS_KEY_MASK:
        p_key_mask += i_b * s_mb
        m_seen = tl.load(p_key_mask + (start_n + o_n) * s_mt, mask=m_n, other=0)[:, None] != 0
        b_dk = tl.where(m_seen, b_dk, 0.0)
        b_dv = tl.where(m_seen, b_dv, 0.0)
    first = (i_b * tokens_kv + start_n) * heads * D + i_h * D
    o_n = tl.arange(0, BLOCK_N)
    store_tile(p_dk + first, heads * D, o_n, m_n, b_dk, D, BLOCK_D)
    store_tile(p_dv + first, heads * D, o_n, m_n, b_dv, D, BLOCK_D)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, the same bits at every call.

    Args:
        grad_out, grad_lse: gradients of the output and of the log-sum-exp, the latter or None.
        out, lse: what the forward pass returned; the rest is what it was given.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv, out, grad_out)
    batch, tokens_q, heads, head_dim = q.shape
    tokens_kv = k.shape[1]
    delta, log2_lse = lse.new_empty((2, batch, heads, tokens_q), dtype=torch.float32)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    order = cached_row_order(layout)
    columns = cached_transpose(layout, -(-tokens_kv // block_kv))
    n_rows, n_columns = order.shape[-1], columns.order.shape[-1]
    tensors = (q, k, v, grad_out, problem.key_mask, delta, log2_lse)
    strides = (
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *problem.key_mask_strides,
        *problem.layout_strides,
    )  # fmt: skip
    with problem.on_device():
        delta_kernel[(batch * heads * triton.cdiv(tokens_q, DELTA_TILE),)](
            out, grad_out, lse, lse if grad_lse is None else grad_lse, delta, log2_lse,
            *out.stride(), *grad_out.stride(), *lse.stride(),
            *(lse if grad_lse is None else grad_lse).stride(),
            tokens_q, heads,
            D=head_dim, BLOCK_D=problem.block_d, BLOCK_M=DELTA_TILE,
            HAS_GRAD_LSE=grad_lse is not None, WIDE=problem.wide,
        )  # fmt: skip
        config = problem.tiles("queries")
        queries_kernel[(batch * heads * n_rows * (block_q // config.block_m),)](
            *tensors, dq, order, *problem.layout, *strides,
            tokens_q, tokens_kv, heads, n_rows, layout[1].shape[-1], layout[3].shape[-1], scale,
            **problem.constants(config),
        )  # fmt: skip
        config = problem.tiles("keys")
        keys_kernel[(batch * heads * n_columns * (block_kv // config.block_n),)](
            *tensors, dk, dv,
            columns.order, columns.full_start, columns.full_row,
            columns.partial_start, columns.partial_row, columns.partial_mask, problem.layout[-1],
            *strides,
            tokens_q, tokens_kv, heads, n_columns,
            columns.full_row.shape[-1], columns.partial_row.shape[-1], scale,
            **problem.constants(config),
        )  # fmt: skip
    return dq, dk, dv
