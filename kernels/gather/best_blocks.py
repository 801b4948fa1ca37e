"""The key blocks whose means fit queries best, in Triton: scores, rule and bits in one place.

The definition is that of `diffattn.routing.choosing`: scores become fixed-point numbers of 24 bits
between the lowest and the highest score of their pool, and of equal numbers the first is the best.
Nothing is sorted. A pool of one query stays in registers, where the last number to take is found
bit by bit. A pool of a whole head is read once for every three bits of that number. All sums are
sums of integers: the results have the same bits every time, and the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.launch import on_device, padded_head_dim
from ..common.primitives import load_tile
from ..dispatch import operator
from .selecting import turns

# The most blocks, text and other blocks included, that a query's scores may have registers for.
MOST_BLOCKS = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_HIGHEST = tl.constexpr(float(2**24 - 1))
_SMALLEST_SPREAD = tl.constexpr(1e-5)
_EXACT = tl.constexpr(float(2**23))  # from here on float32 has integers only
# A pool of a head: passes over its scores, and thresholds that a pass compares with.
_PASSES = 8
_LEVELS = tl.constexpr(8)
# Queries and blocks of a program, in registers.
_SCORES = 64 * 128
_WARPS_OF_PASSES = 8
# Rows of scores in memory begin at multiples of this.
_ALIGNED = 16
_STEP_D = 32  # channels of a product
_KEYS = 64  # keys that a mean takes at a time


@triton.jit(do_not_specialize=["before"])
def means_kernel(
    p_k, p_starts, p_counted, p_means, p_holds, s_kb, s_kt, s_kh, s_kd, s_cb, s_ct,
    heads, blocks, before,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The mean of a block's counted keys for a head, and whether there are such keys."""
    i_program = tl.program_id(0)
    i_block = i_program % blocks
    i_h = (i_program // blocks % heads).to(tl.int64)
    i_b = (i_program // blocks // heads).to(tl.int64)
    first_n = tl.load(p_starts + before + i_block)
    stop_n = tl.load(p_starts + before + i_block + 1)
    p_k += i_b * s_kb + i_h * s_kh
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_count = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for i in tl.range(0, tl.cdiv(stop_n - first_n, BLOCK_N)):
        o_n = (first_n + i * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < stop_n
        if MASKED:
            # b_counted: (BLOCK_N,)
            b_counted = tl.load(p_counted + i_b * s_cb + o_n * s_ct, mask=m_n, other=0)
            m_n = m_n & (b_counted != 0)
        # A NaN in padding must not reach a sum.
        b_k = load_tile(p_k, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        b_sum += b_k.to(tl.float32)
        b_count += m_n.to(tl.int32)
    count = tl.sum(b_count, 0)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(count, 1).to(tl.float32)  # (BLOCK_D,)
    o_d = tl.arange(0, BLOCK_D)
    i_mean = (i_b * blocks + i_block) * heads + i_h
    tl.store(p_means + i_mean * D + o_d, b_mean, mask=o_d < D)
    tl.store(p_holds + i_b * blocks + i_block, count > 0)


@triton.jit
def bf16_parts(b_x):
    """Three bfloat16 tiles whose sum is a float32 tile to rounding."""
    b_high = b_x.to(tl.bfloat16)
    b_x = b_x - b_high.to(tl.float32)
    b_middle = b_x.to(tl.bfloat16)
    return b_high, b_middle, (b_x - b_middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def scores_of_tile(
    p_q, s_qt, s_qd, o_m, m_m, p_mean, s_mc, s_md, o_c, m_c,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, Q_PARTS: tl.constexpr,
):  # fmt: skip
    """Products of queries and mean keys, float32 (BLOCK_M, BLOCK_C), exact to float32's rounding.

    The numbers are cut into bfloat16 parts, which tensor cores multiply exactly: a bfloat16 query
    is 1 part, a float16 query 2, float32 is 3. Small products are added first.
    """
    b_s = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    o_m = o_m.to(tl.int64)
    for start_d in tl.range(0, BLOCK_D, STEP_D):
        o_d = start_d + tl.arange(0, STEP_D)
        m_d = (o_d < D)[None, :]
        # b_q: (BLOCK_M, STEP_D)
        b_q = tl.load(
            p_q + o_m[:, None] * s_qt + o_d[None, :] * s_qd, mask=m_m[:, None] & m_d, other=0.0
        )
        # b_mean: (BLOCK_C, STEP_D)
        b_mean = tl.load(
            p_mean + o_c[:, None] * s_mc + o_d[None, :] * s_md, mask=m_c[:, None] & m_d, other=0.0
        )
        b_high, b_middle, b_low = bf16_parts(b_mean)
        if Q_PARTS == 1:
            b_s = tl.dot(b_q, tl.trans(b_low), b_s)
            b_s = tl.dot(b_q, tl.trans(b_middle), b_s)
            b_s = tl.dot(b_q, tl.trans(b_high), b_s)
        else:
            b_q0, b_q1, b_q2 = bf16_parts(b_q.to(tl.float32))
            if Q_PARTS == 3:
                b_s = tl.dot(b_q2, tl.trans(b_high), b_s)
            b_s = tl.dot(b_q1, tl.trans(b_middle), b_s)
            b_s = tl.dot(b_q0, tl.trans(b_low), b_s)
            b_s = tl.dot(b_q1, tl.trans(b_high), b_s)
            b_s = tl.dot(b_q0, tl.trans(b_middle), b_s)
            b_s = tl.dot(b_q0, tl.trans(b_high), b_s)
    return b_s


@triton.jit
def fixed_points(b_s, low, high):
    """Scores as int32 from 0 for `low` to 2**24 - 1 for `high`; 0 where low and high are equal."""
    spread = high - low
    differ = spread > _SMALLEST_SPREAD * tl.maximum(tl.abs(low), tl.abs(high))
    factor = tl.where(differ, tl.div_rn(tl.zeros_like(spread) + _HIGHEST, spread), 0.0)
    b_x = (b_s - low) * factor
    b_x = tl.where(b_x < _EXACT, (b_x + _EXACT) - _EXACT, b_x)  # rounds half to even
    b_x = tl.where(b_x > 0, b_x, 0.0)  # NaN, too
    return tl.minimum(b_x, _HIGHEST).to(tl.int32)


@triton.jit
def pairs_that_count(
    p_own, p_counted, p_holds, i_b, o_m, m_m, o_c, m_c, tokens, video_blocks,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Whether pairs of a query and a block are ranked, and whether the block is the query's own."""
    b_own = tl.load(p_own + o_m, mask=m_m, other=-1)  # (BLOCK_M,)
    m_ranked = m_m[:, None] & m_c[None, :]  # (BLOCK_M, BLOCK_P)
    if MASKED:
        b_counted = tl.load(p_counted + i_b * tokens + o_m, mask=m_m, other=0)  # (BLOCK_M,)
        b_holds = tl.load(p_holds + i_b * video_blocks + o_c, mask=m_c, other=0)  # (BLOCK_P,)
        m_ranked = m_ranked & (b_counted != 0)[:, None] & (b_holds != 0)[None, :]
    m_own = (b_own[:, None] == o_c[None, :]) & m_c[None, :]  # (BLOCK_M, BLOCK_P)
    return m_ranked, m_own


@triton.jit
def take(b_points, b_last, b_wanted, o_p, LOG2_P: tl.constexpr):
    """Whether points lie above the row's last point, or are among the first `b_wanted` on it."""
    m_tied = b_points == b_last[:, None]
    b_stop = b_last * 0  # (BLOCK_M,)
    for i in tl.range(0, LOG2_P + 1):
        b_trial = b_stop + ((1 << LOG2_P) >> i)
        b_count = tl.sum((m_tied & (o_p[None, :] < b_trial[:, None])).to(tl.int32), 1)
        b_stop = tl.where(b_count <= b_wanted, b_trial, b_stop)
    return (b_points > b_last[:, None]) | (m_tied & (o_p[None, :] < b_stop[:, None]))


@triton.jit
def store_bits(
    p_bits, m_chosen, o_m, m_m, o_p, m_c, blocks, words,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the chosen blocks, and all blocks that hold no video, as bits."""
    m_other = (o_p < blocks) & ~m_c
    b_bits = (m_chosen | m_other[None, :]).to(tl.int32) << (o_p % 32)[None, :]
    b_bits = tl.reshape(b_bits, (BLOCK_M, BLOCK_P // 32, 32))
    b_words = tl.sum(b_bits, 2)  # (BLOCK_M, BLOCK_P / 32): no two numbers share a bit
    o_w = tl.arange(0, BLOCK_P // 32)
    tl.store(
        p_bits + o_m[:, None] * words + o_w[None, :],
        b_words,
        mask=m_m[:, None] & (o_w < words)[None, :],
    )


@triton.jit
def place_of_program(first_pair, tiles, heads, before, video_blocks, BLOCK_M, BLOCK_P):
    """Pair of the turn, sample, head, tile, queries, positions and numbers of the blocks, masks."""
    i_program = tl.program_id(0)
    i_pair = i_program // tiles
    i_tile = i_program % tiles
    i_bh = first_pair + i_pair
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_p = tl.arange(0, BLOCK_P)
    o_c = o_p - before
    m_c = (o_c >= 0) & (o_c < video_blocks)
    return (
        i_pair.to(tl.int64), (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64), i_tile,
        o_m, o_p, o_c, m_c,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "tiles", "video_blocks", "before", "blocks", "topk"])
def best_of_queries_kernel(
    p_q, p_mean, p_own, p_counted, p_holds, p_bits,
    s_qb, s_qt, s_qh, s_qd, s_mb, s_mc, s_mh, s_md,
    tokens, tiles, heads, video_blocks, before, blocks, words, topk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, LOG2_P: tl.constexpr, Q_PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The best `topk` blocks of each query, its own counted, as bits."""
    i_pair, i_b, i_h, _, o_m, o_p, o_c, m_c = place_of_program(
        0, tiles, heads, before, video_blocks, BLOCK_M, BLOCK_P
    )
    m_m = o_m < tokens
    b_s = scores_of_tile(  # (BLOCK_M, BLOCK_P)
        p_q + i_b * s_qb + i_h * s_qh, s_qt, s_qd, o_m, m_m,
        p_mean + i_b * s_mb + i_h * s_mh, s_mc, s_md, o_c, m_c,
        D, BLOCK_D, STEP_D, BLOCK_M, BLOCK_P, Q_PARTS,
    )  # fmt: skip
    m_ranked, m_own = pairs_that_count(
        p_own, p_counted, p_holds, i_b, o_m, m_m, o_c, m_c, tokens, video_blocks, MASKED
    )
    b_low = tl.min(tl.where(m_ranked, b_s, float("inf")), 1)
    b_high = tl.max(tl.where(m_ranked, b_s, float("-inf")), 1)
    b_points = fixed_points(b_s, b_low[:, None], b_high[:, None])  # (BLOCK_M, BLOCK_P)
    b_points = tl.where(m_ranked & ~m_own, b_points, -1)
    b_need = topk - tl.sum((m_ranked & m_own).to(tl.int32), 1)  # (BLOCK_M,)
    # The largest number that at least as many candidates reach as are needed, bit by bit.
    b_last = b_need * 0
    for i in tl.range(0, 24):
        b_trial = b_last + (8388608 >> i)
        b_count = tl.sum((b_points >= b_trial[:, None]).to(tl.int32), 1)
        b_last = tl.where(b_count >= b_need, b_trial, b_last)
    b_wanted = b_need - tl.sum((b_points > b_last[:, None]).to(tl.int32), 1)
    m_chosen = m_own | take(b_points, b_last, b_wanted, o_p, LOG2_P)
    store_bits(
        p_bits + i_pair * tokens * words, m_chosen, o_m, m_m, o_p, m_c, blocks, words,
        BLOCK_M, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_pair", "tokens", "tiles", "video_blocks", "before"])
def scores_kernel(
    p_q, p_mean, p_own, p_counted, p_holds, p_scores, p_extremes,
    s_qb, s_qt, s_qh, s_qd, s_mb, s_mc, s_mh, s_md,
    first_pair, tokens, tiles, heads, video_blocks, before, s_st,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr, Q_PARTS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores, and each query's lowest and negated highest ranked score."""
    i_pair, i_b, i_h, _, o_m, o_p, o_c, m_c = place_of_program(
        first_pair, tiles, heads, before, video_blocks, BLOCK_M, BLOCK_P
    )
    m_m = o_m < tokens
    b_s = scores_of_tile(  # (BLOCK_M, BLOCK_P)
        p_q + i_b * s_qb + i_h * s_qh, s_qt, s_qd, o_m, m_m,
        p_mean + i_b * s_mb + i_h * s_mh, s_mc, s_md, o_c, m_c,
        D, BLOCK_D, STEP_D, BLOCK_M, BLOCK_P, Q_PARTS,
    )  # fmt: skip
    m_ranked, _ = pairs_that_count(
        p_own, p_counted, p_holds, i_b, o_m, m_m, o_c, m_c, tokens, video_blocks, MASKED
    )
    p_scores += i_pair * tokens * s_st
    tl.store(
        p_scores + o_m[:, None] * s_st + o_p[None, :], b_s, m_m[:, None] & (o_p < s_st)[None, :]
    )
    p_extremes += (i_pair * tokens + o_m) * 2
    tl.store(p_extremes, tl.min(tl.where(m_ranked, b_s, float("inf")), 1), mask=m_m)
    tl.store(p_extremes + 1, tl.min(tl.where(m_ranked, -b_s, float("inf")), 1), mask=m_m)


@triton.jit
def load_points(p_scores, p_extremes, s_st, i_pair, o_m, m_m, o_p, m_ranked, tokens):
    """The fixed-point numbers of a tile of a head's pool, 0 for pairs that do not count."""
    p_scores += i_pair * tokens * s_st
    b_s = tl.load(  # (BLOCK_M, BLOCK_P)
        p_scores + o_m[:, None] * s_st + o_p[None, :],
        mask=m_m[:, None] & (o_p < s_st)[None, :],
        other=0.0,
    )
    low = tl.load(p_extremes + i_pair * 2)
    high = -tl.load(p_extremes + i_pair * 2 + 1)
    return tl.where(m_ranked, fixed_points(b_s, low, high), 0)


@triton.jit
def pool_of_program(
    p_scores, p_extremes, p_own, p_counted, p_holds, first_pair, tokens, tiles, heads,
    video_blocks, before, s_st, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The program's part of a head's pool: its place, which pairs count, and their numbers."""
    i_pair, i_b, _, i_tile, o_m, o_p, o_c, m_c = place_of_program(
        first_pair, tiles, heads, before, video_blocks, BLOCK_M, BLOCK_P
    )
    m_m = o_m < tokens
    m_ranked, m_own = pairs_that_count(
        p_own, p_counted, p_holds, i_b, o_m, m_m, o_c, m_c, tokens, video_blocks, MASKED
    )
    b_points = load_points(
        p_scores, p_extremes, s_st, i_pair, o_m, m_m, o_p, m_ranked, tokens
    )  # (BLOCK_M, BLOCK_P)
    return i_pair, i_b, i_tile, o_m, m_m, o_p, m_c, m_ranked, m_own, b_points


@triton.jit
def last_point(p_sums, p_goal, i_pair, i_b, passes, HAS_TAU: tl.constexpr):
    """The pool's last number to take as far as passes have found it, and how often to take it.

    The number has its upper `3 * passes` bits. How often is right after the last pass.
    """
    o_k = tl.arange(0, _LEVELS)
    p_sums += i_pair * (_LEVELS * _LEVELS + 1)  # as many passes as levels, then own pairs
    own = tl.load(p_sums + _LEVELS * _LEVELS)
    if HAS_TAU:
        total = (own + tl.load(p_sums)).to(tl.float64)
        need = tl.ceil(total * tl.load(p_goal)).to(tl.int64) - own
    else:
        need = tl.load(p_goal + i_b) - own
    above = need * 0
    last = 0
    for i in tl.range(0, passes):
        b_sum = tl.load(p_sums + i * _LEVELS + o_k)  # (_LEVELS,)
        level = tl.maximum(tl.sum((b_sum >= need).to(tl.int32), 0) - 1, 0)
        over = tl.sum(tl.where(o_k == level + 1, b_sum, 0), 0)
        above = tl.where(level + 1 < _LEVELS, over, above)
        last += level << (21 - 3 * i)
    each = need * 0 + 1
    if HAS_TAU:
        each = tl.maximum(each, last)
    wanted = tl.where(need > 0, (need - above + each - 1) // each, 0)
    return last, tl.minimum(wanted, 2147483647).to(tl.int32)


@triton.jit(do_not_specialize=["first_pair", "tokens", "tiles", "video_blocks", "before", "i_pass"])
def sums_kernel(
    p_scores, p_extremes, p_own, p_counted, p_holds, p_sums, p_goal,
    first_pair, tokens, tiles, heads, video_blocks, before, s_st, i_pass,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, MASKED: tl.constexpr, HAS_TAU: tl.constexpr,
):  # fmt: skip
    """Sums of the weights of candidates that reach each threshold of a pass.

    A candidate weighs its number if a share of the similarity is to be reached, else 1.
    """
    i_pair, i_b, _, _, _, _, _, m_ranked, m_own, b_points = pool_of_program(
        p_scores, p_extremes, p_own, p_counted, p_holds, first_pair, tokens, tiles, heads,
        video_blocks, before, s_st, BLOCK_M, BLOCK_P, MASKED,
    )  # fmt: skip
    last, _ = last_point(p_sums, p_goal, i_pair, i_b, i_pass, HAS_TAU)
    b_weight = m_ranked.to(tl.uint32)
    if HAS_TAU:
        b_weight = b_points.to(tl.uint32)
    b_points = tl.where(m_ranked & ~m_own, b_points, -1)
    p_sums += i_pair * (_LEVELS * _LEVELS + 1)
    for k in tl.static_range(0, _LEVELS):
        # At most 256 numbers of 24 bits: a row fits 32 bits.
        m_reach = b_points >= last + (k << (21 - 3 * i_pass))
        b_row = tl.sum(tl.where(m_reach, b_weight, 0), 1)  # (BLOCK_M,)
        tl.atomic_add(p_sums + i_pass * _LEVELS + k, tl.sum(b_row.to(tl.int64), 0), sem="relaxed")
    if i_pass == 0:
        b_row = tl.sum(tl.where(m_ranked & m_own, b_weight, 0), 1)  # (BLOCK_M,)
        tl.atomic_add(p_sums + _LEVELS * _LEVELS, tl.sum(b_row.to(tl.int64), 0), sem="relaxed")


@triton.jit(do_not_specialize=["first_pair", "tokens", "tiles", "video_blocks", "before"])
def ties_kernel(
    p_scores, p_extremes, p_own, p_counted, p_holds, p_sums, p_goal, p_ties,
    first_pair, tokens, tiles, heads, video_blocks, before, s_st, passes,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, MASKED: tl.constexpr, HAS_TAU: tl.constexpr,
):  # fmt: skip
    """Count each tile's candidates on the last number to take."""
    i_pair, i_b, i_tile, _, _, _, _, m_ranked, m_own, b_points = pool_of_program(
        p_scores, p_extremes, p_own, p_counted, p_holds, first_pair, tokens, tiles, heads,
        video_blocks, before, s_st, BLOCK_M, BLOCK_P, MASKED,
    )  # fmt: skip
    last, _ = last_point(p_sums, p_goal, i_pair, i_b, passes, HAS_TAU)
    b_tied = tl.sum((m_ranked & ~m_own & (b_points == last)).to(tl.int32), 1)  # (BLOCK_M,)
    tl.store(p_ties + i_pair * tiles + i_tile, tl.sum(b_tied, 0))


@triton.jit(do_not_specialize=["first_pair", "tokens", "tiles", "video_blocks", "before", "blocks"])
def best_of_heads_kernel(
    p_scores, p_extremes, p_own, p_counted, p_holds, p_sums, p_goal, p_ties, p_bits,
    first_pair, tokens, tiles, heads, video_blocks, before, s_st, blocks, words, passes,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, LOG2_P: tl.constexpr, MASKED: tl.constexpr,
    HAS_TAU: tl.constexpr,
):  # fmt: skip
    """The best pairs of a head's pool as bits; `p_ties` has running sums through the tiles."""
    i_pair, i_b, i_tile, o_m, m_m, o_p, m_c, m_ranked, m_own, b_points = pool_of_program(
        p_scores, p_extremes, p_own, p_counted, p_holds, first_pair, tokens, tiles, heads,
        video_blocks, before, s_st, BLOCK_M, BLOCK_P, MASKED,
    )  # fmt: skip
    last, wanted = last_point(p_sums, p_goal, i_pair, i_b, passes, HAS_TAU)
    b_points = tl.where(m_ranked & ~m_own, b_points, -1)
    b_tied = tl.sum((b_points == last).to(tl.int32), 1)  # (BLOCK_M,)
    # Those on the last number come in the order of queries, then of blocks.
    b_until = tl.cumsum(b_tied, 0)
    earlier = tl.load(p_ties + i_pair * tiles + i_tile) - tl.sum(b_tied, 0)
    b_wanted = wanted - earlier - (b_until - b_tied)
    m_chosen = m_own | take(b_points, b_tied * 0 + last, b_wanted, o_p, LOG2_P)
    p_bits += (first_pair + i_pair) * tokens * words
    store_bits(p_bits, m_chosen, o_m, m_m, o_p, m_c, blocks, words, BLOCK_M, BLOCK_P)


@dataclass(frozen=True)
class _Sizes:
    """How a call is cut into programs."""

    block_p: int
    block_m: int
    tiles: int

    @staticmethod
    def of(blocks: int, tokens: int) -> _Sizes:
        block_p = max(32, triton.next_power_of_2(blocks))
        block_m = min(64, _SCORES // block_p)
        return _Sizes(block_p, block_m, triton.cdiv(tokens, block_m))

    @property
    def log2_p(self) -> int:
        return self.block_p.bit_length() - 1


@operator("block_means")
def block_means(
    key: torch.Tensor,
    starts: torch.Tensor,
    counted: torch.Tensor | None,
    before: int,
    blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean key of each block, in one pass over the keys and in a fixed order.

    Args:
        key: `(batch, tokens, heads, head_dim)`, any strides.
        starts: int32, the first token of each block of the sequence, then the number of tokens.
        counted: bool `(batch, tokens)`, false for keys that are left out; None if all count.
        before: blocks to pass over at the start of the sequence.
        blocks: the number of blocks from there on to take means of.

    Returns:
        means: float32 `(batch, blocks, heads, head_dim)`; 0 for a block without a counted key.
        holds: bool `(batch, blocks)`, whether a block has counted keys.
    """
    batch, _, heads, head_dim = key.shape
    means = key.new_empty((batch, blocks, heads, head_dim), dtype=torch.float32)
    holds = key.new_empty((batch, blocks), dtype=torch.uint8)
    mask = starts if counted is None else counted.view(torch.uint8)
    with on_device(key.device):
        means_kernel[(batch * blocks * heads,)](
            key, starts, mask, means, holds, *key.stride(),
            *((0, 0) if counted is None else mask.stride()), heads, blocks, before,
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_N=_KEYS,
            MASKED=counted is not None,
        )  # fmt: skip
    return means, holds.view(torch.bool)


@block_means.registered.register_fake
def _empty_means(
    key: torch.Tensor,
    starts: torch.Tensor,
    counted: torch.Tensor | None,
    before: int,
    blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, heads, head_dim = key.shape
    means = key.new_empty((batch, blocks, heads, head_dim), dtype=torch.float32)
    return means, key.new_empty((batch, blocks), dtype=torch.bool)


@operator("best_blocks")
def best_blocks(
    query: torch.Tensor,
    means: torch.Tensor,
    own: torch.Tensor,
    counted: torch.Tensor | None,
    holds: torch.Tensor | None,
    before: int,
    blocks: int,
    together: bool,
    topk: int | None,
    tau: float | None,
) -> torch.Tensor:
    """The blocks that queries select, by the products with the blocks' mean keys, as bits.

    Args:
        query: `(batch, tokens, heads, head_dim)` in a dtype of `DTYPES`, any strides.
        means: float32 `(batch, video blocks, heads, head_dim)`, the mean key of each block.
        own: int64 `(tokens,)`, the block that a query selects in any case, which counts.
        counted: bool `(batch, tokens)`, false for queries that select their own block only, and
            belong to no pool; None if all count.
        holds: bool `(batch, video blocks)`, false for blocks that belong to no pool; given if
            `counted` is.
        before: blocks before the video blocks; they and blocks after the video blocks are selected
            by all queries.
        blocks: all blocks, at most `MOST_BLOCKS`.
        together: whether all scores of a head are ranked together, or the scores of each query.
        topk: blocks per query, the own block included; on average if `together`.
        tau: if `topk` is None, the share of the pool's similarity to reach; only if `together`.

    Returns:
        int32 `(batch, heads, tokens, ceil(blocks / 32))`: bit `c % 32` of word `c // 32` is set if
        the query selects block `c`.

    Raises:
        ValueError: for more than `MOST_BLOCKS` blocks, or a share with a pool for each query.
    """
    if blocks > MOST_BLOCKS:
        raise ValueError(f"there are {blocks} blocks, but registers for {MOST_BLOCKS}")
    if topk is None and not together:
        raise ValueError("tau needs together=True: the scores of a query are ranked by topk only")
    batch, tokens, heads, head_dim = query.shape
    words = -(-blocks // 32)
    bits = query.new_empty((batch, heads, tokens, words), dtype=torch.int32)
    sizes = _Sizes.of(blocks, tokens)
    video_blocks = means.shape[1]
    is_masked = counted is not None
    masks = [own, own] if counted is None or holds is None else _bytes(counted, holds)
    tiles = {"BLOCK_M": sizes.block_m, "BLOCK_P": sizes.block_p}
    products = {
        "D": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "STEP_D": min(_STEP_D, padded_head_dim(head_dim)),
        "Q_PARTS": {torch.bfloat16: 1, torch.float16: 2}.get(query.dtype, 3),
        "enable_fp_fusion": False,  # rounded as torch rounds, product by product
    }
    strides = (*query.stride(), *means.stride())
    with on_device(query.device):
        if not together:
            best_of_queries_kernel[(batch * heads * sizes.tiles,)](
                query, means, own, *masks, bits, *strides,
                tokens, sizes.tiles, heads, video_blocks, before, blocks, words,
                min(topk or 0, video_blocks),
                LOG2_P=sizes.log2_p, MASKED=is_masked, **tiles, **products,
            )  # fmt: skip
            return bits
        goal = _goal(query, video_blocks, counted, holds, topk, tau)
        rule = {
            "MASKED": is_masked,
            "HAS_TAU": topk is None,
            "enable_fp_fusion": False,
            "num_warps": _WARPS_OF_PASSES,
            **tiles,
        }
        row = -(-blocks // _ALIGNED) * _ALIGNED
        for first_pair, pairs in turns(batch * heads, 4 * tokens * row):
            grid = (pairs * sizes.tiles,)
            place = (first_pair, tokens, sizes.tiles, heads, video_blocks, before, row)
            scores = means.new_empty((pairs, tokens, row))
            extremes = means.new_empty((pairs, tokens, 2))
            scores_kernel[grid](
                query, means, own, *masks, scores, extremes, *strides, *place,
                MASKED=is_masked, **tiles, **products,
            )  # fmt: skip
            sums = own.new_zeros((pairs, _LEVELS.value**2 + 1))
            pool = (scores, extremes.amin(1), own, *masks, sums, goal)
            for i_pass in range(_PASSES):
                sums_kernel[grid](*pool, *place, i_pass, **rule)
            ties = bits.new_empty((pairs, sizes.tiles))
            ties_kernel[grid](*pool, ties, *place, _PASSES, **rule)
            ties = ties.cumsum(1, dtype=torch.int32)
            best_of_heads_kernel[grid](
                *pool, ties, bits, *place, blocks, words, _PASSES, LOG2_P=sizes.log2_p, **rule
            )  # fmt: skip
    return bits


@best_blocks.registered.register_fake
def _empty_bits(
    query: torch.Tensor,
    means: torch.Tensor,
    own: torch.Tensor,
    counted: torch.Tensor | None,
    holds: torch.Tensor | None,
    before: int,
    blocks: int,
    together: bool,
    topk: int | None,
    tau: float | None,
) -> torch.Tensor:
    batch, tokens, heads, _ = query.shape
    return query.new_empty((batch, heads, tokens, -(-blocks // 32)), dtype=torch.int32)


def _bytes(*masks: torch.Tensor) -> list[torch.Tensor]:
    return [mask.contiguous().view(torch.uint8) for mask in masks]


def _goal(
    query: torch.Tensor,
    video_blocks: int,
    counted: torch.Tensor | None,
    holds: torch.Tensor | None,
    topk: int | None,
    tau: float | None,
) -> torch.Tensor:
    """What a head's pool has to reach: float64 `(1,)`, or a number of pairs, int64 `(batch,)`."""
    batch, tokens, _, _ = query.shape
    if topk is None:
        assert tau is not None
        return query.new_full((1,), tau, dtype=torch.float64)
    each = min(topk, video_blocks)
    if counted is None or holds is None:
        return query.new_full((batch,), each * tokens, dtype=torch.int64)
    return each * counted.sum(1) * holds.any(1)
