"""A layout inside a kernel: the lists of a row's blocks, and the bit masks of the blocks."""

import triton
import triton.language as tl


@triton.jit
def first_bits(n):
    """A word whose first `n` bits are set: none for n <= 0, all for n >= 32."""
    return tl.where(n >= 32, -1, (1 << tl.minimum(tl.maximum(n, 0), 31)) - 1)


@triton.jit
def load_bits(
    p_words, s_row, o_m, m_m, start_n, stop_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile's part of a bit mask: bool (BLOCK_M, BLOCK_N), or its transpose if TRANSPOSED.

    Where `m_m` is false, all bits of the query count as set. Bits of key `stop_n` and of later keys
    count as unset. `start_n` and `stop_n` are counted from the first key of the block. A word holds
    32 keys of a query: each word is loaded once, and its bits past `stop_n` are cleared. The
    compiler knows for every register which word its column takes.
    """
    p_word = p_words + o_m * s_row + start_n // 32
    o_n = tl.arange(0, BLOCK_N)
    # A tile of fewer than 32 keys may begin inside a word.
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
    """Pointer to a row's list of full blocks; numbers of its whole full, partial and short blocks.

    A short block is a full block at the end of a sequence that blocks do not divide. A short block
    needs a mask although it is full. `walk.Rows` puts it last in its list.
    """
    p_full = p_full_index + i_list.to(tl.int64) * full_cap
    n_full = tl.load(p_full_count + i_list)
    i_last = tl.load(p_full + n_full - 1, mask=n_full > 0, other=-1)
    n_short = (i_last == tokens_kv // BLOCK_KV).to(tl.int32)
    return p_full, n_full - n_short, tl.load(p_partial_count + i_list), n_short
