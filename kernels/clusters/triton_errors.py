"""The sums over spans of keys in Triton: no score of a key reaches memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import float32_precision, on_device, padded_head_dim
from ..common.primitives import LOG2_E, load_tile, token_offsets
from ..common.tile_tables import Table, both, row_of
from .errors import SpanSums
from .triton_passes import split

_MAX_OFFSET = 2**31 - 1
# Rows, the most keys of a span, warps, stages. Chosen by the machine code for sm_80 to sm_100.
_TILES: Table = {64: both(64, 64, 4, 2), 128: both(64, 64, 4, 2), 256: both(32, 16, 2, 2)}
_FLOAT32: Table = {64: both(32, 32, 4, 1), 128: both(32, 32, 4, 1), 256: both(16, 16, 4, 1)}


@triton.jit(do_not_specialize=["rows", "spans", "clusters", "s_part"])
def span_sums_kernel(
    p_parts, p_scale, p_k, p_v, p_mean, p_cluster, p_held, p_highest, p_squares, p_products,
    s_kb, s_kt, s_kh, s_kd, s_vb, s_vt, s_vh, s_vd, s_part,
    rows, spans, clusters, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr, SPANS_OF_TILE: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums over a span for all rows."""
    i_span = tl.program_id(0) % spans
    i_bh = tl.program_id(0) // spans
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    i_bh = i_bh.to(tl.int64)
    o_n = token_offsets(BLOCK_N, WIDE)
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    i_tile = i_bh * (spans // SPANS_OF_TILE) + i_span // SPANS_OF_TILE
    held = tl.load(p_held + i_tile) - i_span % SPANS_OF_TILE * SPAN
    i_cluster = tl.minimum(tl.load(p_cluster + i_tile), clusters - 1)
    m_n = (o_n < held) & (o_n < SPAN)
    start = i_span.to(tl.int64) * SPAN
    p_k += i_b * s_kb + i_h * s_kh + start * s_kt
    p_v += i_b * s_vb + i_h * s_vh + start * s_vt
    b_k = load_tile(p_k, s_kt, s_kd, o_n, m_n, True, D, BLOCK_D)  # (BLOCK_N, BLOCK_D)
    b_v = load_tile(p_v, s_vt, s_vd, o_n, m_n, True, D, BLOCK_D).to(tl.float32)
    p_own = p_mean + (i_bh * clusters + i_cluster) * D
    b_mean = tl.load(p_own + o_d, mask=o_d < D, other=0.0)  # (BLOCK_D,)
    b_square = tl.sum(b_v * b_v, 1)  # (BLOCK_N,)
    b_product = tl.sum(b_v * b_mean[None, :], 1)  # (BLOCK_N,)
    p_parts += i_bh * rows * D
    p_scale += i_bh * rows
    for start_m in tl.range(0, rows, BLOCK_M):
        m_m = start_m + o_m < rows
        b_scale = tl.load(p_scale + start_m + o_m, mask=m_m, other=0.0) * (scale * LOG2_E)
        b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_part in tl.static_range(PARTS):
            # The smallest part first. b_c: (BLOCK_M, BLOCK_D)
            p_tile = p_parts + (PARTS - 1 - i_part) * s_part + start_m * D
            b_c = load_tile(p_tile, D, 1, o_m, m_m, True, D, BLOCK_D)
            b_s = tl.dot(b_c, tl.trans(b_k), b_s, input_precision=PRECISION)
        b_s = tl.where(m_n[None, :], b_s * b_scale[:, None], float("-inf"))  # (BLOCK_M, BLOCK_N)
        b_top = tl.max(b_s, 1)  # (BLOCK_M,)
        b_p = tl.exp2(b_s - tl.where(b_top == float("-inf"), 0.0, b_top)[:, None])
        p_out = (i_bh * spans + i_span) * rows + start_m + o_m  # (BLOCK_M,)
        tl.store(p_highest + p_out, b_top / LOG2_E, mask=m_m)
        tl.store(p_squares + p_out, tl.sum(b_p * b_p * b_square[None, :], 1), mask=m_m)
        tl.store(p_products + p_out, tl.sum(b_p * b_product[None, :], 1), mask=m_m)


def span_sums(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mean_value: torch.Tensor,
    cluster: torch.Tensor,
    held: torch.Tensor,
    scale: float,
) -> SpanSums:
    """The sums over spans; arguments as of `errors.span_sums`."""
    batch, places, heads, head_dim = key.shape
    count, tile = rows.shape[2], places // held.shape[2]
    parts, scales, _ = split(rows, key.dtype)
    block_d = padded_head_dim(head_dim)
    tiles, _ = row_of(_FLOAT32 if key.dtype == torch.float32 else _TILES, block_d)
    # The longest span that divides a tile.
    span = min(tiles.block_n, tile & -tile)
    spans = places // span
    sums = torch.empty(3, batch, heads, spans, count, dtype=torch.float32, device=key.device)
    with on_device(key.device):
        span_sums_kernel[(batch * heads * spans,)](
            parts, scales, key, value, mean_value.contiguous(),
            cluster.contiguous(), held.contiguous(), *sums,
            *key.stride(), *value.stride(), parts.stride(0),
            count, spans, mean_value.shape[2], heads, scale,
            D=head_dim, BLOCK_D=block_d, BLOCK_M=tiles.block_m, SPAN=span,
            BLOCK_N=max(16, span), SPANS_OF_TILE=tile // span,
            WIDE=span * max(abs(key.stride(1)), abs(value.stride(1))) > _MAX_OFFSET,
            PARTS=parts.shape[0], PRECISION=float32_precision(),
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return SpanSums(*sums.mT)
