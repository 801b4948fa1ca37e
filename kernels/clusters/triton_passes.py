"""The passes of k-means in Triton: no distance and no float32 copy of a token reaches memory.

Products are of tokens in their own dtype, with sums in float32. A float32 centroid is three such
numbers for 16-bit tokens: together they have its 24 bits, and products of 16-bit numbers are exact
in float32. Tokens, and what was kept in their dtype, are one such number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..common.launch import float32_precision, on_device, padded_head_dim
from ..common.primitives import load_tile, token_offsets
from ..common.tile_tables import Table, both, row_of

# The largest offset from the first token of a tile that 32 bits hold.
_MAX_OFFSET = 2**31 - 1
# 16-bit numbers that have the 24 bits of a float32 together.
_PARTS = 3
# Tokens, clusters, warps, stages. Chosen by the machine code for sm_80, sm_90 and sm_100.
_TILES: Table = {64: both(128, 32, 8, 2), 128: both(128, 32, 8, 2), 256: both(64, 32, 4, 2)}
_FLOAT32: Table = {64: both(32, 32, 4, 2), 128: both(32, 32, 4, 2), 256: both(32, 32, 8, 1)}
# Centroids of a program that splits, and tokens of those that sum and look for the largest one.
_SPLIT = 16
_SUMMED = 32
_LOOKED_AT = 64
_WARPS = 4


@triton.jit
def load_points(
    p_x, p_counted, i_b, i_h, start, tokens, s_xb, s_xt, s_xh, s_xd, s_mb, s_mt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_COUNTED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Tokens from `start` as (BLOCK_T, BLOCK_D), and whether each is there and counts.

    What is not there, does not count, or is not finite is read as 0.
    """
    o_t = token_offsets(BLOCK_T, WIDE)
    m_t = start + o_t < tokens
    if HAS_COUNTED:
        p_tile = p_counted + i_b * s_mb + (start + o_t).to(tl.int64) * s_mt
        m_t = tl.load(p_tile, mask=m_t, other=0) != 0  # (BLOCK_T,)
    p_x += i_b * s_xb + i_h * s_xh + start.to(tl.int64) * s_xt
    b_x = load_tile(p_x, s_xt, s_xd, o_t, m_t, True, D, BLOCK_D)  # (BLOCK_T, BLOCK_D)
    m_finite = tl.abs(b_x.to(tl.float32)) < float("inf")  # false for NaN
    return tl.where(m_finite, b_x, tl.zeros_like(b_x)), m_t


@triton.jit(do_not_specialize=["tokens"])
def largest_kernel(
    p_x, p_counted, p_largest, s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_COUNTED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The largest absolute coordinate of a head, as the bits of a float32."""
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    b_x, _ = load_points(
        p_x, p_counted, i_b, i_h, tl.program_id(0) % tiles * BLOCK_T, tokens,
        s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, D, BLOCK_D, BLOCK_T, HAS_COUNTED, WIDE,
    )  # fmt: skip
    largest = tl.max(tl.max(tl.abs(b_x.to(tl.float32)), 1), 0)
    # The bits of numbers that are not negative are in the order of the numbers.
    tl.atomic_max(p_largest + i_bh, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def split_kernel(
    p_centroids, p_parts, p_scale, p_half, rows, s_part,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write centroids as sums of PARTS numbers times a power of 2, and half of their squared norms.

    The power of 2, one for each centroid, keeps parts of float16 in the range of float16.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    m_c = o_c < rows
    m_tile = m_c[:, None] & (o_d < D)[None, :]
    p_tile = o_c[:, None].to(tl.int64) * D + o_d[None, :]
    # b_c: (BLOCK_C, BLOCK_D)
    b_c = tl.load(p_centroids + p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_half = tl.sum(b_c * b_c, 1) / 2  # (BLOCK_C,)
    b_bits = tl.max(tl.abs(b_c), 1).to(tl.int32, bitcast=True) & 0x7F800000  # the exponent alone
    b_bits = tl.where(b_bits == 0, 0x3F800000, b_bits)  # of 0: the scale 1
    b_scale = b_bits.to(tl.float32, bitcast=True)  # (BLOCK_C,)
    b_rest = b_c * (0x7F000000 - b_bits).to(tl.float32, bitcast=True)[:, None]
    for i_part in tl.static_range(PARTS):
        b_part = b_rest.to(p_parts.dtype.element_ty)
        b_rest -= b_part.to(tl.float32)
        tl.store(p_parts + i_part * s_part + p_tile, b_part, mask=m_tile)
    tl.store(p_scale + o_c, b_scale, mask=m_c)
    tl.store(p_half + o_c, b_half, mask=m_c)


@triton.jit(do_not_specialize=["tokens", "clusters"])
def nearest_kernel(
    p_x, p_counted, p_parts, p_scale, p_half, p_labels,
    s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, s_part, tokens, clusters, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    HAS_COUNTED: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The labels of a tile of tokens."""
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_T
    b_x, _ = load_points(
        p_x, p_counted, i_b, i_h, start, tokens,
        s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, D, BLOCK_D, BLOCK_T, HAS_COUNTED, WIDE,
    )  # fmt: skip
    p_parts += i_bh.to(tl.int64) * clusters * D
    p_scale += i_bh.to(tl.int64) * clusters
    p_half += i_bh.to(tl.int64) * clusters
    o_c = tl.arange(0, BLOCK_C)
    # The best of every BLOCK_C-th centroid: the columns are compared with each other at the end.
    b_best = tl.full((BLOCK_T, BLOCK_C), float("-inf"), tl.float32)
    b_first = tl.zeros((BLOCK_T, BLOCK_C), tl.int32)
    for start_c in tl.range(0, clusters, BLOCK_C):
        m_c = start_c + o_c < clusters
        b_half = tl.load(p_half + start_c + o_c, mask=m_c, other=float("inf"))  # (BLOCK_C,)
        b_scale = tl.load(p_scale + start_c + o_c, mask=m_c, other=0.0)  # (BLOCK_C,)
        b_s = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for i_part in tl.static_range(PARTS):
            # The smallest part first. b_c: (BLOCK_C, BLOCK_D)
            p_tile = p_parts + (PARTS - 1 - i_part) * s_part + start_c * D
            b_c = load_tile(p_tile, D, 1, o_c, m_c, True, D, BLOCK_D)
            b_s = tl.dot(b_x, tl.trans(b_c), b_s, input_precision=PRECISION)
        b_s = b_s * b_scale[None, :] - b_half[None, :]  # (BLOCK_T, BLOCK_C)
        m_better = b_s > b_best
        b_best = tl.where(m_better, b_s, b_best)
        b_first = tl.where(m_better, start_c, b_first)
    b_top = tl.max(b_best, 1)  # (BLOCK_T,)
    b_label = b_first + o_c[None, :]  # (BLOCK_T, BLOCK_C)
    # Where the distances overflow, no score may equal the highest.
    b_label = tl.min(tl.where(b_best == b_top[:, None], b_label, clusters - 1), 1)
    b_label = tl.minimum(b_label, clusters - 1)
    o_t = start + tl.arange(0, BLOCK_T)
    p_labels += i_bh.to(tl.int64) * tokens
    tl.store(p_labels + o_t, b_label.to(tl.int64), mask=o_t < tokens)


@triton.jit(do_not_specialize=["tokens", "clusters"])
def sums_kernel(
    p_x, p_counted, p_labels, p_factor, p_sums, p_sizes,
    s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, tokens, clusters, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_COUNTED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add a tile of tokens, in fixed-point numbers, to the sums of their clusters."""
    tiles = tl.cdiv(tokens, BLOCK_T)
    i_bh = tl.program_id(0) // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_T
    b_x, m_t = load_points(
        p_x, p_counted, i_b, i_h, start, tokens,
        s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, D, BLOCK_D, BLOCK_T, HAS_COUNTED, WIDE,
    )  # fmt: skip
    o_t = start + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    p_labels += i_bh.to(tl.int64) * tokens
    b_slot = tl.load(p_labels + o_t, mask=m_t, other=0)  # (BLOCK_T,)
    b_slot += i_bh.to(tl.int64) * clusters
    b_fixed = b_x.to(tl.float32) * tl.load(p_factor + i_bh)  # (BLOCK_T, BLOCK_D)
    # Adding 2**23 rounds to a whole number, to the even one of two; beyond, all numbers are whole.
    b_large = tl.where(b_fixed < 0, -8388608.0, 8388608.0)
    b_whole = (b_fixed + b_large) - b_large
    b_fixed = tl.where(tl.abs(b_fixed) < 8388608.0, b_whole, b_fixed).to(tl.int64)
    p_tile = p_sums + b_slot[:, None] * D + o_d[None, :]
    tl.atomic_add(p_tile, b_fixed, mask=m_t[:, None] & (o_d < D)[None, :], sem="relaxed")
    b_one = tl.full((BLOCK_T,), 1, tl.int64)
    tl.atomic_add(p_sizes + b_slot, b_one, mask=m_t, sem="relaxed")


@dataclass(frozen=True)
class TritonPasses:
    """The passes over tokens on a GPU; see `Passes`.

    Attributes:
        x: (batch, tokens, heads, head_dim), of any strides.
        counted: bool (batch, tokens), False for tokens that do not count; None if all count.
    """

    x: torch.Tensor
    counted: torch.Tensor | None

    def largest(self) -> torch.Tensor:
        batch, tokens, heads, _ = self.x.shape
        bits = torch.zeros(batch, heads, dtype=torch.int32, device=self.x.device)
        with on_device(self.x.device):
            largest_kernel[(batch * heads * triton.cdiv(tokens, _LOOKED_AT),)](
                *self._tokens, bits, *self._strides, tokens, heads,
                **self._constants(_LOOKED_AT), num_warps=_WARPS,
            )  # fmt: skip
        return bits.view(torch.float32)

    def nearest(self, centroids: torch.Tensor) -> torch.Tensor:
        batch, tokens, heads, head_dim = self.x.shape
        clusters = centroids.shape[2]
        parts, scale, half = split(centroids, self.x.dtype)
        labels = torch.empty(batch, heads, tokens, dtype=torch.int64, device=self.x.device)
        table = _FLOAT32 if self.x.dtype == torch.float32 else _TILES
        tiles, _ = row_of(table, padded_head_dim(head_dim))
        with on_device(self.x.device):
            nearest_kernel[(batch * heads * triton.cdiv(tokens, tiles.block_m),)](
                *self._tokens, parts, scale, half, labels, *self._strides,
                parts.stride(0), tokens, clusters, heads,
                BLOCK_C=tiles.block_n, PARTS=parts.shape[0], PRECISION=float32_precision(),
                **self._constants(tiles.block_m),
                num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
        return labels

    def sums(
        self, labels: torch.Tensor, clusters: int, factor: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tokens, heads, head_dim = self.x.shape
        sums = labels.new_zeros(batch, heads, clusters, head_dim)
        sizes = labels.new_zeros(batch, heads, clusters)
        with on_device(self.x.device):
            sums_kernel[(batch * heads * triton.cdiv(tokens, _SUMMED),)](
                *self._tokens, labels.contiguous(), factor.contiguous(), sums, sizes,
                *self._strides, tokens, clusters, heads,
                **self._constants(_SUMMED), num_warps=_WARPS,
            )  # fmt: skip
        return sums, sizes

    @property
    def _tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Without a mask there must be a pointer all the same, which nothing follows.
        return self.x, self.x if self.counted is None else self.counted.view(torch.int8)

    @property
    def _strides(self) -> tuple[int, ...]:
        return *self.x.stride(), *((0, 0) if self.counted is None else self.counted.stride())

    def _constants(self, block_t: int) -> dict[str, Any]:
        head_dim = self.x.shape[3]
        return {
            "D": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_T": block_t,
            "HAS_COUNTED": self.counted is not None,
            "WIDE": block_t * abs(self.x.stride(1)) > _MAX_OFFSET,
        }


def split(centroids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Centroids as sums of numbers of a dtype: what `split_kernel` writes, as its arguments.

    Args:
        centroids: (batch, heads, clusters, head_dim), in float32 or in the dtype.
        dtype: of the parts.
    """
    count = 1 if centroids.dtype == dtype else _PARTS
    parts = torch.empty(count, *centroids.shape, dtype=dtype, device=centroids.device)
    scale, half = torch.empty(2, *centroids.shape[:3], dtype=torch.float32, device=centroids.device)
    head_dim, rows = centroids.shape[3], scale.numel()
    with on_device(centroids.device):
        split_kernel[(triton.cdiv(rows, _SPLIT),)](
            centroids.contiguous(), parts, scale, half, rows, parts.stride(0),
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_C=_SPLIT, PARTS=count,
            num_warps=_WARPS,
        )  # fmt: skip
    return parts, scale, half
