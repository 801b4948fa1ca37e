"""The forward pass: attention of packed queries to one key block each, then the blocks together.

The queries that selected a key block are packed into tiles. A tile's program computes attention to
that block alone, with the speed of dense attention, and writes a partial result for each query. A
second kernel weighs the partial results of each query by their log-sum-exp. A partial result passes
through memory once in each direction, in the dtype of the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.launch import SMALLEST_SCALE
from ..common.primitives import LN_2, LOG2_E, load_tile, store_tile, token_offsets
from ..common.softmax import attend_tile
from ..common.tile_tables import Choice
from ..common.variants import first_that_compiles
from . import gluon_forward, selecting
from .launch import SelectionProblem
from .selecting import query_tiles, selecting_queries

# Programs that take tiles in turn: several for every multiprocessor of any GPU.
_PROGRAMS = 1024
# Queries of a program that brings partial results together.
_JOINED = 16


@triton.jit(do_not_specialize=["first_pair", "tokens_q", "blocks", "chunks"])
def forward_kernel(
    p_q, p_k, p_v, p_key_mask, p_part, p_part_lse,
    p_starts, p_first, p_query, p_earlier, p_stop, p_list,
    s_qb, s_qt, s_qh, s_qd, s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd, s_mb, s_mt,
    first_pair, tokens_q, heads, blocks, chunks, lists, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr, NEGATIVE_SCALE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of tiles of queries to the one key block that they selected.

    Tiles of keys begin with their block, at any token. The end of a block that fills no tile is
    read in tiles of REST_N keys.
    """
    scale *= LOG2_E
    if NEGATIVE_SCALE:  # only with scale > 0 is the largest score the largest scaled score
        scale = -scale
    o_n = token_offsets(BLOCK_N, WIDE)
    o_r = token_offsets(REST_N, WIDE)
    tiles = tl.load(p_stop + lists - 1)

    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_list = tl.load(p_list + i_tile)
        count = tl.load(p_first + i_list.to(tl.int64) * (chunks + 1) + chunks)
        i_first = tl.load(p_stop + i_list) - tl.cdiv(count, BLOCK_M)
        i_pair = i_list // blocks
        i_block = i_list % blocks
        i_b = ((first_pair + i_pair) // heads).to(tl.int64)
        i_h = ((first_pair + i_pair) % heads).to(tl.int64)
        p_keys = p_k + i_b * s_kb + i_h * s_kh
        p_values = p_v + i_b * s_vb + i_h * s_vh

        o_e = (i_tile - i_first) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_e < count
        p_entry = p_query + i_list.to(tl.int64) * tokens_q + o_e
        o_m = tl.load(p_entry, mask=m_m, other=0)  # (BLOCK_M,)
        if WIDE:
            o_m = o_m.to(tl.int64)
        b_q = load_tile(  # (BLOCK_M, BLOCK_D)
            p_q + i_b * s_qb + i_h * s_qh, s_qt, s_qd, o_m, m_m, True, D, BLOCK_D
        )
        if NEGATIVE_SCALE:
            b_q = (-b_q.to(tl.float32)).to(b_q.dtype)
        b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        first_n = tl.load(p_starts + i_block)
        stop_n = tl.load(p_starts + i_block + 1)
        n_whole = (stop_n - first_n) // BLOCK_N
        if HAS_KEY_MASK:
            n_whole = 0

        for i_n in tl.range(0, n_whole):
            start_n = first_n + i_n * BLOCK_N
            b_k = load_tile(
                p_keys + start_n.to(tl.int64) * s_kt, s_kt, s_kd, o_n, True, False, D, BLOCK_D
            )  # (BLOCK_N, BLOCK_D)
            b_v = load_tile(
                p_values + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_n, True, False, D, BLOCK_D
            )  # (BLOCK_N, BLOCK_D)
            b_acc, b_max, b_sum = attend_tile(
                b_q, b_k, b_v, b_acc, b_max, b_sum, scale, True, False, PRECISION
            )
        # The short end of the block; with a key mask, the whole block.
        first_n += n_whole * BLOCK_N
        for i_n in tl.range(0, tl.cdiv(stop_n - first_n, REST_N)):
            start_n = first_n + i_n * REST_N
            m_n = start_n + o_r < stop_n
            if HAS_KEY_MASK:
                p_visible = p_key_mask + i_b * s_mb + (start_n + o_r).to(tl.int64) * s_mt
                m_n = tl.load(p_visible, mask=m_n, other=0) != 0  # (REST_N,)
            # Hidden keys are read as 0: a NaN left in padding must not reach a sum.
            b_k = load_tile(
                p_keys + start_n.to(tl.int64) * s_kt, s_kt, s_kd, o_r, m_n, True, D, BLOCK_D
            )  # (REST_N, BLOCK_D)
            b_v = load_tile(
                p_values + start_n.to(tl.int64) * s_vt, s_vt, s_vd, o_r, m_n, True, D, BLOCK_D
            )  # (REST_N, BLOCK_D)
            b_acc, b_max, b_sum = attend_tile(
                b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_n[None, :], True, PRECISION
            )

        b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
        # Addresses are loaded here: kept in the loops, they would take registers from tiles.
        o_m = tl.load(p_entry, mask=m_m, other=0)  # (BLOCK_M,)
        b_earlier = tl.load(
            p_earlier + i_list.to(tl.int64) * tokens_q + o_e, mask=m_m, other=0
        )  # (BLOCK_M,)
        b_row = (i_pair.to(tl.int64) * tokens_q + o_m) * blocks + b_earlier  # (BLOCK_M,)
        store_tile(p_part, D, b_row, m_m, b_acc / b_norm[:, None], D, BLOCK_D)
        tl.store(p_part_lse + b_row, b_max + tl.log2(b_norm), mask=m_m)


@triton.jit(do_not_specialize=["first_pair", "tokens_q", "tiles", "blocks"])
def join_kernel(
    p_part, p_part_lse, p_selected, p_out, p_lse, s_ob, s_ot, s_oh, s_lb, s_lh,
    first_pair, tokens_q, tiles, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Bring the partial results of each query together, in the order of the blocks."""
    i_program = tl.program_id(0)
    i_pair = (i_program // tiles).to(tl.int64)
    i_b = ((first_pair + i_pair) // heads).to(tl.int64)
    i_h = ((first_pair + i_pair) % heads).to(tl.int64)
    o_m = (i_program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < tokens_q
    b_selected = tl.load(p_selected + i_pair * tokens_q + o_m, mask=m_m, other=0)  # (BLOCK_M,)
    b_row = (i_pair * tokens_q + o_m) * blocks  # (BLOCK_M,)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.range(0, tl.max(b_selected, 0)):
        m_i = i < b_selected
        b_lse = tl.load(p_part_lse + b_row + i, mask=m_i, other=float("-inf"))  # (BLOCK_M,)
        # b_part: (BLOCK_M, BLOCK_D)
        b_part = load_tile(p_part, D, 1, b_row + i, m_i, True, D, BLOCK_D).to(tl.float32)
        b_new = tl.maximum(b_max, b_lse)
        # A query that has seen nothing yet has a maximum of -inf, and -inf - -inf is NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_lse - b_base)
        b_old = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_old + b_weight
        b_acc = b_acc * b_old[:, None] + b_part * b_weight[:, None]
        b_max = b_new
    b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
    p_out += i_b * s_ob + i_h * s_oh
    store_tile(p_out, s_ot, o_m.to(tl.int64), m_m, b_acc / b_norm[:, None], D, BLOCK_D)
    p_lse += i_b * s_lb + i_h * s_lh
    tl.store(p_lse + o_m, (b_max + tl.log2(b_norm)) * LN_2, mask=m_m)


@dataclass(frozen=True)
class Turn:
    """Pairs and queries whose partial results are in memory at a time."""

    first_pair: int
    pairs: int
    queries: slice


def turns_of(problem: SelectionProblem) -> Iterator[Turn]:
    """Turns within the scratch memory: some heads, or else a head's queries chunk by chunk."""
    each = problem.blocks * (problem.head_dim * problem.dtype.itemsize + 12) + 4
    whole = each * problem.tokens_q
    for first_pair, pairs in selecting.turns(problem.batch * problem.heads, whole):
        fitting = selecting.scratch_bytes() // (each * pairs)
        step = max(1, fitting // problem.chunk) * problem.chunk
        for start in range(0, problem.tokens_q, step):
            yield Turn(first_pair, pairs, slice(start, min(start + step, problem.tokens_q)))


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
    blocks = problem.blocks

    def run(best: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        out = q.new_empty(q.shape)
        lse = q.new_empty((problem.batch, heads, tokens), dtype=torch.float32)
        with problem.on_device():
            for turn in turns_of(problem):
                attend(best, turn, out[:, turn.queries], lse[:, :, turn.queries])
        return out, lse

    def attend(best: Choice, turn: Turn, out: torch.Tensor, lse: torch.Tensor) -> None:
        queries = q[:, turn.queries]
        count = queries.shape[1]
        lists = selecting_queries(
            bits[:, :, turn.queries], blocks, turn.first_pair, turn.pairs, problem.chunk
        )
        tiles = query_tiles(lists, best.tiles.block_m)
        part = q.new_empty((turn.pairs, count, blocks, head_dim))
        part_lse = lse.new_empty((turn.pairs, count, blocks))
        if best.variant == "gluon":
            gluon_forward.attend(
                queries, k, v, starts, lists, tiles, part, part_lse,
                first_pair=turn.first_pair, scale=scale, config=best.tiles,
            )  # fmt: skip
        else:
            forward_kernel[(min(_PROGRAMS, tiles.list.numel()),)](
                queries, k, v, problem.key_mask, part, part_lse,
                starts, lists.first, lists.query, lists.earlier, tiles.stop, tiles.list,
                *queries.stride(), *k.stride(), *v.stride(), *problem.key_mask_strides,
                turn.first_pair, count, heads, blocks, lists.first.shape[-1] - 1,
                tiles.stop.numel(), scale or SMALLEST_SCALE,
                REST_N=max(min(32, best.tiles.block_n), best.tiles.block_n // 2),
                NEGATIVE_SCALE=scale < 0,
                **problem.constants(best.tiles),
            )  # fmt: skip
        programs = triton.cdiv(count, _JOINED)
        join_kernel[(turn.pairs * programs,)](
            part, part_lse, lists.selected, out, lse, *out.stride()[:3], *lse.stride()[:2],
            turn.first_pair, count, programs, heads, blocks,
            D=head_dim, BLOCK_D=problem.block_d, BLOCK_M=_JOINED,
        )  # fmt: skip

    def takes(variant: str) -> bool:
        return variant != "gluon" or gluon_forward.takes(problem, q, k, v, scale)

    return first_that_compiles("gather_forward", problem, takes, run, choice)
