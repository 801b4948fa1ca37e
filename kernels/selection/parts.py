"""Scores of block pairs by the means of their parts: no score of a pair of parts reaches memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import float32_precision, is_hopper, on_device, padded_head_dim
from ..common.primitives import LN_2, LOG2_E


def _tile(x: torch.Tensor, dtype: torch.dtype, block_d: int) -> tuple[int, int, int]:
    """Query blocks and key blocks of a program, and its warps: as few as have enough registers."""
    if dtype == torch.float32:  # products in full keep both operands in registers
        return 32, 32, 4
    # Hopper's products read their operands from shared memory.
    return 64, 64, 4 if block_d <= 128 and is_hopper(x.device) else 8


@triton.jit(do_not_specialize=["rows", "columns", "heads", "scale"])
def parts_kernel(
    p_q, p_k, p_has_q, p_has_k, p_out, rows, columns, heads, scale,
    PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp over all pairs of parts, for a tile of block pairs of one head."""
    i_b = (tl.program_id(2) // heads).to(tl.int64)
    i_h = tl.program_id(2) % heads
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < rows, o_c < columns
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_q += (i_b * rows * PARTS_Q * heads + i_h) * D
    p_k += (i_b * columns * PARTS_K * heads + i_h) * D
    p_has_q += i_b * rows * PARTS_Q
    p_has_k += i_b * columns * PARTS_K
    factor = scale * LOG2_E
    b_max = tl.full((BLOCK_R, BLOCK_C), -float("inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for i_q in range(PARTS_Q):
        o_q = o_r * PARTS_Q + i_q
        m_q = tl.load(p_has_q + o_q, mask=m_r, other=0) != 0
        p_tile = p_q + o_q.to(tl.int64)[:, None] * (heads * D) + o_d[None, :]
        b_q = tl.load(p_tile, mask=m_q[:, None] & m_d[None, :], other=0.0)  # (BLOCK_R, BLOCK_D)
        for i_k in range(PARTS_K):
            o_k = o_c * PARTS_K + i_k
            m_k = tl.load(p_has_k + o_k, mask=m_c, other=0) != 0
            p_tile = p_k + o_k.to(tl.int64)[:, None] * (heads * D) + o_d[None, :]
            # b_k: (BLOCK_C, BLOCK_D)
            b_k = tl.load(p_tile, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_pair = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_R, BLOCK_C)
            b_pair = tl.where(m_q[:, None] & m_k[None, :], b_pair * factor, -float("inf"))
            b_new = tl.maximum(b_max, b_pair)
            b_from = tl.where(b_new == -float("inf"), 0.0, b_new)
            b_sum = b_sum * tl.exp2(b_max - b_from) + tl.exp2(b_pair - b_from)
            b_max = b_new
    b_out = tl.where(b_sum > 0, (b_max + tl.log2(b_sum)) * LN_2, b_max)
    p_out += tl.program_id(2).to(tl.int64) * rows * columns
    p_out += o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
    tl.store(p_out, b_out, mask=m_r[:, None] & m_c[None, :])


def scores_of_parts(
    of_query: torch.Tensor,
    of_key: torch.Tensor,
    has_query: torch.Tensor,
    has_key: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The logarithm of the sum of exp(score) over all pairs of parts of two blocks.

    Args:
        of_query: float32 `(batch, query blocks, parts, heads, head_dim)`, the means of parts.
        of_key: the same of keys; the number of parts may be another.
        has_query, has_key: bool `(batch, blocks, parts)`, False for a part that is left out.
        scale: factor of the products.
        dtype: of the tokens. Products are in TF32 if the tokens are of 16 bits: means of a few
            tokens are known to no more digits.

    Returns:
        float32 `(batch, heads, query blocks, key blocks)`; -inf for a block without parts.
    """
    batch, rows, parts_q, heads, dim = of_query.shape
    columns, parts_k = of_key.shape[1:3]
    out = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=of_query.device)
    block_r, block_c, warps = _tile(of_query, dtype, padded_head_dim(dim))
    grid = (triton.cdiv(columns, block_c), triton.cdiv(rows, block_r), batch * heads)
    with on_device(of_query.device):
        parts_kernel[grid](
            of_query.contiguous(), of_key.contiguous(),
            has_query.contiguous().view(torch.uint8), has_key.contiguous().view(torch.uint8), out,
            rows, columns, heads, scale,
            PARTS_Q=parts_q, PARTS_K=parts_k, D=dim, BLOCK_D=padded_head_dim(dim),
            BLOCK_R=block_r, BLOCK_C=block_c,
            PRECISION=float32_precision() if dtype == torch.float32 else "tf32",
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out
