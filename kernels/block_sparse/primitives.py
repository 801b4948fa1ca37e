"""What the forward and the backward kernels share: reading tiles, and bit masks.

Queries, keys and values are given to a kernel in one of two ways, told apart by TMA: as a pointer
to the head, with strides, or as a descriptor of the whole (batch, tokens, heads, head_dim) tensor
by which the copy engine of the chip fetches tiles (`descriptors.py`).
"""

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
def read_tokens(
    x, i_b, i_h, start_t, s_t, s_d, m_t, MASKED: tl.constexpr, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tokens from `start_t` of a head as (BLOCK_T, BLOCK_D), 0 past D.

    MASKED says that a pointer may not be followed where `m_t` is false; 0 is read there. The copy
    engine reads 0 past the end of the sequence, and all that is in memory before that.
    """
    if TMA:
        b_x = x.load([i_b.to(tl.int32), start_t.to(tl.int32), i_h.to(tl.int32), 0])
        b_x = b_x.reshape(BLOCK_T, BLOCK_D)
    else:
        p_x = x + start_t.to(tl.int64) * s_t
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
def first_bits(n):
    """A word whose first `n` bits are set: none for n <= 0, all for n >= 32."""
    return tl.where(n >= 32, -1, (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1)


@triton.jit
def load_bits(
    p_words, s_row, o_m, m_m, start_n, stop_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """The part of a bit mask that covers a tile: bool (BLOCK_M, BLOCK_N), or that transposed.

    All bits of a query count as set where `m_m` is false; no bit from key `stop_n` on does. Keys
    are counted from the first one of the block. A query's 32 keys are one word, loaded once and cut
    off at the end of the sequence; which word a column takes is known per register.
    """
    p_word = p_words + o_m * s_row + start_n // 32
    o_n = tl.arange(0, BLOCK_N)
    # A tile of fewer keys than a word may begin inside of one.
    o_bit = (o_n & 31) if BLOCK_N >= 32 else (o_n + start_n) & 31
    left = stop_n - start_n if BLOCK_N >= 32 else stop_n - start_n // 32 * 32
    o_n = o_n[:, None] if TRANSPOSED else o_n[None, :]
    o_bit = o_bit[:, None] if TRANSPOSED else o_bit[None, :]
    for i in tl.static_range(0, (BLOCK_N + 31) // 32):
        b_next = tl.load(p_word + i, mask=m_m, other=-1) & first_bits(left - i * 32)  # (BLOCK_M,)
        b_next = b_next[None, :] if TRANSPOSED else b_next[:, None]
        if i == 0:
            SHAPE: tl.constexpr = [BLOCK_N, BLOCK_M] if TRANSPOSED else [BLOCK_M, BLOCK_N]
            b_word = tl.broadcast_to(b_next, SHAPE)
        else:
            b_word = tl.where(o_n >= i * 32, b_next, b_word)
    return ((b_word >> o_bit) & 1) != 0


@triton.jit
def row_lists(
    p_full_count, p_full_index, p_partial_count, i_list, full_cap, tokens_kv,
    BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """Where the full blocks of a row are listed, how many need no mask, partial ones, short ones.

    The block at the end of the sequence may be short, and then it needs a mask though it is full.
    It is the last of its list: `plan.Rows` sees to that.
    """
    p_full = p_full_index + i_list.to(tl.int64) * full_cap
    n_full = tl.load(p_full_count + i_list)
    i_last = tl.load(p_full + n_full - 1, mask=n_full > 0, other=-1)
    n_short = (i_last == tokens_kv // BLOCK_KV).to(tl.int32)
    return p_full, n_full - n_short, tl.load(p_partial_count + i_list), n_short
