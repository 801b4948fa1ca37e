"""The forward kernel for Hopper GPUs: tiles are fetched by the chip's copy engine (TMA)."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..checks import LayoutTensors
from .configs import TileConfig
from .forward import attend_tile
from .launch import Problem
from .plan import cached_row_order
from .primitives import LN_2, LOG2_E, load_bits, row_lists, tile_of_program

_TMA_ALIGNMENT = 16  # bytes: of addresses and of every stride but the last
_MAX_TMA_STRIDE = 2**40  # bytes
_DTYPES = (torch.float16, torch.bfloat16)


@triton.jit
def _head_tiles(p_x, tokens, s_t, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Descriptor of one head: tiles (BLOCK_T, BLOCK_D) read as 0 past `tokens` and past D."""
    return tl.make_tensor_descriptor(
        p_x, shape=[tokens, D], strides=[s_t, 1], block_shape=[BLOCK_T, BLOCK_D]
    )


@triton.jit
def _store(p_out, p_lse, i_b, i_h, start_m, tokens_q, heads, b_acc, b_max, b_sum,
           D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    b_norm = tl.where(b_sum == 0, 1.0, b_sum)  # 0 where a query has seen nothing
    b_out = b_acc / b_norm[:, None]
    b_lse = (b_max + tl.log2(b_norm)) * LN_2
    p_out += (i_b * tokens_q * heads + i_h) * D
    outs = _head_tiles(p_out, tokens_q, heads * D, D, BLOCK_M, BLOCK_D)
    outs.store([start_m, 0], b_out.to(p_out.dtype.element_ty))
    o_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(p_lse + (i_b * heads + i_h) * tokens_q + o_m, b_lse, mask=o_m < tokens_q)


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap", "partial_cap"])
def tma_kernel(
    p_q, p_k, p_v, p_key_mask, p_out, p_lse,
    p_order, p_full_count, p_full_index, p_partial_count, p_partial_index, p_partial_mask,
    p_bit_masks,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_mb, s_mt, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, partial_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `forward.forward_kernel`, full and partial blocks in two loops."""
    TILES_M: tl.constexpr = BLOCK_Q // BLOCK_M
    TILES_N: tl.constexpr = BLOCK_KV // BLOCK_N
    WORDS: tl.constexpr = (BLOCK_KV + 31) // 32
    i_tile, i_b, i_h, i_layout = tile_of_program(rows * TILES_M, heads, s_layout_b, s_layout_h)
    i_row = tl.load(p_order + i_layout * rows + i_tile // TILES_M)
    i_list = i_layout * rows + i_row
    start_in_block = (i_tile % TILES_M) * BLOCK_M
    start_m = i_row * BLOCK_Q + start_in_block
    if start_m >= tokens_q:
        return

    queries = _head_tiles(p_q + i_b * s_qb + i_h * s_qh, tokens_q, s_qt, D, BLOCK_M, BLOCK_D)
    keys = _head_tiles(p_k + i_b * s_kb + i_h * s_kh, tokens_kv, s_kt, D, BLOCK_N, BLOCK_D)
    values = _head_tiles(p_v + i_b * s_vb + i_h * s_vh, tokens_kv, s_vt, D, BLOCK_N, BLOCK_D)
    p_key_mask += i_b * s_mb
    p_partial_index += i_list.to(tl.int64) * partial_cap
    p_partial_mask += i_list.to(tl.int64) * partial_cap
    o_n = tl.arange(0, BLOCK_N)
    scale *= LOG2_E
    b_q = queries.load([start_m, 0])
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)

    # Full blocks. An index loaded in the step that needs it would take one of the pipeline's stages
    # from keys and values: it is loaded one step early.
    p_full, n_full, n_partial, n_short = row_lists(
        p_full_count, p_full_index, p_partial_count, i_list, full_cap, tokens_kv, BLOCK_KV
    )
    i_block = tl.load(p_full, mask=n_full > 0, other=0)
    for i in tl.range(0, n_full * TILES_N):
        start_n = i_block * BLOCK_KV + (i % TILES_N) * BLOCK_N
        i_block = tl.load(p_full + tl.minimum((i + 1) // TILES_N, n_full - 1))
        b_k = keys.load([start_n, 0])
        b_v = values.load([start_n, 0])
        m_n = o_n < BLOCK_N
        if HAS_KEY_MASK:
            m_n = tl.load(p_key_mask + (start_n + o_n).to(tl.int64) * s_mt) != 0
            # A NaN left in padding must not reach a sum.
            b_v = tl.where(m_n[:, None], b_v, 0.0)
        b_acc, b_max, b_sum = attend_tile(
            b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_n[None, :], HAS_KEY_MASK, PRECISION
        )

    # Partial blocks, then the short full one.
    i_short = tokens_kv // BLOCK_KV
    i_block = tl.load(p_partial_index, mask=n_partial > 0, other=i_short)
    i_mask = tl.load(p_partial_mask, mask=n_partial > 0, other=0)
    for i in tl.range(0, (n_partial + n_short) * TILES_N):
        o_w = tl.arange(0, BLOCK_M)
        m_w = o_w < tl.where(i // TILES_N < n_partial, BLOCK_M, 0)
        start_in_kv = (i % TILES_N) * BLOCK_N
        start_n = i_block * BLOCK_KV + start_in_kv
        p_words = p_bit_masks + (i_mask.to(tl.int64) * BLOCK_Q + start_in_block) * WORDS
        m_s = load_bits(p_words, WORDS, o_w, m_w, start_in_kv, BLOCK_M, BLOCK_N, False)
        i_next = (i + 1) // TILES_N
        i_block = tl.load(p_partial_index + i_next, mask=i_next < n_partial, other=i_short)
        i_mask = tl.load(p_partial_mask + i_next, mask=i_next < n_partial, other=0)
        b_k = keys.load([start_n, 0])
        b_v = values.load([start_n, 0])
        m_n = start_n + o_n < tokens_kv
        if HAS_KEY_MASK:
            p_visible = p_key_mask + (start_n + o_n).to(tl.int64) * s_mt
            m_n = tl.load(p_visible, mask=m_n, other=0) != 0
            b_v = tl.where(m_n[:, None], b_v, 0.0)
        b_acc, b_max, b_sum = attend_tile(
            b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_s & m_n[None, :], True, PRECISION
        )
    _store(p_out, p_lse, i_b, i_h, start_m, tokens_q, heads, b_acc, b_max, b_sum,
           D, BLOCK_M, BLOCK_D)  # fmt: skip


@triton.jit(do_not_specialize=["tokens_q", "tokens_kv", "rows", "full_cap"])
def warp_specialized_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_order, p_full_count, p_full_index,
    s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_layout_b, s_layout_h,
    tokens_q, tokens_kv, heads, rows, full_cap, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SHORT: tl.constexpr,
):  # fmt: skip
    """Full blocks only: one warp group fetches tiles while two others multiply them.

    The compiler accepts one loop with nothing carried into the fetches: no second loop for what
    needs a mask, no index loaded a step early, and a short block is masked like all others.
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
    b_q = queries.load([start_m, 0])
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for i in tl.range(0, n_tiles, warp_specialize=True):
        start_n = tl.load(p_full_index + i // TILES_N) * BLOCK_KV + (i % TILES_N) * BLOCK_N
        b_s = tl.dot(b_q, tl.trans(keys.load([start_n, 0])))  # (BLOCK_M, BLOCK_N)
        if HAS_SHORT:
            b_s = tl.where((o_n < tokens_kv - start_n)[None, :], b_s, float("-inf"))
        # The first tile of a block holds at least one key: no maximum is -inf from there on.
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_old = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_v = values.load([start_n, 0])
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None])
        b_max = b_new
    _store(p_out, p_lse, i_b, i_h, start_m, tokens_q, heads, b_acc, b_max, b_sum,
           D, BLOCK_M, BLOCK_D)  # fmt: skip


def tma_takes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block_q: int, block_kv: int, scale: float
) -> bool:
    """Whether `forward_tma` can do a call: from strides, dtypes and addresses, without waiting."""
    return (
        q.dtype in _DTYPES
        and q.shape[-1] % 8 == 0  # heads of the output begin at aligned addresses
        and min(block_q, block_kv) >= 64
        and scale > 0
        and all(_describable(x) for x in (q, k, v))
    )


def warp_specialized_takes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
) -> bool:
    """Whether `forward_warp_specialized` can do a call: if it has full blocks only, for a start."""
    # A layout without bit masks has no partial blocks: its counts need not be looked at.
    return (
        layout[5].shape[0] == 0
        and key_mask is None
        and block_q >= 128
        and tma_takes(q, k, v, block_q=block_q, block_kv=block_kv, scale=scale)
    )


def _describable(x: torch.Tensor) -> bool:
    *strides, channel = x.stride()
    return (
        channel == 1
        and x.data_ptr() % _TMA_ALIGNMENT == 0
        and all(s * x.element_size() % _TMA_ALIGNMENT == 0 for s in strides)
        and 0 < strides[1] * x.element_size() < _MAX_TMA_STRIDE
    )


def tma_config(head_dim: int, block_q: int, block_kv: int) -> TileConfig:
    """Tiles of `forward_tma`.

    Where registers and shared memory allow it, two programs fit on a multiprocessor, so that one
    multiplies while the other works out its weights.
    """
    if block_q == 64:
        return TileConfig(64, 64 if head_dim <= 128 else 32, 4, 3 if head_dim <= 64 else 2)
    if head_dim <= 64:
        return TileConfig(128, 64, 4, 3)
    if head_dim <= 128:
        return TileConfig(128, 64, 8, 3)
    return TileConfig(128, 32, 8, 2)


def warp_specialized_config(head_dim: int, block_kv: int) -> TileConfig:
    """Tiles of `forward_warp_specialized`: 4 warps become 12, 4 that fetch and twice 4 that work.

    Queries, a pipeline of keys and values and the output fill a multiprocessor's shared memory.
    """
    if head_dim > 128:
        return TileConfig(128, 32, 4, 2)
    block_n = min(block_kv, 128)
    return TileConfig(128, block_n, 4, 2 if head_dim > 64 and block_n == 128 else 3)


def forward_tma(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward.forward`, for calls that `tma_takes`."""
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv)
    if config is None:
        config = tma_config(problem.head_dim, block_q, block_kv)
    batch, tokens_q, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    order = cached_row_order(layout)
    rows = order.shape[-1]
    constants = problem.constants(config)
    del constants["WIDE"]  # the copy engine's offsets are per token
    with problem.on_device():
        _with_scratch(
            lambda: tma_kernel[(batch * heads * rows * (block_q // config.block_m),)](
                q, k, v, problem.key_mask, out, lse, order, *problem.layout,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *problem.key_mask_strides,
                *problem.layout_strides,
                tokens_q, k.shape[1], heads, rows, layout[1].shape[-1], layout[3].shape[-1], scale,
                **constants,
            )
        )  # fmt: skip
    return out, lse


def forward_warp_specialized(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: LayoutTensors,
    key_mask: torch.Tensor | None,
    *,
    block_q: int,
    block_kv: int,
    scale: float,
    config: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward.forward`, for calls that `warp_specialized_takes`."""
    problem = Problem.of(q, k, v, layout, key_mask, block_q, block_kv)
    if config is None:
        config = warp_specialized_config(problem.head_dim, block_kv)
    batch, tokens_q, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, heads, tokens_q), dtype=torch.float32)
    order = cached_row_order(layout)
    rows = order.shape[-1]
    constants = problem.constants(config)
    for unused in ("WIDE", "HAS_KEY_MASK", "PRECISION"):
        del constants[unused]
    with problem.on_device():
        _with_scratch(
            lambda: warp_specialized_kernel[(batch * heads * rows * (block_q // config.block_m),)](
                q, k, v, out, lse, order, *problem.layout[:2],
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *problem.layout_strides,
                tokens_q, k.shape[1], heads, rows, layout[1].shape[-1], scale,
                HAS_SHORT=k.shape[1] % block_kv != 0,
                **constants,
            )
        )  # fmt: skip
    return out, lse


def _with_scratch(launch: Callable[[], object]) -> None:
    """Launch a kernel that makes descriptors: Triton asks its allocator for memory for them.

    The allocator is set in a copy of the context, so that one set by somebody else stays theirs.
    """

    def with_allocator() -> None:
        triton.set_allocator(_allocate)
        launch()

    contextvars.copy_context().run(with_allocator)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    # Torch's allocator aligns further, is safe in CUDA graphs, and works on the current stream,
    # which is where Triton launches.
    return torch.empty(size, dtype=torch.int8, device="cuda")
