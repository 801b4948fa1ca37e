"""The gradients of keys and values: one program per tile of keys walks the rows that visit it."""

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
from ..common.softmax import add_to_keys
from ..common.tile_tables import TileConfig
from .block_lists import load_bits
from .launch import Problem
from .walk import cached_transpose


@triton.jit(
    do_not_specialize=[
        "tokens_q", "tokens_padded", "tokens_kv", "columns", "full_entries", "partial_entries",
    ]
)  # fmt: skip
def keys_kernel(
    p_k, p_v, x_q, x_grad_out, x_q_partial, x_grad_partial,
    p_key_mask, p_delta, p_log2_lse, p_dk, p_dv,
    p_order, p_full_start, p_full_row, p_partial_start, p_partial_row, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_mb, s_mt, s_layout_b, s_layout_h,
    tokens_q, tokens_padded, tokens_kv, heads, columns, full_entries, partial_entries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL_M: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_PARTIAL: tl.constexpr, WIDE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys."""
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    i_tile, i_b, i_h, i_layout = tile_of_program(columns * TILES_N, heads, s_layout_b, s_layout_h)
    i_column = tl.load(p_order + i_layout * columns + i_tile // TILES_N)
    start_in_block = (i_tile % TILES_N) * BLOCK_N
    start_n = i_column * BLOCK_KV + start_in_block
    if start_n >= tokens_kv:
        return

    p_k += i_b * s_kb + i_h * s_kh + start_n.to(tl.int64) * s_kt
    p_v += i_b * s_vb + i_h * s_vh + start_n.to(tl.int64) * s_vt
    if not TMA:
        x_q += i_b * s_qb + i_h * s_qh
        x_grad_out += i_b * s_gb + i_h * s_gh
        x_q_partial = x_q
        x_grad_partial = x_grad_out
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    p_delta += (i_b * heads + i_h) * tokens_padded
    p_log2_lse += (i_b * heads + i_h) * tokens_padded
    p_full_row += i_layout.to(tl.int64) * full_entries
    to_base_2 = scale * LOG2_E

    m_n = start_n + o_n < tokens_kv
    o_t = token_offsets(BLOCK_N, WIDE)
    b_k = load_tile(p_k, s_kt, s_kd, o_t, m_n, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_v = load_tile(p_v, s_vt, s_vd, o_t, m_n, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if HAS_KEY_MASK:
        p_key_mask += i_b * s_mb
        p_seen = p_key_mask + (start_n + o_n).to(tl.int64) * s_mt
        m_seen = tl.load(p_seen, mask=m_n, other=0)[:, None] != 0  # (BLOCK_N, 1)

    # A key's gradients come from its own scores only: hidden keys, and NaN in them, need no mask
    # until the end. Queries past the end have weights of exp2(0 - inf) = 0. Row sums are loaded one
    # step early: otherwise the compiler copies them to shared memory first, four bytes at a time.
    i_list = i_layout * (columns + 1) + i_column
    i_entry = tl.load(p_full_start + i_list)
    i_stop = tl.load(p_full_start + i_list + 1)
    start_m = tl.load(p_full_row + i_entry, mask=i_entry < i_stop, other=0) * BLOCK_Q
    b_lse_next = tl.load(p_log2_lse + start_m + o_m)  # (BLOCK_M,)
    b_delta_next = tl.load(p_delta + start_m + o_m)  # (BLOCK_M,)
    i_next = tl.minimum(i_entry + 1 // TILES_M, i_stop - 1)
    i_row = tl.load(p_full_row + i_next, mask=i_entry < i_stop, other=0)
    for i in tl.range(0, (i_stop - i_entry) * TILES_M):
        b_lse = b_lse_next
        b_delta = b_delta_next
        m_m = start_m + o_m < tokens_q
        b_q = read_tokens(
            x_q, i_b, i_h, start_m, s_qt, s_qd, m_m, True, D, BLOCK_M, BLOCK_D, WIDE, TMA
        )  # (BLOCK_M, BLOCK_D)
        b_grad = read_tokens(
            x_grad_out, i_b, i_h, start_m, s_gt, s_gd, m_m, True, D, BLOCK_M, BLOCK_D, WIDE, TMA
        )  # (BLOCK_M, BLOCK_D)
        next_m = i_row * BLOCK_Q + ((i + 1) % TILES_M) * BLOCK_M
        i_row = tl.load(p_full_row + tl.minimum(i_entry + (i + 2) // TILES_M, i_stop - 1))
        b_lse_next = tl.load(p_log2_lse + next_m + o_m)  # (BLOCK_M,)
        b_delta_next = tl.load(p_delta + next_m + o_m)  # (BLOCK_M,)
        b_dk, b_dv = add_to_keys(
            b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, to_base_2, True, False, PRECISION
        )
        start_m = next_m

    if HAS_PARTIAL:
        PARTIALS_M: tl.constexpr = BLOCK_Q // PARTIAL_M
        p_partial_row += i_layout.to(tl.int64) * partial_entries
        p_partial_mask += i_layout.to(tl.int64) * partial_entries
        o_m = tl.arange(0, PARTIAL_M)
        i_entry = tl.load(p_partial_start + i_list)
        i_stop = tl.load(p_partial_start + i_list + 1)
        i_row = tl.load(p_partial_row + i_entry, mask=i_entry < i_stop, other=0)
        i_mask = tl.load(p_partial_mask + i_entry, mask=i_entry < i_stop, other=0)
        for i in tl.range(0, (i_stop - i_entry) * PARTIALS_M):
            start_in_q = (i % PARTIALS_M) * PARTIAL_M
            start_m = i_row * BLOCK_Q + start_in_q
            m_m = start_m + o_m < tokens_q
            p_words = p_bit_masks + (i_mask.to(tl.int64) * BLOCK_Q + start_in_q) * WORDS
            m_s = load_bits(  # (BLOCK_N, PARTIAL_M)
                p_words, WORDS, o_m, o_m < PARTIAL_M, start_in_block, BLOCK_KV,
                PARTIAL_M, BLOCK_N, True,
            )  # fmt: skip
            i_next = tl.minimum(i_entry + (i + 1) // PARTIALS_M, i_stop - 1)
            i_row = tl.load(p_partial_row + i_next)
            i_mask = tl.load(p_partial_mask + i_next)
            b_q = read_tokens(
                x_q_partial,
                i_b,
                i_h,
                start_m,
                s_qt,
                s_qd,
                m_m,
                True,
                D,
                PARTIAL_M,
                BLOCK_D,
                WIDE,
                TMA,
            )  # (PARTIAL_M, BLOCK_D)
            b_grad = read_tokens(
                x_grad_partial,
                i_b,
                i_h,
                start_m,
                s_gt,
                s_gd,
                m_m,
                True,
                D,
                PARTIAL_M,
                BLOCK_D,
                WIDE,
                TMA,
            )  # (PARTIAL_M, BLOCK_D)
            b_lse = tl.load(p_log2_lse + start_m + o_m)  # (PARTIAL_M,)
            b_delta = tl.load(p_delta + start_m + o_m)  # (PARTIAL_M,)
            b_dk, b_dv = add_to_keys(
                b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, to_base_2, m_s, True, PRECISION
            )

    b_dk *= scale
    if HAS_KEY_MASK:
        b_dk = tl.where(m_seen, b_dk, 0.0)
        b_dv = tl.where(m_seen, b_dv, 0.0)
    first = (i_b * tokens_kv + start_n) * heads * D + i_h * D
    store_tile(p_dk + first, heads * D, o_n, m_n, b_dk, D, BLOCK_D)
    store_tile(p_dv + first, heads * D, o_n, m_n, b_dv, D, BLOCK_D)


def keys_gradient(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    sums: RowSums,
    config: TileConfig,
    *,
    tma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of k and v, the same bits at every call.

    Args:
        tma: whether the copy engine fetches tiles; only for tensors that `problem.tma_takes`.

    Returns:
        dk, dv: like k and v.
    """
    batch, tokens_q, heads, _ = q.shape
    tokens_kv = k.shape[1]
    dk, dv = (x.new_empty(x.shape) for x in (k, v))
    columns = cached_transpose(problem.layout, -(-tokens_kv // problem.block_kv))
    n_columns = columns.order.shape[-1]
    part = config.partial or config.block_m
    sources = problem.sources(
        (q, config.block_m), (grad_out, config.block_m), (q, part), (grad_out, part), tma=tma
    )
    with problem.on_device():
        launch(
            keys_kernel,
            batch * heads * n_columns * (problem.block_kv // config.block_n),
            (k, v, *sources, problem.key_mask, sums.delta, sums.log2_lse, dk, dv,
             columns.order, columns.full_start, columns.full_row,
             columns.partial_start, columns.partial_row, columns.partial_mask, problem.lists[-1]),
            (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *problem.key_mask_strides,
             *problem.layout_strides,
             tokens_q, sums.tokens, tokens_kv, heads, n_columns,
             columns.full_row.shape[-1], columns.partial_row.shape[-1]),
            (problem.scale,),
            PARTIAL_M=part, HAS_PARTIAL=problem.has_partial, TMA=tma, **problem.constants(config),
        )  # fmt: skip
    return dk, dv
