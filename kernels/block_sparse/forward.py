"""The forward kernel: one program per tile of queries walks the key blocks of its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import LayoutTensors
from .configs import TileConfig
from .launch import Problem
from .plan import cached_row_order
from .primitives import (
    LN_2,
    LOG2_E,
    load_bits,
    load_tile,
    row_lists,
    store_tile,
    tile_of_program,
    token_offsets,
)


@triton.jit
def attend_tile(
    b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_s, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the online softmax, in powers of 2: `scale` > 0 has log2(e) in it."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if MASKED:
        b_s = tl.where(m_s, b_s * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A query that has seen nothing yet has a maximum of -inf, and -inf - -inf is NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
    else:
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_base = b_new
        b_p = tl.exp2(b_s * scale - b_base[:, None])
    b_old = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap", "partial_cap"])
def forward_kernel(
    p_q, p_k, p_v, p_key_mask, p_out, p_lse,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd, s_mb, s_mt,
    s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
    m_m = start_m + o_m < tokens_q
    p_q += i_b * s_qb + i_h * s_qh + start_m.to(tl.int64) * s_qt
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_key_mask += i_b * s_mb
    p_partial_index += i_list.to(tl.int64) * partial_cap
    p_partial_mask += i_list.to(tl.int64) * partial_cap

    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)
    scale *= LOG2_E
    if NEGATIVE_SCALE:  # the maximum of scaled scores is that of the scores only if scale > 0
        b_q = (-b_q.to(tl.float32)).to(b_q.dtype)
        scale = -scale
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # Full blocks. An index is loaded one step early: it must not hold up keys and values.
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
        # What is hidden is read as 0: a NaN left in padding must not reach a sum.
        b_k = load_tile(p_kt, s_kt, s_kd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_v = load_tile(p_vt, s_vt, s_vd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_acc, b_max, b_sum = attend_tile(
            b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_n[None, :], HAS_KEY_MASK, PRECISION
        )

    # Partial blocks, then the short full one.
    i_short = tokens_kv // BLOCK_KV
    i_block = tl.load(p_partial_index, mask=n_partial > 0, other=i_short)
    i_mask = tl.load(p_partial_mask, mask=n_partial > 0, other=0)
    for i in tl.range(0, (n_partial + n_short) * TILES_N):
        o_w = tl.arange(0, BLOCK_M)
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
        b_acc, b_max, b_sum = attend_tile(
            b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_s & m_n[None, :], True, PRECISION
        )

    b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
    b_out = b_acc / b_norm[:, None]
    b_lse = (b_max + tl.log2(b_norm)) * LN_2
    first = (i_b * tokens_q + start_m) * heads + i_h
    store_tile(p_out + first * D, heads * D, tl.arange(0, BLOCK_M), m_m, b_out, D, BLOCK_D)
    p_lse += (i_b * heads + i_h) * tokens_q + start_m
    tl.store(p_lse + tl.arange(0, BLOCK_M), b_lse, mask=m_m)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp; arguments as `block_sparse_attention`, already checked.

    Args:
        config: tiles to use instead of those in the table.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv)
    if config is None:
        config = problem.tiles("forward")
    batch, tokens_q, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    order = cached_row_order(layout)
    rows = order.shape[-1]
    with problem.on_device():
        forward_kernel[(batch * heads * rows * (block_q // config.block_m),)](
            q, k, v, problem.key_mask, out, lse, order, *problem.layout,
            *q.stride(), *k.stride(), *v.stride(), *problem.key_mask_strides,
            *problem.layout_strides,
            tokens_q, k.shape[1], heads, rows, layout[1].shape[-1], layout[3].shape[-1], scale,
            NEGATIVE_SCALE=scale < 0,
            **problem.constants(config),
        )  # fmt: skip
    return out, lse
