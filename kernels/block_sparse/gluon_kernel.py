"""Device code of the Gluon forward: one warp fetches tiles, two groups of four warps multiply them.

Each group attends with 64 queries. While a group computes the weights of tile i, its product of the
weights and the values of tile i - 1 runs. Importing the module fails where Triton lacks the parts
of Gluon that the module names: `gluon_forward.available` asks first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.gluon import (
    GROUPS,
    ROWS,
    barrier,
    fetch,
    fetch_keys_and_values,
    make_rings,
    make_sums,
    softmax_step,
    write,
)
from ..common.primitives import FIRST_TILES, LN_2, LOG2_E

MINUS_INFINITY = gl.constexpr(-0x800000)  # its bits, as int32


@gluon.jit
def _words(p_words, listed, BLOCK_N: gl.constexpr, WORDS: gl.constexpr, SCORES: gl.constexpr):
    """The words of a tile's bit mask, one for each 32 keys: a tuple of int32 (ROWS,).

    Words are all ones where the tile has no bit mask (`listed` false).
    """
    o_m = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    m_m = o_m < gl.where(listed, ROWS, 0)
    words = ()
    for i in gl.static_range(BLOCK_N // 32):
        word = gl.load(p_words + o_m * WORDS + i, mask=m_m, other=-1)  # (ROWS,)
        words += (word,)  # type: ignore[assignment]  # the tuple grows while the loop is unrolled
    return words


@gluon.jit
def _hide(b_s, words, left, BLOCK_N: gl.constexpr, SCORES: gl.constexpr, AHEAD: gl.constexpr):
    """The scores (ROWS, BLOCK_N), -inf where their bits are 0 and from key `left` on."""
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    b_words = gl.full([ROWS, BLOCK_N], 0, gl.int32, SCORES)
    # The compiler knows for every register which word its column takes.
    for i in gl.static_range(BLOCK_N // 32):
        n_seen = gl.maximum(left - i * 32, 0)
        if AHEAD:  # PTX shifts by 32 where more is asked for
            seen = ~gl.inline_asm_elementwise(
                "shl.b32 $0, -1, $1;", "=r,r", [n_seen], gl.int32, True, 1
            )  # fmt: skip
        else:  # half of the shift at a time: a shift by 32 is undefined
            n_seen = gl.minimum(n_seen, 32)
            seen = ~(((-1) << (n_seen // 2)) << (n_seen - n_seen // 2))
        b_words = gl.where((o_n >= i * 32)[None, :], (words[i] & seen)[:, None], b_words)
    if AHEAD:
        # A thread has two columns of every eight. One shift for each of the two brings their bits
        # to the signs of a word's bytes, and one instruction makes a mask of a byte's sign.
        b_signs = b_words << (7 - o_n % 8)[None, :]
        b_byte = gl.full([ROWS, BLOCK_N], 0x8888, gl.int32, SCORES)
        b_byte += (o_n % 32 // 8 * 0x1111)[None, :]
        b_s = gl.inline_asm_elementwise(
            "{.reg .b32 seen; prmt.b32 seen, $2, 0, $3; lop3.b32 $0, seen, 0xff800000, $1, 0xac;}",
            "=r,r,r,r", [b_s, b_signs, b_byte], gl.float32, True, 1,
        )  # fmt: skip
    else:
        # In integers: of a `where` on bits Triton 3.6 makes more instructions, at a cost in time.
        b_seen = (b_words << (31 - (o_n & 31))[None, :]) >> 31  # all ones, or zeros
        b_hidden = ~b_seen & MINUS_INFINITY
        b_s = ((b_s.to(gl.int32, bitcast=True) & b_seen) | b_hidden).to(gl.float32, bitcast=True)
    return b_s


@gluon.jit
def _pack(b_p, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr, AHEAD: gl.constexpr):
    """Weights (ROWS, BLOCK_N) as a loop carries them, in 16 bits: int32 (ROWS, BLOCK_N // 2).

    ptxas swaps the halves of a register whose 16-bit values are carried one by one, and back again.
    """
    if AHEAD:
        b_even, b_odd = gl.split(b_p.reshape([ROWS, b_p.shape[1] // 2, 2]))
        if DTYPE == gl.bfloat16:  # noqa: SIM300
            convert: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        else:
            convert: gl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"  # type: ignore[no-redef]
        b_kept = gl.inline_asm_elementwise(
            convert, "=r,r,r", [b_even, b_odd], gl.int32, True, 1
        )  # fmt: skip
    else:
        b_kept = gl.convert_layout(b_p.to(DTYPE), WEIGHTS)
    return b_kept


@gluon.jit
def _unpack(b_kept, DTYPE: gl.constexpr, WEIGHTS: gl.constexpr, AHEAD: gl.constexpr):
    """The weights (ROWS, BLOCK_N), as a product takes them, of what `_pack` has made."""
    b_p = b_kept
    if AHEAD:
        b_even = b_kept.to(gl.int16).to(DTYPE, bitcast=True)
        b_odd = (b_kept >> 16).to(gl.int16).to(DTYPE, bitcast=True)
        b_p = gl.join(b_even, b_odd).reshape([ROWS, b_kept.shape[1] * 2])
        b_p = gl.convert_layout(b_p, WEIGHTS)
    return b_p


@gluon.jit
def _entry(i, masks, lists, TILES_N: gl.constexpr):
    """The block of masked tile `i`, and the number of its bit mask."""
    p_partial, _, n_partial, _, i_rest = lists
    p_partial_mask, _ = masks
    listed = i // TILES_N < n_partial
    i_block = gl.load(p_partial + i // TILES_N, mask=listed, other=i_rest)
    i_mask = gl.load(p_partial_mask + i // TILES_N, mask=listed, other=0)
    return i_block, i_mask


@gluon.jit
def _bits(i, i_mask, masks, lists, first_row, BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr,
          BLOCK_N: gl.constexpr):  # fmt: skip
    """For masked tile `i`: pointer to the words of its first row, and whether it has words."""
    TILES_N: gl.constexpr = BLOCK_KV // BLOCK_N
    _, _, n_partial, _, _ = lists
    _, p_bit_masks = masks
    row = i_mask.to(gl.int64) * BLOCK_Q + first_row
    p_words = p_bit_masks + row * (BLOCK_KV // 32) + (i % TILES_N) * BLOCK_N // 32
    return p_words, i // TILES_N < n_partial


@gluon.jit
def _left(i, i_block, tokens_kv, BLOCK_KV: gl.constexpr, BLOCK_N: gl.constexpr):
    """The number of keys from the start of masked tile `i` to the end of the sequence."""
    return tokens_kv - (i_block * BLOCK_KV + i % (BLOCK_KV // BLOCK_N) * BLOCK_N)


@gluon.jit
def _produce(inputs, q_tiles, q_full, rings, place, lists, p_full,
             BLOCK_KV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fetch the queries of both groups, then keys and values tile by tile into two rings."""
    TILES_N: gl.constexpr = BLOCK_KV // BLOCK_N
    queries, keys, values = inputs
    i_b, i_h, start_m = place
    p_partial, n_full, n_partial, n_tiles, i_rest = lists
    mbarrier.expect(q_full.index(0), GROUPS * queries.block_type.nbytes)
    for g in gl.static_range(GROUPS):
        fetch(queries, [i_b, start_m + g * ROWS, i_h, 0], q_full.index(0), q_tiles.index(g))
    for i in range(n_tiles):
        # Full blocks but the short one, partial blocks, then block `i_rest`: the short one.
        i_full = i // TILES_N
        i_partial = i_full - n_full
        is_full = i_full < n_full
        is_partial = (i_partial >= 0) & (i_partial < n_partial)
        full_block = gl.load(p_full + i_full, mask=is_full)
        other_block = gl.load(p_partial + i_partial, mask=is_partial, other=i_rest)
        start_n = gl.where(is_full, full_block, other_block) * BLOCK_KV + (i % TILES_N) * BLOCK_N
        fetch_keys_and_values(keys, values, rings, i, i_b, i_h, start_n, STAGES)


@gluon.jit
def _attend(i, b_q, rings, sums, b_acc, b_kept, b_max, b_sum, scale, words, left, p_words, listed,
            MASKED: gl.constexpr, AHEAD: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
            WORDS: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
            WEIGHTS: gl.constexpr):  # fmt: skip
    """The weights of tile `i`, and the product of tile `i - 1`: its weights `b_kept` by its values.

    A masked tile sees the keys of `words` and as far as `left`. Meanwhile the words at `p_words`
    are loaded: those of tile `i + 1` if AHEAD, else those of this tile, which replace `words`.
    """
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    j = i - 1
    s_k = i % STAGES
    s_v = j % STAGES
    b_k = k_tiles.index(s_k).reshape([BLOCK_N, D])
    b_v = v_tiles.index(s_v).reshape([BLOCK_N, D])
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(k_full.index(s_k), (i // STAGES) & 1)
    # scores: (ROWS, BLOCK_N)
    scores = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(s_v), (j // STAGES) & 1)
    b_p = _unpack(b_kept, b_q.dtype, WEIGHTS, AHEAD)  # (ROWS, BLOCK_N)
    products = warpgroup_mma(b_p, b_v, b_acc, is_async=True)  # (ROWS, D)
    loaded = words
    if MASKED:
        loaded = _words(p_words, listed, BLOCK_N, WORDS, SCORES)
        if not AHEAD:
            words = loaded
    b_s = warpgroup_mma_wait(1, deps=(scores,))  # (ROWS, BLOCK_N)
    mbarrier.arrive(k_empty.index(s_k))
    if MASKED:
        b_s = _hide(b_s, words, left, BLOCK_N, SCORES, AHEAD)
    b_new_p, b_max, b_sum, b_old = softmax_step(b_s, b_max, b_sum, scale, MASKED)
    # Without a barrier here, ptxas moves the wait above the whole softmax. Without a store before
    # it, Triton drops the barrier.
    sums.store(b_sum)
    barrier()
    b_acc, b_p = warpgroup_mma_wait(0, deps=(products, b_p))
    mbarrier.arrive(v_empty.index(s_v))
    b_acc = b_acc * gl.convert_layout(b_old, gl.SliceLayout(1, WEIGHTS.parent))[:, None]
    # Not before the wait: the registers of the weights before are read until then.
    return b_acc, _pack(b_new_p, b_q.dtype, WEIGHTS, AHEAD), b_max, b_sum, loaded


@gluon.jit
def _consume(outs, p_lse, q_tiles, q_full, rings, all_sums, place, lists, masks, first_row,
             tokens_q, tokens_kv, scale, g: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr,
             BLOCK_KV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             AHEAD: gl.constexpr):  # fmt: skip
    """Attend to all tiles with the 64 queries of a group, and store the rows of the output."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUTS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTS, k_width=2)
    WORDS: gl.constexpr = BLOCK_KV // 32
    TILES_N: gl.constexpr = BLOCK_KV // BLOCK_N
    k_tiles, v_tiles, k_full, k_empty, v_full, _ = rings
    i_b, i_h, start_m = place
    _, n_full, _, n_tiles, _ = lists
    n_unmasked = n_full * TILES_N
    start_m += g * ROWS
    first_row += g * ROWS
    sums = all_sums.index(g)
    b_q = q_tiles.index(g).reshape([ROWS, D])
    b_acc = gl.zeros([ROWS, D], gl.float32, OUTS)
    b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))

    # No tile stands before the first one. Masked code serves it, whether or not it needs a mask.
    i_block, i_mask = _entry(0, masks, lists, TILES_N)
    p_words, listed = _bits(0, i_mask, masks, lists, first_row, BLOCK_Q, BLOCK_KV, BLOCK_N)
    words = _words(p_words, listed & (n_full == 0), BLOCK_N, WORDS, SCORES)
    left = gl.where(n_full > 0, BLOCK_N, _left(0, i_block, tokens_kv, BLOCK_KV, BLOCK_N))
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    b_k = k_tiles.index(0).reshape([BLOCK_N, D])
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False)  # (ROWS, BLOCK_N)
    mbarrier.arrive(k_empty.index(0))
    b_s = _hide(b_s, words, left, BLOCK_N, SCORES, AHEAD)
    b_p, b_max, b_sum, _ = softmax_step(b_s, b_max, b_sum, scale, True)
    b_kept = _pack(b_p, b_q.dtype, WEIGHTS, AHEAD)
    first_masked = gl.maximum(n_unmasked, 1)
    if AHEAD:
        # Words are loaded a tile before they are needed, and their place two tiles before.
        i = first_masked - n_unmasked
        i_block, i_mask = _entry(i, masks, lists, TILES_N)
        p_words, listed = _bits(i, i_mask, masks, lists, first_row, BLOCK_Q, BLOCK_KV, BLOCK_N)
        words = _words(p_words, listed, BLOCK_N, WORDS, SCORES)
        i_next, i_mask = _entry(i + 1, masks, lists, TILES_N)
    for i in range(1, n_unmasked):
        b_acc, b_kept, b_max, b_sum, words = _attend(
            i, b_q, rings, sums, b_acc, b_kept, b_max, b_sum, scale, words, left, p_words, listed,
            False, AHEAD, BLOCK_N, D, WORDS, STAGES, SCORES, WEIGHTS,
        )  # fmt: skip
    for i in range(first_masked, n_tiles):
        j = i - n_unmasked
        if not AHEAD:
            i_block, i_mask = _entry(j, masks, lists, TILES_N)
        left = _left(j, i_block, tokens_kv, BLOCK_KV, BLOCK_N)
        p_words, listed = _bits(
            j + AHEAD, i_mask, masks, lists, first_row, BLOCK_Q, BLOCK_KV, BLOCK_N
        )
        if AHEAD:
            i_block = i_next
            i_next, i_mask = _entry(j + 2, masks, lists, TILES_N)
        b_acc, b_kept, b_max, b_sum, words = _attend(
            i, b_q, rings, sums, b_acc, b_kept, b_max, b_sum, scale, words, left, p_words, listed,
            True, AHEAD, BLOCK_N, D, WORDS, STAGES, SCORES, WEIGHTS,
        )  # fmt: skip
    j = n_tiles - 1
    mbarrier.wait(v_full.index(j % STAGES), (j // STAGES) & 1)
    b_p = _unpack(b_kept, b_q.dtype, WEIGHTS, AHEAD)  # (ROWS, BLOCK_N)
    b_acc = warpgroup_mma(b_p, v_tiles.index(j % STAGES).reshape([BLOCK_N, D]), b_acc)  # (ROWS, D)

    b_norm = gl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
    b_out = b_acc / gl.convert_layout(b_norm, gl.SliceLayout(1, OUTS))[:, None]
    o_m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    gl.store(p_lse + o_m, (b_max + gl.log2(b_norm)) * LN_2, mask=o_m < tokens_q)
    b_q.store(b_out.to(b_q.dtype))  # nothing reads the queries any more
    fence_async_shared()
    write(outs, [i_b, start_m, i_h, 0], q_tiles.index(g))
    tma.store_wait(0)


@gluon.jit
def _tile_of_program(tiles):
    """The program's tile, and the pair of a sample and a head: as `primitives.tile_of_program`."""
    i_program = gl.program_id(0)
    pairs = gl.num_programs(0) // tiles
    first = gl.minimum(tiles, FIRST_TILES)
    i_late = i_program - first * pairs
    late = gl.maximum(i_late, 0)
    others = gl.maximum(tiles - first, 1)
    i_tile = gl.where(i_late < 0, i_program // pairs, first + late % others)
    return i_tile, gl.where(i_late < 0, i_program % pairs, late // others)


@gluon.jit(
    do_not_specialize=[
        "s_layout_b", "s_layout_h", "tokens_q", "tokens_kv", "heads", "rows", "full_cap",
        "partial_cap",
    ]
)  # fmt: skip
def forward_kernel(
    queries, keys, values, outs, p_lse,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_KV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One program per 128 queries; descriptors are of whole tensors, tiles (1, tokens, 1, D)."""
    TILES_M: gl.constexpr = BLOCK_Q // (GROUPS * ROWS)
    TILES_N: gl.constexpr = BLOCK_KV // BLOCK_N
    i_tile, i_bh = _tile_of_program(rows * TILES_M)
    i_b = i_bh // heads
    i_h = i_bh % heads
    i_layout = i_b * s_layout_b + i_h * s_layout_h
    i_row = gl.load(p_order + i_layout * rows + i_tile // TILES_M)
    i_list = i_layout * rows + i_row
    first_row = (i_tile % TILES_M) * GROUPS * ROWS
    start_m = i_row * BLOCK_Q + first_row
    p_full = p_full_index + i_list.to(gl.int64) * full_cap
    p_partial = p_partial_index + i_list.to(gl.int64) * partial_cap
    p_partial_mask += i_list.to(gl.int64) * partial_cap

    n_full = gl.load(p_full_count + i_list)
    n_partial = gl.load(p_partial_count + i_list)
    # The block at the end of the sequence may be short. A short block needs a mask although it is
    # full: it is the last of its list, and comes after the partial blocks here.
    i_rest = tokens_kv // BLOCK_KV
    i_last = gl.load(p_full + (n_full - 1), mask=n_full > 0, other=-1)
    n_short = (i_last == i_rest).to(gl.int32)
    n_full -= n_short
    n_masked = n_partial + n_short
    if n_full + n_masked == 0:
        # An empty row attends to one block past the end: zeros, all of them hidden.
        n_masked = 1
        i_rest = i_rest + 1
    n_tiles = (n_full + n_masked) * TILES_N

    q_tiles = gl.allocate_shared_memory(queries.dtype, [GROUPS, 1, ROWS, 1, D], queries.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), count=1)
    rings = make_rings(keys, values, BLOCK_N, D, STAGES)
    sums = make_sums()
    fence_async_shared()  # the copy engine must see the barriers

    p_lse += (i_b * heads + i_h).to(gl.int64) * tokens_q
    scale *= LOG2_E
    inputs = (queries, keys, values)
    place = (i_b, i_h, start_m)
    lists = (p_partial, n_full, n_partial, n_tiles, i_rest)
    masks = (p_partial_mask, p_bit_masks)
    gl.warp_specialize(
        [
            (_consume, (outs, p_lse, q_tiles, q_full, rings, sums, place, lists, masks, first_row,
                        tokens_q, tokens_kv, scale, 0, D, BLOCK_Q, BLOCK_KV, BLOCK_N, STAGES,
                        AHEAD)),
            (_consume, (outs, p_lse, q_tiles, q_full, rings, sums, place, lists, masks, first_row,
                        tokens_q, tokens_kv, scale, 1, D, BLOCK_Q, BLOCK_KV, BLOCK_N, STAGES,
                        AHEAD)),
            (_produce, (inputs, q_tiles, q_full, rings, place, lists, p_full,
                        BLOCK_KV, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [232, 40],  # registers of a thread: two groups and a warp share 65,536
    )  # fmt: skip
