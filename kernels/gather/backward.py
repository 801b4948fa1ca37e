"""The backward kernels: dQ by groups of queries, dK and dV by key blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.primitives import LOG2_E, load_tile, store_tile, token_offsets
from ..common.row_sums import row_sums
from ..common.softmax import add_to_keys, add_to_queries
from ..common.tile_tables import Choice
from ..common.variants import first_that_compiles, takes_any
from .forward import group_of_program
from .launch import SelectionProblem
from .selecting import key_tiles, selecting_queries


@triton.jit(do_not_specialize=["first_pair", "tokens_q", "blocks", "chunks", "chunks_per_group"])
def queries_kernel(
    p_q, p_k, p_v, p_grad_out, p_key_mask, p_delta, p_log2_lse, p_dq, p_acc,
    p_starts, p_first, p_query,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_mb, s_mt,
    first_pair, tokens_q, heads, blocks, chunks, chunks_per_group, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a group of queries, which are packed as in the forward kernel."""
    i_pair, i_b, i_h, i_chunk, i_next_chunk = group_of_program(
        first_pair, heads, chunks, chunks_per_group
    )
    o_n = token_offsets(BLOCK_N, WIDE)
    p_q += i_b * s_qb + i_h * s_qh
    p_grad_out += i_b * s_gb + i_h * s_gh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_key_mask += i_b * s_mb
    p_delta += (i_b * heads + i_h) * tokens_q
    p_log2_lse += (i_b * heads + i_h) * tokens_q
    p_acc += i_pair * tokens_q * D

    for i_block in tl.range(0, blocks):
        i_list = i_pair * blocks + i_block
        p_chunk = p_first + i_list * (chunks + 1)
        i_entry = tl.load(p_chunk + i_chunk)
        i_stop = tl.load(p_chunk + i_next_chunk)
        for i in tl.range(i_entry, i_stop, BLOCK_M):
            o_e = i + tl.arange(0, BLOCK_M)
            m_m = o_e < i_stop
            o_m = tl.load(p_query + i_list * tokens_q + o_e, mask=m_m, other=0)  # (BLOCK_M,)
            if WIDE:
                o_m = o_m.to(tl.int64)
            b_lse = tl.load(p_log2_lse + o_m, mask=m_m, other=float("inf"))  # (BLOCK_M,)
            b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
            b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            # Both (BLOCK_M, BLOCK_D).
            b_grad = load_tile(p_grad_out, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D)
            b_dq = load_tile(p_acc, D, 1, o_m, m_m, True, D, BLOCK_D)
            tl.debug_barrier()
            # Loaded here: otherwise the first keys' addresses stay in registers for all tiles.
            first_n = tl.load(p_starts + i_block)
            stop_n = tl.load(p_starts + i_block + 1)
            n_whole = (stop_n - first_n) // BLOCK_N
            if HAS_KEY_MASK:
                n_whole = 0

            for i_n in tl.range(0, n_whole):
                start_n = first_n + i_n * BLOCK_N
                b_k = load_tile(
                    p_k + start_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, True, False, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_v = load_tile(
                    p_v + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_n, True, False, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_dq = add_to_queries(  # (BLOCK_M, BLOCK_D)
                    b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, scale * LOG2_E, True, False,
                    PRECISION,
                )  # fmt: skip
            for i_n in tl.range(n_whole, tl.cdiv(stop_n - first_n, BLOCK_N)):
                start_n = first_n + i_n * BLOCK_N
                m_n = start_n + o_n < stop_n
                if HAS_KEY_MASK:
                    p_visible = p_key_mask + (start_n + o_n).to(tl.int64) * s_mt
                    m_n = tl.load(p_visible, mask=m_n, other=0) != 0  # (BLOCK_N,)
                b_k = load_tile(
                    p_k + start_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_v = load_tile(
                    p_v + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_dq = add_to_queries(  # (BLOCK_M, BLOCK_D)
                    b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, scale * LOG2_E, m_n[None, :],
                    True, PRECISION,
                )  # fmt: skip

            # Addresses are loaded again: kept in the loops, they would take registers from tiles.
            o_m = tl.load(p_query + i_list * tokens_q + o_e, mask=m_m, other=0)  # (BLOCK_M,)
            if WIDE:
                o_m = o_m.to(tl.int64)
            store_tile(p_acc, D, o_m, m_m, b_dq, D, BLOCK_D)
            tl.debug_barrier()

    o_m = tl.arange(0, BLOCK_M)
    stop_m = tl.minimum(i_next_chunk * CHUNK, tokens_q)
    for i in tl.range(0, tl.cdiv(stop_m - i_chunk * CHUNK, BLOCK_M)):
        start_m = i_chunk * CHUNK + i * BLOCK_M
        m_m = start_m + o_m < stop_m
        # b_dq: (BLOCK_M, BLOCK_D)
        b_dq = load_tile(p_acc + start_m.to(tl.int64) * D, D, 1, o_m, m_m, True, D, BLOCK_D)
        first = (i_b * tokens_q + start_m) * heads + i_h
        store_tile(p_dq + first * D, heads * D, o_m, m_m, b_dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["first_pair", "tokens_q", "tokens_kv", "blocks", "chunks", "tiles"])
def keys_kernel(
    p_q, p_k, p_v, p_grad_out, p_key_mask, p_delta, p_log2_lse, p_dk, p_dv,
    p_starts, p_first, p_query, p_tile_block, p_tile_start, p_order,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd,
    s_gb, s_gt, s_gh, s_gd, s_mb, s_mt,
    first_pair, tokens_q, tokens_kv, heads, blocks, chunks, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV: one program per tile of a key block walks the queries that selected the block."""
    i_program = tl.program_id(0)
    i_pair = (i_program // tiles).to(tl.int64)
    i_tile = tl.load(p_order + i_program)
    i_block = tl.load(p_tile_block + i_tile)
    if i_block == blocks:
        return

    start_n = tl.load(p_tile_start + i_tile)
    i_list = i_pair * blocks + i_block
    p_query += i_list * tokens_q
    count = tl.load(p_first + i_list * (chunks + 1) + chunks)
    i_b = (first_pair + i_pair) // heads
    i_h = (first_pair + i_pair) % heads
    o_n = token_offsets(BLOCK_N, WIDE)
    o_e = tl.arange(0, BLOCK_M)
    p_q += i_b * s_qb + i_h * s_qh
    p_grad_out += i_b * s_gb + i_h * s_gh
    p_k += i_b * s_kb + i_h * s_kh + start_n.to(tl.int64) * s_kt
    p_v += i_b * s_vb + i_h * s_vh + start_n.to(tl.int64) * s_vt
    p_delta += (i_b * heads + i_h) * tokens_q
    p_log2_lse += (i_b * heads + i_h) * tokens_q

    m_n = start_n + o_n < tl.load(p_starts + i_block + 1)
    b_k = load_tile(p_k, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_v = load_tile(p_v, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)

    # A key's gradients come from its own scores only: hidden keys, and NaN in them, need no mask
    # until the end. Past the end of the list its last entry is read again: that needs no mask,
    # brings no NaN of a query outside the list, and gives weights of exp2(s - inf) = 0. Queries'
    # numbers are loaded one step early, so that the queries do not wait for them. Their LSE and
    # delta are, too: otherwise the compiler copies them to shared memory first, four bytes at a
    # time.
    # o_m: (BLOCK_M,)
    o_m = tl.load(p_query + tl.minimum(o_e, count - 1), mask=o_e < count * BLOCK_M, other=0)
    b_lse_next = tl.load(p_log2_lse + o_m, mask=o_e < count, other=float("inf"))  # (BLOCK_M,)
    b_delta_next = tl.load(p_delta + o_m)  # (BLOCK_M,)
    for i in tl.range(0, count, BLOCK_M):
        o_t = o_m
        b_lse = b_lse_next
        b_delta = b_delta_next
        if WIDE:
            o_t = o_m.to(tl.int64)
        o_m = tl.load(p_query + tl.minimum(i + BLOCK_M + o_e, count - 1))  # (BLOCK_M,)
        # b_lse_next: (BLOCK_M,)
        b_lse_next = tl.load(p_log2_lse + o_m, mask=i + BLOCK_M + o_e < count, other=float("inf"))
        b_delta_next = tl.load(p_delta + o_m)  # (BLOCK_M,)
        b_q = load_tile(p_q, s_qt, s_qd, o_t, True, False, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
        # b_grad: (BLOCK_M, BLOCK_D)
        b_grad = load_tile(p_grad_out, s_gt, s_gd, o_t, True, False, D, BLOCK_D)
        b_dk, b_dv = add_to_keys(
            b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, scale * LOG2_E, True,
            False, PRECISION,
        )  # fmt: skip

    b_dk *= scale
    if HAS_KEY_MASK:
        p_key_mask += i_b * s_mb
        # m_seen: (BLOCK_N, 1)
        m_seen = tl.load(p_key_mask + (start_n + o_n) * s_mt, mask=m_n, other=0)[:, None] != 0
        b_dk = tl.where(m_seen, b_dk, 0.0)
        b_dv = tl.where(m_seen, b_dv, 0.0)
    first = ((i_b * tokens_kv + start_n) * heads + i_h) * D
    o_n = tl.arange(0, BLOCK_N)
    store_tile(p_dk + first, heads * D, o_n, m_n, b_dk, D, BLOCK_D)
    store_tile(p_dv + first, heads * D, o_n, m_n, b_dv, D, BLOCK_D)


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    scale: float,
    queries: Choice | None = None,
    keys: Choice | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, of their shapes; the same bits at every call.

    Args:
        grad_out: gradient of the output, `(batch, tokens, heads, head_dim)`.
        grad_lse: gradient of the log-sum-exp, `(batch, heads, tokens)`; None for 0.
        q, k, v, starts, bits, key_mask, scale: arguments of the forward pass.
        out, lse: results of the forward pass.
        queries, keys: the only variant and tiles to run for dQ, and for dK and dV; by default the
            best variants that take the call and compile.

    Raises:
        ValueError: if a choice does not take the call.
    """
    problem = SelectionProblem.of(q, k, v, starts, key_mask, out, grad_out)
    _, tokens, heads, head_dim = q.shape
    sums = row_sums(out, grad_out, lse, grad_lse, block_q=1, wide=problem.wide)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    strides = (
        *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *problem.key_mask_strides
    )  # fmt: skip

    def turn(first_pair: int, pairs: int) -> None:
        lists = selecting_queries(bits, problem.blocks, first_pair, pairs, problem.chunk)
        selection = (starts, lists.first, lists.query)

        def run_queries(best: Choice) -> None:
            config = best.tiles
            chunks_per_group = problem.chunks_per_group(pairs)
            queries_kernel[(pairs * triton.cdiv(problem.chunks, chunks_per_group),)](
                q, k, v, grad_out,
                problem.key_mask, sums.delta, sums.log2_lse,
                dq, lse.new_zeros((pairs, tokens, head_dim)), *selection, *strides,
                first_pair, tokens, heads, problem.blocks, problem.chunks, chunks_per_group, scale,
                CHUNK=problem.chunk,
                **problem.constants(config),
            )  # fmt: skip

        def run_keys(best: Choice) -> None:
            tiles = key_tiles(starts, problem.tokens_kv, best.tiles.block_n, lists)
            keys_kernel[(tiles.order.numel(),)](
                q, k, v, grad_out, problem.key_mask, sums.delta, sums.log2_lse, dk, dv,
                *selection, tiles.block, tiles.start, tiles.order, *strides,
                first_pair, tokens, problem.tokens_kv, heads, problem.blocks, problem.chunks,
                tiles.order.shape[-1], scale,
                **problem.constants(best.tiles),
            )  # fmt: skip

        first_that_compiles("gather_queries", problem, takes_any, run_queries, queries)
        first_that_compiles("gather_keys", problem, takes_any, run_keys, keys)

    with problem.on_device():
        for first_pair, pairs in problem.turns(head_dim):
            turn(first_pair, pairs)
    return dq, dk, dv
