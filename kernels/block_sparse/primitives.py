"""What the forward and the backward kernels share: reading tiles, and bit masks."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(
    p_x, s_t, s_d, o_t, m_t, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tokens `o_t` of a head as (BLOCK_T, BLOCK_D), 0 past D and where `m_t` is false."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = p_x + o_t[:, None] * s_t + o_d[None, :] * s_d
    if MASKED:
        m_tile = m_t[:, None]
        if D != BLOCK_D:
            m_tile = m_tile & (o_d < D)[None, :]
        return tl.load(p_tile, mask=m_tile, other=0.0)
    if D != BLOCK_D:
        return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def store_tile(p_x, s_t, o_t, m_t, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (BLOCK_T, BLOCK_D) to tokens `o_t` of a head whose channels are contiguous."""
    o_d = tl.arange(0, BLOCK_D)
    m_tile = m_t[:, None]
    if D != BLOCK_D:
        m_tile = m_tile & (o_d < D)[None, :]
    tl.store(p_x + o_t[:, None] * s_t + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def tile_of_program(tiles, heads, s_layout_b, s_layout_h):
    """Tile, sample, head and layout of this program; the tiles of a head follow one another."""
    i_program = tl.program_id(0)
    i_bh = i_program // tiles
    i_b = i_bh // heads
    i_h = i_bh % heads
    return (
        i_program % tiles,
        i_b.to(tl.int64),
        i_h.to(tl.int64),
        i_b * s_layout_b + i_h * s_layout_h,
    )


@triton.jit
def token_offsets(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """0 .. BLOCK - 1, in 64 bits where a tile is more than 2**31 elements long in memory."""
    o_t = tl.arange(0, BLOCK)
    if WIDE:
        o_t = o_t.to(tl.int64)
    return o_t


@triton.jit
def load_bits(
    p_words, s_row, o_m, m_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The part of a bit mask that covers a tile: bool (BLOCK_M, BLOCK_N), or that transposed.

    True where `m_m` is false. A query's 32 keys are one word, loaded once; which word a column
    takes is known per register.
    """
    o_n = tl.arange(0, BLOCK_N)
    p_word = p_words + o_m * s_row + start_n // 32
    if TRANSPOSED:
        o_n = o_n[:, None]
        b_word = tl.broadcast_to(tl.load(p_word, mask=m_m, other=-1)[None, :], (BLOCK_N, BLOCK_M))
    else:
        o_n = o_n[None, :]
        b_word = tl.broadcast_to(tl.load(p_word, mask=m_m, other=-1)[:, None], (BLOCK_M, BLOCK_N))
    for i in tl.static_range(1, (BLOCK_N + 31) // 32):
        b_next = tl.load(p_word + i, mask=m_m, other=-1)
        b_next = b_next[None, :] if TRANSPOSED else b_next[:, None]
        b_word = tl.where(o_n >= i * 32, b_next, b_word)
    return ((b_word >> ((start_n + o_n) % 32)) & 1) != 0


@triton.jit
def row_lists(
    p_full_count, p_full_index, p_partial_count, i_list, full_cap, tokens_kv,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Where the full blocks of a row are listed, how many need no mask, partial ones, short ones.

    The block at the end of the sequence may be short, and then it needs a mask though it is full.
    """
    p_full = p_full_index + i_list.to(tl.int64) * full_cap
    n_full = tl.load(p_full_count + i_list)
    i_last = tl.load(p_full + n_full - 1, mask=n_full > 0, other=-1)
    n_short = (i_last == tokens_kv // BLOCK_KV).to(tl.int32)
    return p_full, n_full - n_short, tl.load(p_partial_count + i_list), n_short
