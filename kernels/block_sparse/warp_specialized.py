"""A forward kernel for Hopper GPUs whose compiler decides which warps fetch and which multiply."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..common.primitives import LN_2, LOG2_E, tile_of_program
from ..common.softmax import weigh
from ..common.tile_tables import TileConfig
from .launch import Problem
from .walk import cached_rows


@triton.jit
def _head_tiles(p_x, tokens, s_t, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Descriptor of one head: tiles (BLOCK_T, BLOCK_D) read as 0 past `tokens` and past D."""
    return tl.make_tensor_descriptor(
        p_x, shape=[tokens, D], strides=[s_t, 1], block_shape=[BLOCK_T, BLOCK_D]
    )


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap"])
def warp_specialized_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_order, p_full_count, p_full_index,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SHORT: tl.constexpr,
):  # fmt: skip
    """Attention to full blocks: one warp group fetches tiles while two others multiply them.

    The compiler accepts one loop, in which no fetch depends on an earlier step. So there is no
    second loop for tiles with a mask, no index is loaded a step early, and with HAS_SHORT every
    tile is masked. The compiler accepts no descriptors made by the host.
    """
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    i_tile, i_b, i_h, i_layout = tile_of_program(rows * TILES_M, heads, s_layout_b, s_layout_h)
    i_row = tl.load(p_order + i_layout * rows + i_tile // TILES_M)
    i_list = i_layout * rows + i_row
    start_m = i_row * BLOCK_Q + (i_tile % TILES_M) * BLOCK_M
    p_full_index += i_list.to(tl.int64) * full_cap
    n_tiles = tl.load(p_full_count + i_list) * TILES_N

    queries = _head_tiles(p_q + i_b * s_qb + i_h * s_qh, tokens_q, s_qt, D, BLOCK_M, BLOCK_D)
    keys = _head_tiles(p_k + i_b * s_kb + i_h * s_kh, tokens_kv, s_kt, D, BLOCK_N, BLOCK_D)
    values = _head_tiles(p_v + i_b * s_vb + i_h * s_vh, tokens_kv, s_vt, D, BLOCK_N, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    scale *= LOG2_E
    b_q = queries.load([start_m, 0])  # (BLOCK_M, BLOCK_D)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.range(0, n_tiles, warp_specialize=True):
        start_n = tl.load(p_full_index + i // TILES_N) * BLOCK_KV + (i % TILES_N) * BLOCK_N
        b_s = tl.dot(b_q, tl.trans(keys.load([start_n, 0])))  # (BLOCK_M, BLOCK_N)
        if HAS_SHORT:
            b_s = tl.where((o_n < tokens_kv - start_n)[None, :], b_s, float("-inf"))
        # The first tile of a block holds at least one key: no maximum is -inf after it.
        b_p, b_max, b_old = weigh(b_s, b_max, scale, True, False)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_v = values.load([start_n, 0])  # (BLOCK_N, BLOCK_D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None])  # (BLOCK_M, BLOCK_D)

    b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
    p_out += (i_b * tokens_q * heads + i_h) * D
    outs = _head_tiles(p_out, tokens_q, heads * D, D, BLOCK_M, BLOCK_D)
    outs.store([start_m, 0], (b_acc / b_norm[:, None]).to(p_out.dtype.element_ty))
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_lse = (b_max + tl.log2(b_norm)) * LN_2
    tl.store(p_lse + (i_b * heads + i_h) * tokens_q + o_m, b_lse, mask=o_m < tokens_q)


def takes(problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `forward` takes a call: full blocks only, no key mask, tensors that TMA can fetch."""
    return (
        not problem.has_partial
        and not problem.has_key_mask
        and problem.block_q >= 128
        and problem.scale > 0
        and problem.head_dim % 8 == 0  # heads of the output begin at aligned addresses
        and problem.tma_takes(q, k, v)
    )


def forward(
    problem: Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: TileConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp, for calls that this module `takes`.

    Args:
        config: tiles; the compiler makes 12 of 4 warps: 4 fetch, and two groups of 4 multiply.
    """
    batch, tokens_q, heads, head_dim = q.shape
    tokens_kv = k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    rows = cached_rows(problem.layout, tokens_kv, problem.block_kv)
    n_rows = rows.order.shape[-1]
    programs = batch * heads * n_rows * (problem.block_q // config.block_m)
    with problem.on_device():
        _with_scratch(
            lambda: warp_specialized_kernel[(programs,)](
                q, k, v, out, lse, rows.order, *problem.lists[:2],
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *problem.layout_strides,
                tokens_q, tokens_kv, heads, n_rows, problem.layout[1].shape[-1], problem.scale,
                D=head_dim, BLOCK_D=problem.block_d,
                BLOCK_Q=problem.block_q, BLOCK_KV=problem.block_kv,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                HAS_SHORT=tokens_kv % problem.block_kv != 0,
                num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            )
        )  # fmt: skip
    return out, lse


def _with_scratch(launch: Callable[[], object]) -> None:
    """Launch a kernel that makes descriptors, for which Triton asks its allocator for memory.

    The allocator is set in a copy of the context: an allocator of the caller's stays in place, and
    a thread of autograd, which does not inherit the caller's context, has an allocator too.
    """

    def with_allocator() -> None:
        triton.set_allocator(_allocate)
        launch()

    contextvars.copy_context().run(with_allocator)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    # Torch's allocator aligns more than Triton asks for, is safe in CUDA graphs, and works on the
    # current stream, on which Triton launches.
    return torch.empty(size, dtype=torch.int8, device="cuda")
