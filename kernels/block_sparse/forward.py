"""The forward kernel: one program per tile of queries walks the key blocks of its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launching import launch
from ..common.primitives import (
    LN_2,
    LOG2_E,
    load_tile,
    read_tokens,
    store_tile,
    tile_of_program,
    token_offsets,
)
from ..common.softmax import attend_tile, weigh
from ..common.tile_tables import TileConfig
from .block_lists import load_bits, row_lists
from .launch import Problem
from .walk import cached_rows


@triton.jit
def store_rows(
    p_out, p_lse, i_b, i_h, start_m, tokens_q, heads, b_acc, b_max, b_sum,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store output and LSE of a tile of queries: 0 and -inf for a query that has seen no key."""
    o_m = tl.arange(0, BLOCK_M)
    m_m = start_m + o_m < tokens_q
    b_norm = tl.where(b_sum == 0, 1.0, b_sum)
    b_lse = (b_max + tl.log2(b_norm)) * LN_2
    first = (i_b * tokens_q + start_m) * heads + i_h
    store_tile(p_out + first * D, heads * D, o_m, m_m, b_acc / b_norm[:, None], D, BLOCK_D)
    tl.store(p_lse + (i_b * heads + i_h) * tokens_q + start_m + o_m, b_lse, mask=m_m)


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap", "partial_cap"])
def forward_kernel(
    p_q, x_k, x_v, x_k_partial, x_v_partial, p_key_mask, p_out, p_lse,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd, s_mb, s_mt,
    s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTIAL_N: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_PARTIAL: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    AHEAD: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of queries.

    With AHEAD, the product for a tile's scores runs one tile early. The matrix units then have work
    while the weights of the previous tile are computed. In the source the weights stand before the
    next product: otherwise the compiler does not overlap the two.
    """
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    # Loads by pointer leave out hidden keys. The copy engine takes no mask.
    KEY_MASKED: tl.constexpr = HAS_KEY_MASK and not TMA
    i_tile, i_b, i_h, i_layout = tile_of_program(rows * TILES_M, heads, s_layout_b, s_layout_h)
    i_row = tl.load(p_order + i_layout * rows + i_tile // TILES_M)
    i_list = i_layout * rows + i_row
    start_in_block = (i_tile % TILES_M) * BLOCK_M
    start_m = i_row * BLOCK_Q + start_in_block
    if start_m >= tokens_q:
        return

    p_q += i_b * s_qb + i_h * s_qh + start_m.to(tl.int64) * s_qt
    if not TMA:
        x_k += i_b * s_kb + i_h * s_kh
        x_v += i_b * s_vb + i_h * s_vh
        x_k_partial = x_k
        x_v_partial = x_v
    p_key_mask += i_b * s_mb
    o_n = tl.arange(0, BLOCK_N)
    m_m = start_m + tl.arange(0, BLOCK_M) < tokens_q
    o_m = token_offsets(BLOCK_M, WIDE)
    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    scale *= LOG2_E
    if NEGATIVE_SCALE:  # only with scale > 0 is the largest score the largest scaled score
        b_q = (-b_q.to(tl.float32)).to(b_q.dtype)
        scale = -scale
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # Full blocks. An index is loaded one step early, so that keys and values do not wait for it.
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
            b_k = read_tokens(
                x_k, i_b, i_h, next_n, s_kt, s_kd, m_n, False, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            if HAS_KEY_MASK:
                m_n = tl.load(p_key_mask + (start_n + o_n).to(tl.int64) * s_mt) != 0  # (BLOCK_N,)
            b_p, b_new, b_old = weigh(b_s, b_max, scale, m_n[None, :], HAS_KEY_MASK)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
            b_sum = b_sum * b_old + tl.sum(b_p, 1)
            b_v = read_tokens(
                x_v, i_b, i_h, start_n, s_vt, s_vd, m_n, KEY_MASKED, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            if HAS_KEY_MASK and TMA:
                b_v = tl.where(m_n[:, None], b_v, 0.0)  # a NaN in padding must not reach a sum
            b_acc = tl.dot(
                b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION
            )  # (BLOCK_M, BLOCK_D)
            b_max = b_new
            start_n = next_n
    else:
        for i in tl.range(0, n_full * TILES_N):
            start_n = i_block * BLOCK_KV + (i % TILES_N) * BLOCK_N
            i_block = tl.load(p_full + tl.minimum((i + 1) // TILES_N, n_full - 1))
            if HAS_KEY_MASK:
                m_n = tl.load(p_key_mask + (start_n + o_n).to(tl.int64) * s_mt) != 0  # (BLOCK_N,)
            # Hidden keys are read as 0: a NaN left in padding must not reach a sum.
            b_k = read_tokens(
                x_k, i_b, i_h, start_n, s_kt, s_kd, m_n, KEY_MASKED, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            b_v = read_tokens(
                x_v, i_b, i_h, start_n, s_vt, s_vd, m_n, KEY_MASKED, D, BLOCK_N, BLOCK_D, WIDE, TMA
            )  # (BLOCK_N, BLOCK_D)
            if HAS_KEY_MASK and TMA:
                b_v = tl.where(m_n[:, None], b_v, 0.0)
            b_acc, b_max, b_sum = attend_tile(
                b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_n[None, :], HAS_KEY_MASK, PRECISION
            )

    if HAS_PARTIAL:
        # Partial blocks, then the short full block.
        PARTIALS_N: tl.constexpr = BLOCK_KV // PARTIAL_N
        p_partial_index += i_list.to(tl.int64) * partial_cap
        p_partial_mask += i_list.to(tl.int64) * partial_cap
        o_p = tl.arange(0, PARTIAL_N)
        o_w = tl.arange(0, BLOCK_M)
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
            if HAS_KEY_MASK and TMA:
                b_vp = tl.where(m_p[:, None], b_vp, 0.0)
            b_acc, b_max, b_sum = attend_tile(
                b_q, b_kp, b_vp, b_acc, b_max, b_sum, scale, m_s, True, PRECISION
            )
    store_rows(
        p_out, p_lse, i_b, i_h, start_m, tokens_q, heads, b_acc, b_max, b_sum, D, BLOCK_M, BLOCK_D
    )


def forward(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: TileConfig,
    *,
    tma: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, like q, and the log-sum-exp, float32 `(batch, heads, tokens_q)`.

    Args:
        q, k, v: `(batch, tokens, heads, head_dim)`.
        tma: whether the copy engine fetches tiles; only for tensors that `problem.tma_takes`.
    """
    batch, tokens_q, heads, _ = q.shape
    tokens_kv = k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    rows = cached_rows(problem.layout, tokens_kv, problem.block_kv)
    n_rows = rows.order.shape[-1]
    part = config.partial or config.block_n
    sources = problem.sources(
        (k, config.block_n), (v, config.block_n), (k, part), (v, part), tma=tma
    )
    with problem.on_device():
        launch(
            forward_kernel,
            batch * heads * n_rows * (problem.block_q // config.block_m),
            (q, *sources, problem.key_mask, out, lse, rows.order, *problem.rows_layout(rows)),
            (*q.stride(), *k.stride(), *v.stride(), *problem.key_mask_strides,
             *problem.layout_strides,
             tokens_q, tokens_kv, heads, n_rows,
             problem.layout[1].shape[-1], problem.layout[3].shape[-1]),
            (problem.scale_not_0,),
            PARTIAL_N=part, HAS_PARTIAL=problem.rows_have_masks(tokens_kv),
            NEGATIVE_SCALE=problem.scale < 0, AHEAD=config.ahead,
            TMA=tma, **problem.constants(config),
        )  # fmt: skip
    return out, lse
