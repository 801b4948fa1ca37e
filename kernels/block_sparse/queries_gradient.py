"""The gradient of the queries: one program per tile of queries walks the key blocks of its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launching import launch
from ..common.primitives import (
    LOG2_E,
    load_tile,
    read_tokens,
    store_tile,
    tile_of_program,
    token_offsets,
)
from ..common.row_sums import RowSums
from ..common.softmax import add_to_queries, score_gradient
from ..common.tile_tables import TileConfig
from .block_lists import load_bits, row_lists
from .launch import Problem
from .walk import cached_rows


@triton.jit(
    do_not_specialize=["tokens_q", "tokens_padded", "tokens_kv", "rows", "full_cap", "partial_cap"]
)
def queries_kernel(
    p_q, p_grad_out, x_k, x_v, x_k_partial, x_v_partial, p_key_mask, p_delta, p_log2_lse, p_dq,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_mb, s_mt, s_layout_b, s_layout_h,
    tokens_q, tokens_padded, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL_N: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_PARTIAL: tl.constexpr, AHEAD: tl.constexpr,
    WIDE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries. Rows are walked, and AHEAD works, as in `forward.forward_kernel`."""
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    KEY_MASKED: tl.constexpr = HAS_KEY_MASK and not TMA
    i_tile, i_b, i_h, i_layout = tile_of_program(rows * TILES_M, heads, s_layout_b, s_layout_h)
    i_row = tl.load(p_order + i_layout * rows + i_tile // TILES_M)
    i_list = i_layout * rows + i_row
    start_in_block = (i_tile % TILES_M) * BLOCK_M
    start_m = i_row * BLOCK_Q + start_in_block
    if start_m >= tokens_q:
        return

    p_q += i_b * s_qb + i_h * s_qh + start_m.to(tl.int64) * s_qt
    p_grad_out += i_b * s_gb + i_h * s_gh + start_m.to(tl.int64) * s_gt
    if not TMA:
        x_k += i_b * s_kb + i_h * s_kh
        x_v += i_b * s_vb + i_h * s_vh
        x_k_partial = x_k
        x_v_partial = x_v
    p_key_mask += i_b * s_mb
    o_n = tl.arange(0, BLOCK_N)
    o_w = tl.arange(0, BLOCK_M)
    m_m = start_m + o_w < tokens_q
    first = (i_b * heads + i_h) * tokens_padded + start_m
    b_lse = tl.load(p_log2_lse + first + o_w)  # (BLOCK_M,)
    b_delta = tl.load(p_delta + first + o_w)  # (BLOCK_M,)
    o_m = token_offsets(BLOCK_M, WIDE)
    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    b_grad = load_tile(p_grad_out, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    to_base_2 = scale * LOG2_E

    p_full, n_full, n_partial, n_short = row_lists(
        p_full_count, p_full_index, p_partial_count, i_list, full_cap, tokens_kv, BLOCK_KV
    )
    i_block = tl.load(p_full, mask=n_full > 0, other=0)
    m_n = o_n < BLOCK_N
    if AHEAD:
        start_n = i_block * BLOCK_KV
        i_block = tl.load(p_full + tl.minimum(1 // TILES_N, n_full - 1), mask=n_full > 0, other=0)
        m_first = start_n + o_n < tokens_kv  # a row without full blocks reads block 0, maybe short
        b_k = read_tokens(
            x_k, i_b, i_h, start_n, s_kt, s_kd, m_first, True, D, BLOCK_N, BLOCK_D, WIDE, TMA
        )  # (BLOCK_N, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        for i in tl.range(0, n_full * TILES_N):
            next_n = i_block * BLOCK_KV + ((i + 1) % TILES_N) * BLOCK_N
            i_block = tl.load(p_full + tl.minimum((i + 2) // TILES_N, n_full - 1))
            if HAS_KEY_MASK:
                m_n = tl.load(p_key_mask + (start_n + o_n).to(tl.int64) * s_mt) != 0  # (BLOCK_N,)
            b_k = read_tokens(
                x_k, i_b, i_h, start_n, s_kt, s_kd, m_n, KEY_MASKED, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            if HAS_KEY_MASK and TMA:
                b_k = tl.where(m_n[:, None], b_k, 0.0)  # a NaN in padding must not reach a sum
            b_k_next = read_tokens(
                x_k, i_b, i_h, next_n, s_kt, s_kd, m_n, False, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            b_v = read_tokens(
                x_v, i_b, i_h, start_n, s_vt, s_vd, m_n, False, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            b_ds = score_gradient(  # (BLOCK_M, BLOCK_N)
                b_s, b_grad, b_v, b_lse, b_delta, to_base_2, m_n[None, :], b_k.dtype, HAS_KEY_MASK,
                PRECISION,
            )  # fmt: skip
            b_s = tl.dot(b_q, tl.trans(b_k_next), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
            start_n = next_n
    else:
        for i in tl.range(0, n_full * TILES_N):
            start_n = i_block * BLOCK_KV + (i % TILES_N) * BLOCK_N
            i_block = tl.load(p_full + tl.minimum((i + 1) // TILES_N, n_full - 1))
            if HAS_KEY_MASK:
                m_n = tl.load(p_key_mask + (start_n + o_n).to(tl.int64) * s_mt) != 0  # (BLOCK_N,)
            b_k = read_tokens(
                x_k, i_b, i_h, start_n, s_kt, s_kd, m_n, KEY_MASKED, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            if HAS_KEY_MASK and TMA:
                b_k = tl.where(m_n[:, None], b_k, 0.0)
            b_v = read_tokens(
                x_v, i_b, i_h, start_n, s_vt, s_vd, m_n, False, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            b_dq = add_to_queries(  # (BLOCK_M, BLOCK_D)
                b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, to_base_2, m_n[None, :], HAS_KEY_MASK,
                PRECISION,
            )  # fmt: skip

    if HAS_PARTIAL:
        PARTIALS_N: tl.constexpr = BLOCK_KV // PARTIAL_N
        p_partial_index += i_list.to(tl.int64) * partial_cap
        p_partial_mask += i_list.to(tl.int64) * partial_cap
        o_p = tl.arange(0, PARTIAL_N)
        i_short = tokens_kv // BLOCK_KV
        i_block = tl.load(p_partial_index, mask=n_partial > 0, other=i_short)
        i_mask = tl.load(p_partial_mask, mask=n_partial > 0, other=0)
        for i in tl.range(0, (n_partial + n_short) * PARTIALS_N):
            m_w = o_w < tl.where(i // PARTIALS_N < n_partial, BLOCK_M, 0)
            start_in_kv = (i % PARTIALS_N) * PARTIAL_N
            start_block = i_block * BLOCK_KV
            start_n = start_block + start_in_kv
            p_words = p_bit_masks + (i_mask.to(tl.int64) * BLOCK_Q + start_in_block) * WORDS
            m_s = load_bits(  # (BLOCK_M, PARTIAL_N)
                p_words, WORDS, o_w, m_w, start_in_kv, tokens_kv - start_block,
                BLOCK_M, PARTIAL_N, False,
            )  # fmt: skip
            i_next = (i + 1) // PARTIALS_N
            i_block = tl.load(p_partial_index + i_next, mask=i_next < n_partial, other=i_short)
            i_mask = tl.load(p_partial_mask + i_next, mask=i_next < n_partial, other=0)
            m_p = start_n + o_p < tokens_kv
            if HAS_KEY_MASK:
                p_visible = p_key_mask + (start_n + o_p).to(tl.int64) * s_mt
                m_p = tl.load(p_visible, mask=m_p, other=0) != 0  # (PARTIAL_N,)
                m_s = m_s & m_p[None, :]
            b_kp = read_tokens(
                x_k_partial,
                i_b,
                i_h,
                start_n,
                s_kt,
                s_kd,
                m_p,
                True,
                D,
                PARTIAL_N,
                BLOCK_D,
                WIDE,
                TMA,
            )  # (PARTIAL_N, BLOCK_D)
            if HAS_KEY_MASK and TMA:
                b_kp = tl.where(m_p[:, None], b_kp, 0.0)
            b_vp = read_tokens(
                x_v_partial,
                i_b,
                i_h,
                start_n,
                s_vt,
                s_vd,
                m_p,
                True,
                D,
                PARTIAL_N,
                BLOCK_D,
                WIDE,
                TMA,
            )  # (PARTIAL_N, BLOCK_D)
            b_dq = add_to_queries(
                b_q, b_grad, b_kp, b_vp, b_lse, b_delta, b_dq, to_base_2, m_s, True, PRECISION
            )  # (BLOCK_M, BLOCK_D)
    p_dq += (i_b * tokens_q + start_m) * heads * D + i_h * D
    store_tile(p_dq, heads * D, o_w, m_m, b_dq * scale, D, BLOCK_D)


def tma_takes(problem: Problem, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the copy engine can fetch the tiles.

    Keys that a key mask hides are replaced in registers. Beyond a head_dim of 128 there are too few
    registers for that.
    """
    return problem.tma_takes(k, v) and not (problem.has_key_mask and problem.head_dim > 128)


def queries_gradient(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    sums: RowSums,
    config: TileConfig,
    *,
    tma: bool,
) -> torch.Tensor:
    """The gradient of q, like q; the same bits at every call.

    Args:
        tma: whether the copy engine fetches tiles; only for calls that `tma_takes`.
    """
    batch, tokens_q, heads, _ = q.shape
    tokens_kv = k.shape[1]
    dq = q.new_empty(q.shape)
    rows = cached_rows(problem.layout, tokens_kv, problem.block_kv)
    n_rows = rows.order.shape[-1]
    part = config.partial or config.block_n
    sources = problem.sources(
        (k, config.block_n), (v, config.block_n), (k, part), (v, part), tma=tma
    )
    with problem.on_device():
        launch(
            queries_kernel,
            batch * heads * n_rows * (problem.block_q // config.block_m),
            (q, grad_out, *sources, problem.key_mask, sums.delta, sums.log2_lse, dq,
             rows.order, *problem.rows_layout(rows)),
            (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *problem.key_mask_strides,
             *problem.layout_strides,
             tokens_q, sums.tokens, tokens_kv, heads, n_rows,
             problem.layout[1].shape[-1], problem.layout[3].shape[-1]),
            (problem.scale,),
            PARTIAL_N=part, HAS_PARTIAL=problem.rows_have_masks(tokens_kv), AHEAD=config.ahead,
            TMA=tma, **problem.constants(config),
        )  # fmt: skip
    return dq
