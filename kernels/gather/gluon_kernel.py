"""Device code of the Gluon gather: one warp fetches keys and values, two groups of four warps work.

The structure is that of `block_sparse.gluon_kernel`, with two differences: each group gathers its
64 queries by itself, and a program takes one tile of queries after another, while the warp that
fetches runs ahead into the next tile's keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.gluon import (
    GROUPS,
    ROWS,
    barrier,
    fetch_keys_and_values,
    make_rings,
    make_sums,
    softmax_step,
)
from ..common.primitives import LOG2_E


@gluon.jit
def _place(i_tile, p_list, p_starts, first_pair, heads, blocks, BLOCK_N: gl.constexpr):
    """List of the tile, pair of the turn, sample, head, first key, end of the block, key tiles."""
    i_list = gl.load(p_list + i_tile)
    i_pair = i_list // blocks
    i_bh = first_pair + i_pair
    first_n = gl.load(p_starts + i_list % blocks)
    stop_n = gl.load(p_starts + i_list % blocks + 1)
    # A block without keys has a tile of keys that are all hidden.
    n_tiles = gl.maximum((stop_n - first_n + BLOCK_N - 1) // BLOCK_N, 1)
    return i_list, i_pair, i_bh // heads, i_bh % heads, first_n, stop_n, n_tiles


@gluon.jit
def _produce(keys, values, rings, tiles, p_list, p_starts, first_pair, heads, blocks,
             BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Fetch keys and values tile by tile into two rings, for all tiles of queries."""
    done = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        _, _, i_b, i_h, first_n, _, n_tiles = _place(
            i_tile, p_list, p_starts, first_pair, heads, blocks, BLOCK_N
        )
        for i in range(n_tiles):
            start_n = first_n + i * BLOCK_N
            fetch_keys_and_values(keys, values, rings, done + i, i_b, i_h, start_n, STAGES)
        done += n_tiles


@gluon.jit
def _weights(b_s, b_max, b_sum, scale, left, MASKED: gl.constexpr, BLOCK_N: gl.constexpr,
             SCORES: gl.constexpr):  # fmt: skip
    """One step of the online softmax in powers of 2; keys from `left` on are hidden."""
    if MASKED:
        o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        b_s = gl.where((o_n < left)[None, :], b_s, float("-inf"))
    return softmax_step(b_s, b_max, b_sum, scale, MASKED)


@gluon.jit
def _attend(i, b_q, rings, sums, b_acc, b_p, b_max, b_sum, scale, left,
            MASKED: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
            STAGES: gl.constexpr, SCORES: gl.constexpr, WEIGHTS: gl.constexpr):  # fmt: skip
    """The weights of tile `i`, and the product of tile `i - 1`: its weights `b_p` by its values."""
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
    products = warpgroup_mma(b_p, b_v, b_acc, is_async=True)  # (ROWS, D)
    b_s = warpgroup_mma_wait(1, deps=(scores,))  # (ROWS, BLOCK_N)
    mbarrier.arrive(k_empty.index(s_k))
    b_new_p, b_max, b_sum, b_old = _weights(b_s, b_max, b_sum, scale, left, MASKED, BLOCK_N, SCORES)
    # As in `block_sparse.gluon_kernel`: without a barrier here, ptxas moves the wait above the
    # whole softmax. Without a store before it, Triton drops the barrier.
    sums.store(b_sum)
    barrier()
    # b_acc: (ROWS, D), b_p: (ROWS, BLOCK_N)
    b_acc, b_p = warpgroup_mma_wait(0, deps=(products, b_p))
    mbarrier.arrive(v_empty.index(s_v))
    b_acc = b_acc * gl.convert_layout(b_old, gl.SliceLayout(1, WEIGHTS.parent))[:, None]
    return b_acc, gl.convert_layout(b_new_p.to(b_p.dtype), WEIGHTS), b_max, b_sum


@gluon.jit
def _entries(p_entry, i_list, start, count, tokens_q, LAYOUT: gl.constexpr):
    """Entries of a list for the queries of a group, and whether there are such entries: (ROWS,)."""
    o_e = start + gl.arange(0, ROWS, LAYOUT)
    m_e = o_e < count
    return gl.load(p_entry + i_list.to(gl.int64) * tokens_q + o_e, mask=m_e, other=0), m_e


@gluon.jit
def _consume(p_q, s_qb, s_qt, s_qh, p_part, p_part_lse, lists, q_tiles, rings, all_sums, tiles,
             p_list, p_starts, first_pair, heads, blocks, tokens_q, chunks, scale,
             g: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """Attend with 64 queries of each tile to its key block, and store their partial results."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUTS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTS, k_width=2)
    # Sixteen bytes of a query for each thread.
    GATHERED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    p_first, p_query, p_earlier, p_stop = lists
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    sums = all_sums.index(g)
    b_q = q_tiles.index(g)
    o_d = gl.arange(0, D, gl.SliceLayout(0, GATHERED))
    done = 0
    for i_tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i_list, i_pair, i_b, i_h, first_n, stop_n, n_tiles = _place(
            i_tile, p_list, p_starts, first_pair, heads, blocks, BLOCK_N
        )
        count = gl.load(p_first + i_list.to(gl.int64) * (chunks + 1) + chunks)
        i_first = gl.load(p_stop + i_list) - (count + GROUPS * ROWS - 1) // (GROUPS * ROWS)
        start = ((i_tile - i_first) * GROUPS + g) * ROWS
        o_m, m_m = _entries(
            p_query, i_list, start, count, tokens_q, gl.SliceLayout(1, GATHERED)
        )  # (ROWS,)
        p_head = p_q + i_b.to(gl.int64) * s_qb + i_h.to(gl.int64) * s_qh
        b_gathered = gl.load(  # (ROWS, D)
            p_head + o_m.to(gl.int64)[:, None] * s_qt + o_d[None, :], mask=m_m[:, None], other=0.0
        )
        barrier()  # the results of the last tile have been read
        b_q.store(b_gathered)
        fence_async_shared()  # matrix products must see the queries
        barrier()

        b_acc = gl.zeros([ROWS, D], gl.float32, OUTS)
        b_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        b_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        left = stop_n - first_n
        b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        b_k = k_tiles.index(done % STAGES).reshape([BLOCK_N, D])
        mbarrier.wait(k_full.index(done % STAGES), (done // STAGES) & 1)
        b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False)  # (ROWS, BLOCK_N)
        mbarrier.arrive(k_empty.index(done % STAGES))
        b_p, b_max, b_sum, _ = _weights(b_s, b_max, b_sum, scale, left, True, BLOCK_N, SCORES)
        b_p = gl.convert_layout(b_p.to(b_q.dtype), WEIGHTS)
        n_whole = left // BLOCK_N
        for i in range(1, n_whole):
            b_acc, b_p, b_max, b_sum = _attend(
                done + i, b_q, rings, sums, b_acc, b_p, b_max, b_sum, scale, left,
                False, BLOCK_N, D, STAGES, SCORES, WEIGHTS,
            )  # fmt: skip
        for i in range(gl.maximum(n_whole, 1), n_tiles):
            b_acc, b_p, b_max, b_sum = _attend(
                done + i, b_q, rings, sums, b_acc, b_p, b_max, b_sum, scale, left - i * BLOCK_N,
                True, BLOCK_N, D, STAGES, SCORES, WEIGHTS,
            )  # fmt: skip
        done += n_tiles
        s_v = (done - 1) % STAGES
        mbarrier.wait(v_full.index(s_v), ((done - 1) // STAGES) & 1)
        b_acc = warpgroup_mma(b_p, v_tiles.index(s_v).reshape([BLOCK_N, D]), b_acc)  # (ROWS, D)
        mbarrier.arrive(v_empty.index(s_v))

        b_norm = gl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
        b_out = b_acc / gl.convert_layout(b_norm, gl.SliceLayout(1, OUTS))[:, None]
        # Both (ROWS,).
        o_m, m_m = _entries(p_query, i_list, start, count, tokens_q, gl.SliceLayout(1, SCORES))
        b_earlier, _ = _entries(
            p_earlier, i_list, start, count, tokens_q, gl.SliceLayout(1, SCORES)
        )
        b_row = (i_pair.to(gl.int64) * tokens_q + o_m) * blocks + b_earlier  # (ROWS,)
        gl.store(p_part_lse + b_row, b_max + gl.log2(b_norm), mask=m_m)
        # Nothing reads the queries any more: their place turns the results into whole rows.
        b_q.store(b_out.to(b_q.dtype))
        barrier()
        b_part = b_q.load(GATHERED)  # (ROWS, D)
        b_row = gl.convert_layout(b_row, gl.SliceLayout(1, GATHERED))
        m_row = gl.convert_layout(m_m, gl.SliceLayout(1, GATHERED))
        gl.store(p_part + b_row[:, None] * D + o_d[None, :], b_part, mask=m_row[:, None])


@gluon.jit(do_not_specialize=["first_pair", "tokens_q", "blocks", "chunks", "lists"])
def forward_kernel(
    p_q, keys, values, p_part, p_part_lse,
    p_starts, p_first, p_query, p_earlier, p_stop, p_list,
    s_qb, s_qt, s_qh, first_pair, tokens_q, heads, blocks, chunks, lists, scale,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 queries in turn; keys and values are descriptors of tiles (1, tokens, 1, D)."""
    tiles = gl.load(p_stop + lists - 1)
    q_tiles = gl.allocate_shared_memory(keys.dtype, [GROUPS, ROWS, D], QUERIES)
    rings = make_rings(keys, values, BLOCK_N, D, STAGES)
    sums = make_sums()
    fence_async_shared()  # the copy engine must see the barriers

    scale *= LOG2_E
    selection = (p_first, p_query, p_earlier, p_stop)
    gl.warp_specialize(
        [
            (_consume, (p_q, s_qb, s_qt, s_qh, p_part, p_part_lse, selection, q_tiles, rings, sums,
                        tiles, p_list, p_starts, first_pair, heads, blocks, tokens_q, chunks,
                        scale, 0, D, BLOCK_N, STAGES)),
            (_consume, (p_q, s_qb, s_qt, s_qh, p_part, p_part_lse, selection, q_tiles, rings, sums,
                        tiles, p_list, p_starts, first_pair, heads, blocks, tokens_q, chunks,
                        scale, 1, D, BLOCK_N, STAGES)),
            (_produce, (keys, values, rings, tiles, p_list, p_starts, first_pair, heads, blocks,
                        BLOCK_N, STAGES)),
        ],
        [4, 1],
        [232, 40],  # registers of a thread: two groups and a warp share 65,536
    )  # fmt: skip
