"""The forward-mode derivative: one program per tile of queries walks the key blocks of its row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import LayoutTensors
from ..common.primitives import LOG2_E, load_tile, store_tile, tile_of_program, token_offsets
from ..common.tile_tables import Tables, TileConfig, both
from ..operators import empty_outputs
from .block_lists import load_bits, row_lists
from .configs import fitted
from .launch import Problem
from .walk import cached_rows

# Shared memory holds four tiles per stage: keys, values, and the tangents of both. Each entry has
# the largest share of the tensor cores' cycles by the machine code, among tiles that compute no
# product twice and, in 16 bits, spill no more than a few words. Nothing has been timed. float32
# spills beyond a head dimension of 64, whatever the tiles.
_TABLES = Tables(
    ampere={"tangent": {64: both(64, 64, 4, 2), 128: both(128, 16, 8, 2), 256: both(16, 32, 4, 1)}},
    hopper={"tangent": {64: both(64, 64, 4, 2), 128: both(64, 32, 4, 2), 256: both(128, 16, 8, 1)}},
    blackwell={
        "tangent": {64: both(64, 64, 4, 2), 128: both(64, 32, 4, 2), 256: both(64, 16, 4, 2)}
    },
    other={"tangent": {64: both(64, 32, 4, 1), 128: both(64, 16, 4, 1), 256: both(16, 16, 4, 1)}},
    float32={
        "tangent": {64: both(16, 16, 8, 1), 128: both(16, 16, 8, 1), 256: both(16, 16, 16, 1)}
    },
)


@triton.jit
def add_tile(
    b_q, b_dq, b_k, b_v, b_dk, b_dv, b_lse, b_acc, b_mean, scale, m_s,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile's keys to sum(p t v) + sum(p dv), (BLOCK_M, BLOCK_D), and to sum(p t), (BLOCK_M,).

    Here p are the weights, t the tangents of the scores, v the values, dv the values' tangents.
    """
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_p = tl.exp2(b_s * (scale * LOG2_E) - b_lse[:, None])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_t = tl.dot(b_dq, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_t = tl.dot(b_q, tl.trans(b_dk), b_t, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_pt = b_p * (b_t * scale)
    # Both (BLOCK_M, BLOCK_D).
    b_acc = tl.dot(b_pt.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    b_acc = tl.dot(b_p.to(b_dv.dtype), b_dv, b_acc, input_precision=PRECISION)
    return b_acc, b_mean + tl.sum(b_pt, 1)


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap", "partial_cap"])
def tangent_kernel(
    p_q, p_k, p_v, p_dq, p_dk, p_dv, p_out, p_key_mask, p_lse, p_out_tangent, p_lse_tangent,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_dqb, s_dqt, s_dqh, s_dqd, s_dkb, s_dkt, s_dkh, s_dkd, s_dvb, s_dvt, s_dvh, s_dvd,
    s_ob, s_ot, s_oh, s_od, s_mb, s_mt, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
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
    o_w = tl.arange(0, BLOCK_M)
    m_m = start_m + o_m < tokens_q
    p_q += i_b * s_qb + i_h * s_qh + start_m.to(tl.int64) * s_qt
    p_dq += i_b * s_dqb + i_h * s_dqh + start_m.to(tl.int64) * s_dqt
    p_out += i_b * s_ob + i_h * s_oh + start_m.to(tl.int64) * s_ot
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_dk += i_b * s_dkb + i_h * s_dkh
    p_dv += i_b * s_dvb + i_h * s_dvh
    p_key_mask += i_b * s_mb
    p_partial_index += i_list.to(tl.int64) * partial_cap
    p_partial_mask += i_list.to(tl.int64) * partial_cap

    # Weights are exp2(s - inf) = 0 for queries that see nothing, and for queries past the end.
    first = (i_b * heads + i_h) * tokens_q + start_m
    b_lse = tl.load(p_lse + first + o_w, mask=m_m, other=float("-inf"))  # (BLOCK_M,)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)
    b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    b_dq = load_tile(p_dq, s_dqt, s_dqd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_mean = tl.zeros((BLOCK_M,), dtype=tl.float32)

    p_full, n_full, n_partial, n_short = row_lists(
        p_full_count, p_full_index, p_partial_count, i_list, full_cap, tokens_kv, BLOCK_KV
    )
    i_block = tl.load(p_full, mask=n_full > 0, other=0)
    for i in tl.range(0, n_full * TILES_N):
        start_n = i_block * BLOCK_KV + (i % TILES_N) * BLOCK_N
        i_block = tl.load(p_full + tl.minimum((i + 1) // TILES_N, n_full - 1))
        start = start_n.to(tl.int64)
        m_n = o_n < BLOCK_N
        if HAS_KEY_MASK:
            m_n = tl.load(p_key_mask + (start + o_n) * s_mt) != 0  # (BLOCK_N,)
        # All four (BLOCK_N, BLOCK_D).
        b_k = load_tile(p_k + start * s_kt, s_kt, s_kd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_v = load_tile(p_v + start * s_vt, s_vt, s_vd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_dk = load_tile(p_dk + start * s_dkt, s_dkt, s_dkd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_dv = load_tile(p_dv + start * s_dvt, s_dvt, s_dvd, o_n, m_n, HAS_KEY_MASK, D, BLOCK_D)
        b_acc, b_mean = add_tile(
            b_q, b_dq, b_k, b_v, b_dk, b_dv, b_lse, b_acc, b_mean, scale, m_n[None, :],
            HAS_KEY_MASK, PRECISION,
        )  # fmt: skip

    # Partial blocks, then the short full block.
    i_short = tokens_kv // BLOCK_KV
    i_block = tl.load(p_partial_index, mask=n_partial > 0, other=i_short)
    i_mask = tl.load(p_partial_mask, mask=n_partial > 0, other=0)
    for i in tl.range(0, (n_partial + n_short) * TILES_N):
        m_w = o_w < tl.where(i // TILES_N < n_partial, BLOCK_M, 0)
        start_in_kv = (i % TILES_N) * BLOCK_N
        start_n = i_block * BLOCK_KV + start_in_kv
        p_words = p_bit_masks + (i_mask.to(tl.int64) * BLOCK_Q + start_in_block) * WORDS
        m_s = load_bits(  # (BLOCK_M, BLOCK_N)
            p_words, WORDS, o_w, m_w, start_in_kv, tokens_kv - i_block * BLOCK_KV,
            BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
        i_next = (i + 1) // TILES_N
        i_block = tl.load(p_partial_index + i_next, mask=i_next < n_partial, other=i_short)
        i_mask = tl.load(p_partial_mask + i_next, mask=i_next < n_partial, other=0)
        start = start_n.to(tl.int64)
        m_n = start_n + o_n < tokens_kv
        if HAS_KEY_MASK:
            # m_n: (BLOCK_N,)
            m_n = tl.load(p_key_mask + (start + o_n) * s_mt, mask=m_n, other=0) != 0
            m_s = m_s & m_n[None, :]
        # All four (BLOCK_N, BLOCK_D).
        b_k = load_tile(p_k + start * s_kt, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D)
        b_v = load_tile(p_v + start * s_vt, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D)
        b_dk = load_tile(p_dk + start * s_dkt, s_dkt, s_dkd, o_n, m_n, True, D, BLOCK_D)
        b_dv = load_tile(p_dv + start * s_dvt, s_dvt, s_dvd, o_n, m_n, True, D, BLOCK_D)
        b_acc, b_mean = add_tile(
            b_q, b_dq, b_k, b_v, b_dk, b_dv, b_lse, b_acc, b_mean, scale, m_s,
            True, PRECISION,
        )  # fmt: skip

    # b_out: (BLOCK_M, BLOCK_D)
    b_out = load_tile(p_out, s_ot, s_od, o_m, m_m, True, D, BLOCK_D).to(tl.float32)
    b_acc -= b_out * b_mean[:, None]
    start = (i_b * tokens_q + start_m) * heads + i_h
    store_tile(p_out_tangent + start * D, heads * D, o_w, m_m, b_acc, D, BLOCK_D)
    tl.store(p_lse_tangent + first + o_w, b_mean, mask=m_m)


def tangent(
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tangents of the output, like q, and of the log-sum-exp, `(batch, heads, tokens_q)`.

    Args:
        tangents: the tangents of q, k and v.
        q, k, v, layout, key_mask, block_q, block_kv, scale: arguments of the forward pass.
        out, lse: results of the forward pass.
        config: tiles to use instead of the tiles in the table.
    """
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv, scale, more=(*tangents, out))
    if config is None:
        config = tangent_tiles(problem)
    batch, tokens_q, heads, _ = q.shape
    out_tangent, lse_tangent = empty_outputs(q)
    rows = cached_rows(layout, k.shape[1], block_kv)
    n_rows = rows.order.shape[-1]
    read = (q, k, v, *tangents, out)
    with problem.on_device():
        tangent_kernel[(batch * heads * n_rows * (block_q // config.block_m),)](
            *read, problem.key_mask, lse.contiguous(), out_tangent, lse_tangent,
            rows.order, *problem.rows_layout(rows),
            *(stride for x in read for stride in x.stride()),
            *problem.key_mask_strides, *problem.layout_strides,
            tokens_q, k.shape[1], heads, n_rows, layout[1].shape[-1], layout[3].shape[-1], scale,
            **problem.constants(config),
        )  # fmt: skip
    return out_tangent, lse_tangent


def tangent_tiles(problem: Problem) -> TileConfig:
    """The shipped tiles on the device of a call, no larger than the call's blocks."""
    with problem.on_device():
        tiles = _TABLES.find("tangent", problem.block_d, problem.dtype, masked=problem.masked)
    return fitted("tangent", tiles, problem.block_q, problem.block_kv)
