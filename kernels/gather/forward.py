"""The forward kernel: each program packs the queries of a group that selected a key block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import SMALLEST_SCALE
from ..common.primitives import LN_2, LOG2_E, load_tile, store_tile, token_offsets
from ..common.softmax import attend_tile, weigh
from ..common.tile_tables import Choice
from ..common.variants import first_that_compiles, takes_any
from .launch import SelectionProblem
from .selecting import selecting_queries


@triton.jit
def group_of_program(first_pair, heads, chunks, chunks_per_group):
    """Pair within the turn, sample, head, first chunk of the group, first chunk after the group."""
    groups = tl.cdiv(chunks, chunks_per_group)
    i_program = tl.program_id(0)
    i_pair = i_program // groups
    i_chunk = (i_program % groups) * chunks_per_group
    i_bh = first_pair + i_pair
    return (
        i_pair.to(tl.int64),
        (i_bh // heads).to(tl.int64),
        (i_bh % heads).to(tl.int64),
        i_chunk,
        tl.minimum(i_chunk + chunks_per_group, chunks),
    )


@triton.jit(do_not_specialize=["first_pair", "tokens_q", "blocks", "chunks", "chunks_per_group"])
def forward_kernel(
    p_q, p_k, p_v, p_key_mask, p_out, p_lse, p_acc, p_max, p_sum, p_starts, p_first, p_query,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd, s_mb, s_mt,
    first_pair, tokens_q, heads, blocks, chunks, chunks_per_group, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr, AHEAD: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """AHEAD: see `block_sparse.forward`. Tiles of keys begin with their block, at any token."""
    i_pair, i_b, i_h, i_chunk, i_next_chunk = group_of_program(
        first_pair, heads, chunks, chunks_per_group
    )
    o_n = token_offsets(BLOCK_N, WIDE)
    p_q += i_b * s_qb + i_h * s_qh
    p_k += i_b * s_kb + i_h * s_kh
    p_v += i_b * s_vb + i_h * s_vh
    p_key_mask += i_b * s_mb
    p_acc += i_pair * tokens_q * D
    p_max += i_pair * tokens_q
    p_sum += i_pair * tokens_q
    scale *= LOG2_E
    if NEGATIVE_SCALE:  # only with scale > 0 is the largest score the largest scaled score
        scale = -scale

    for i_block in tl.range(0, blocks):
        i_list = i_pair * blocks + i_block
        p_chunk = p_first + i_list * (chunks + 1)
        i_entry = tl.load(p_chunk + i_chunk)
        i_stop = tl.load(p_chunk + i_next_chunk)
        for i in tl.range(i_entry, i_stop, BLOCK_M):
            # The online softmax goes on where the last block with these queries left off. No other
            # program has these queries, but a thread reads what others have written: hence barriers
            o_e = i + tl.arange(0, BLOCK_M)
            m_m = o_e < i_stop
            o_m = tl.load(p_query + i_list * tokens_q + o_e, mask=m_m, other=0)  # (BLOCK_M,)
            if WIDE:
                o_m = o_m.to(tl.int64)
            b_q = load_tile(p_q, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            if NEGATIVE_SCALE:
                b_q = (-b_q.to(tl.float32)).to(b_q.dtype)
            b_acc = load_tile(p_acc, D, 1, o_m, m_m, True, D, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_max = tl.load(p_max + o_m, mask=m_m, other=float("-inf"))  # (BLOCK_M,)
            b_sum = tl.load(p_sum + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
            tl.debug_barrier()
            # Loaded here: otherwise the first keys' addresses stay in registers for all tiles.
            first_n = tl.load(p_starts + i_block)
            stop_n = tl.load(p_starts + i_block + 1)
            n_whole = (stop_n - first_n) // BLOCK_N
            if HAS_KEY_MASK:
                n_whole = 0

            if AHEAD:
                m_first = first_n + o_n < stop_n
                b_k = load_tile(
                    p_k + first_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, m_first, True, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
                for i_n in tl.range(0, n_whole):
                    start_n = first_n + i_n * BLOCK_N
                    next_n = first_n + tl.minimum(i_n + 1, n_whole - 1) * BLOCK_N
                    b_k = load_tile(
                        p_k + next_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, True, False, D, BLOCK_D
                    )  # (BLOCK_N, BLOCK_D)
                    b_p, b_new, b_old = weigh(b_s, b_max, scale, True, False)
                    # b_s: (BLOCK_M, BLOCK_N)
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                    b_sum = b_sum * b_old + tl.sum(b_p, 1)
                    b_v = load_tile(
                        p_v + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_n, True, False, D, BLOCK_D
                    )  # (BLOCK_N, BLOCK_D)
                    b_p = b_p.to(b_v.dtype)
                    # b_acc: (BLOCK_M, BLOCK_D)
                    b_acc = tl.dot(b_p, b_v, b_acc * b_old[:, None], input_precision=PRECISION)
                    b_max = b_new
            else:
                for i_n in tl.range(0, n_whole):
                    start_n = first_n + i_n * BLOCK_N
                    b_k = load_tile(
                        p_k + start_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, True, False, D, BLOCK_D
                    )  # (BLOCK_N, BLOCK_D)
                    b_v = load_tile(
                        p_v + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_n, True, False, D, BLOCK_D
                    )  # (BLOCK_N, BLOCK_D)
                    b_acc, b_max, b_sum = attend_tile(
                        b_q, b_k, b_v, b_acc, b_max, b_sum, scale, True, False, PRECISION
                    )
            # The short end of the block; with a key mask, the whole block.
            for i_n in tl.range(n_whole, tl.cdiv(stop_n - first_n, BLOCK_N)):
                start_n = first_n + i_n * BLOCK_N
                m_n = start_n + o_n < stop_n
                if HAS_KEY_MASK:
                    p_visible = p_key_mask + (start_n + o_n).to(tl.int64) * s_mt
                    m_n = tl.load(p_visible, mask=m_n, other=0) != 0  # (BLOCK_N,)
                # Hidden keys are read as 0: a NaN left in padding must not reach a sum.
                b_k = load_tile(
                    p_k + start_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_v = load_tile(
                    p_v + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D
                )  # (BLOCK_N, BLOCK_D)
                b_acc, b_max, b_sum = attend_tile(
                    b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_n[None, :], True, PRECISION
                )

            # Addresses are loaded again: kept in the loops, they would take registers from tiles.
            o_m = tl.load(p_query + i_list * tokens_q + o_e, mask=m_m, other=0)  # (BLOCK_M,)
            if WIDE:
                o_m = o_m.to(tl.int64)
            store_tile(p_acc, D, o_m, m_m, b_acc, D, BLOCK_D)
            tl.store(p_max + o_m, b_max, mask=m_m)
            tl.store(p_sum + o_m, b_sum, mask=m_m)
            tl.debug_barrier()

    p_lse += (i_b * heads + i_h) * tokens_q
    o_m = tl.arange(0, BLOCK_M)
    stop_m = tl.minimum(i_next_chunk * CHUNK, tokens_q)
    for i in tl.range(0, tl.cdiv(stop_m - i_chunk * CHUNK, BLOCK_M)):
        start_m = i_chunk * CHUNK + i * BLOCK_M
        m_m = start_m + o_m < stop_m
        # b_acc: (BLOCK_M, BLOCK_D)
        b_acc = load_tile(p_acc + start_m.to(tl.int64) * D, D, 1, o_m, m_m, True, D, BLOCK_D)
        b_max = tl.load(p_max + start_m + o_m, mask=m_m, other=float("-inf"))  # (BLOCK_M,)
        b_sum = tl.load(p_sum + start_m + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
        b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
        first = (i_b * tokens_q + start_m) * heads + i_h
        store_tile(p_out + first * D, heads * D, o_m, m_m, b_acc / b_norm[:, None], D, BLOCK_D)
        tl.store(p_lse + start_m + o_m, (b_max + tl.log2(b_norm)) * LN_2, mask=m_m)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor,
    bits: torch.Tensor,
    key_mask: torch.Tensor | None,
    *,
    scale: float,
    choice: Choice | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp; arguments as of `selected_attention`, already checked.

    Args:
        choice: the only variant and tiles to run; by default the best variant that takes the call
            and compiles.

    Raises:
        ValueError: if the choice does not take the call.
    """
    problem = SelectionProblem.of(q, k, v, starts, key_mask)
    tokens, heads, head_dim = problem.tokens_q, problem.heads, problem.head_dim

    def run(best: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        config = best.tiles
        out = q.new_empty(q.shape)
        lse = q.new_empty((problem.batch, heads, tokens), dtype=torch.float32)
        with problem.on_device():
            for first_pair, pairs in problem.turns(head_dim + 2):
                lists = selecting_queries(bits, problem.blocks, first_pair, pairs, problem.chunk)
                acc = lse.new_zeros((pairs, tokens, head_dim))
                maximum = lse.new_full((pairs, tokens), -torch.inf)
                total = lse.new_zeros((pairs, tokens))
                chunks_per_group = problem.chunks_per_group(pairs)
                forward_kernel[(pairs * triton.cdiv(problem.chunks, chunks_per_group),)](
                    q, k, v,
                    problem.key_mask, out, lse, acc, maximum, total,
                    starts, lists.first, lists.query,
                    *q.stride(), *k.stride(), *v.stride(), *problem.key_mask_strides,
                    first_pair, tokens, heads, problem.blocks, problem.chunks, chunks_per_group,
                    scale or SMALLEST_SCALE,
                    CHUNK=problem.chunk, NEGATIVE_SCALE=scale < 0, AHEAD=config.ahead,
                    **problem.constants(config),
                )  # fmt: skip
        return out, lse

    return first_that_compiles("gather_forward", problem, takes_any, run, choice)
