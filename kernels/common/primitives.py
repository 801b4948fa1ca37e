"""Tiles of tokens, and how kernels read and write them.

A kernel gets queries, keys and values in one of two ways. Without TMA it gets a pointer to the
head, with strides. With TMA it gets a descriptor of the whole (batch, tokens, heads, head_dim)
tensor, by which the copy engine of the chip fetches tiles (`block_sparse/descriptors.py`).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Tiles of every head that come before the other tiles of all heads.
FIRST_TILES = tl.constexpr(8)


@triton.jit
def load_tile(
    p_x, s_t, s_d, o_t, m_t, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tokens `o_t` of a head as (BLOCK_T, BLOCK_D), 0 past D and, MASKED, where `m_t` is false."""
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
def read_tokens(
    x, i_b, i_h, start_t, s_t, s_d, m_t, MASKED: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tokens from `start_t` of a head as (BLOCK_T, BLOCK_D), 0 past D.

    With MASKED, no pointer is followed where `m_t` is false: those tokens are read as 0. The copy
    engine ignores `m_t`: it reads 0 past the end of the sequence, and memory as it is before that.
    """
    if TMA:
        b_x = x.load([i_b.to(tl.int32), start_t.to(tl.int32), i_h.to(tl.int32), 0])
        b_x = b_x.reshape(BLOCK_T, BLOCK_D)  # (BLOCK_T, BLOCK_D)
    else:
        p_x = x + start_t.to(tl.int64) * s_t
        # b_x: (BLOCK_T, BLOCK_D)
        b_x = load_tile(p_x, s_t, s_d, token_offsets(BLOCK_T, WIDE), m_t, MASKED, D, BLOCK_D)
    return b_x


@triton.jit
def store_tile(p_x, s_t, o_t, m_t, b_x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write (BLOCK_T, BLOCK_D) to tokens `o_t` of a head whose channels are contiguous."""
    o_d = tl.arange(0, BLOCK_D)
    m_tile = m_t[:, None]
    if D != BLOCK_D:
        m_tile = m_tile & (o_d < D)[None, :]
    tl.store(p_x + o_t[:, None] * s_t + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def token_offsets(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """0 .. BLOCK - 1; in 64 bits if WIDE, where a tile spans more than 2**31 elements of memory."""
    o_t = tl.arange(0, BLOCK)
    if WIDE:
        o_t = o_t.to(tl.int64)
    return o_t


@triton.jit
def tile_of_program(tiles, heads, s_layout_b, s_layout_h):
    """Numbers of the program's tile, sample, head, layout.

    Tiles of a head follow one another, and find the head's keys in the L2 cache. Only the first few
    tiles of all heads come before: where tiles are numbered by their work, those are the longest
    (rows of text see everything), and a long tile of the last head must not begin at the end.
    """
    i_program = tl.program_id(0)
    pairs = tl.num_programs(0) // tiles  # of a sample and a head
    first = tl.minimum(tiles, FIRST_TILES)
    i_late = i_program - first * pairs
    late = tl.maximum(i_late, 0)
    others = tl.maximum(tiles - first, 1)
    i_tile = tl.where(i_late < 0, i_program // pairs, first + late % others)
    i_bh = tl.where(i_late < 0, i_program % pairs, late // others)
    i_b = i_bh // heads
    i_h = i_bh % heads
    return (
        i_tile,
        i_b.to(tl.int64),
        i_h.to(tl.int64),
        i_b * s_layout_b + i_h * s_layout_h,
    )
