"""What the forward and the backward kernels share: reading tiles, and bit masks."""

import triton
import triton.language as tl


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
def load_bits(p_words, s_row, o_m, m_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part of a bit mask that covers a tile, bool (BLOCK_M, BLOCK_N); true where not `m_m`.

    A query's 32 keys are one word, loaded once; which word a column takes is known per register.
    """
    o_n = tl.arange(0, BLOCK_N)
    p_word = p_words + o_m * s_row + start_n // 32
    b_word = tl.load(p_word, mask=m_m, other=-1)[:, None]
    b_word = tl.broadcast_to(b_word, (BLOCK_M, BLOCK_N))
    for i in tl.static_range(1, (BLOCK_N + 31) // 32):
        b_next = tl.load(p_word + i, mask=m_m, other=-1)[:, None]
        b_word = tl.where((o_n >= i * 32)[None, :], b_next, b_word)
    return ((b_word >> ((start_n + o_n) % 32)[None, :]) & 1) != 0
