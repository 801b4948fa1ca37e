"""The best entries of each row of scores, by a threshold that is found in registers.

The result is that of `diffattn.routing.choosing.choose` for the same scores, bit for bit: scores
become fixed-point numbers of 24 bits in the same float32 arithmetic. Of equal numbers the first
entries are taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import on_device
from .rows import warps_for

BITS = tl.constexpr(24)
# Scores that differ by less, relative to the largest, are equal up to rounding.
SMALLEST_SPREAD = tl.constexpr(1e-5)
LARGEST = tl.constexpr(3.4028234663852886e38)


_NUMBERS = [
    "s_sb", "s_sh", "s_sr", "s_cb", "s_ch", "s_cr", "heads", "rows", "columns", "most",
]  # fmt: skip


# Sizes differ from call to call: a kernel for each would be compiled too often.
@triton.jit(do_not_specialize=_NUMBERS)
def best_kernel(
    p_scores, p_candidates, p_counts, p_best, s_sb, s_sh, s_sr, s_sc, s_cb, s_ch, s_cr, s_cc,
    heads, rows, columns, most,
    HAS_CANDIDATES: tl.constexpr, HAS_COUNTS: tl.constexpr, RULED_OUT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whether each entry of a row is among the best."""
    i_r = tl.program_id(0)
    i_h = tl.program_id(1) % heads
    i_b = tl.program_id(1) // heads
    i_row = tl.program_id(1).to(tl.int64) * rows + i_r
    p_scores += i_b.to(tl.int64) * s_sb + i_h.to(tl.int64) * s_sh + i_r.to(tl.int64) * s_sr
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    b_score = tl.load(p_scores + o_c.to(tl.int64) * s_sc, mask=m_c, other=0.0)  # (BLOCK_C,)
    m_ranked = m_c
    if HAS_CANDIDATES:
        p_candidates += i_b.to(tl.int64) * s_cb + i_h.to(tl.int64) * s_ch
        p_candidates += i_r.to(tl.int64) * s_cr
        m_ranked &= tl.load(p_candidates + o_c.to(tl.int64) * s_cc, mask=m_c, other=0) != 0
    if RULED_OUT:
        m_ranked &= b_score > -float("inf")  # false for NaN, too
        b_score = tl.minimum(b_score, LARGEST)
    low = tl.min(tl.where(m_ranked, b_score, float("inf")), 0)
    high = tl.max(tl.where(m_ranked, b_score, -float("inf")), 0)
    is_nan = tl.max((m_ranked & (b_score != b_score)).to(tl.int32), 0)
    spread = tl.where(is_nan > 0, 0.0, high - low)
    differ = spread > SMALLEST_SPREAD * tl.maximum(tl.abs(low), tl.abs(high))
    factor = tl.div_rn(tl.full((), 16777215.0, tl.float32), tl.where(differ, spread, 1.0))
    b_point = (tl.where(m_ranked, b_score, low) - low) * factor
    b_point = tl.where(differ, b_point, 0.0)  # (BLOCK_C,)
    # Rounded to the nearest integer, and halves to the even one, as torch rounds.
    b_floor = tl.floor(b_point)
    b_rest = b_point - b_floor
    b_int = b_floor.to(tl.int32)
    b_up = (b_rest > 0.5) | ((b_rest == 0.5) & ((b_int & 1) == 1))
    b_int = tl.minimum(b_int + b_up.to(tl.int32), 16777215)
    b_int = tl.where(m_ranked, b_int, -1)
    need = most
    if HAS_COUNTS:
        need = tl.load(p_counts + i_r)
    # The highest number that enough entries reach; 0 if there are not enough.
    last = 0
    for bit in tl.static_range(BITS):
        higher = last + (1 << (23 - bit))
        reach = tl.sum((b_int >= higher).to(tl.int32), 0)
        last = tl.where(reach >= need, higher, last)
    b_above = b_int > last
    b_tied = (b_int == last).to(tl.int32)
    left = need - tl.sum(b_above.to(tl.int32), 0)
    b_best = b_above | ((b_tied != 0) & (tl.cumsum(b_tied, 0) <= left))
    tl.store(p_best + i_row * columns + o_c, b_best.to(tl.uint8), mask=m_c)


def best_of_rows(
    scores: torch.Tensor,
    count: int | torch.Tensor,
    candidates: torch.Tensor | None = None,
    *,
    ruled_out: bool = False,
) -> torch.Tensor:
    """The best candidates of each row; of equal scores the first.

    Args:
        scores: float32 `(batch, heads, rows, columns)`, of any strides; at most `MOST_COLUMNS`.
        count: entries to keep in a row; or int32 `(rows,)`, their number for each row. A row with
            fewer candidates keeps all of them.
        candidates: bool, broadcastable to `scores`; None if every entry is a candidate.
        ruled_out: whether entries of -inf and NaN are no candidates.

    Returns:
        bool, in the shape of `scores`.
    """
    batch, heads, rows, columns = scores.shape
    best = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    of_candidates, strides = scores, (0, 0, 0, 0)
    if candidates is not None:
        of_candidates = candidates.expand(scores.shape)
        strides = of_candidates.stride()
        of_candidates = of_candidates.view(torch.uint8)
    by_row = isinstance(count, torch.Tensor)
    with on_device(scores.device):
        best_kernel[(rows, batch * heads)](
            scores, of_candidates, count if by_row else scores, best.view(torch.uint8),
            *scores.stride(), *strides, heads, rows, columns, 0 if by_row else count,
            HAS_CANDIDATES=candidates is not None, HAS_COUNTS=by_row, RULED_OUT=ruled_out,
            BLOCK_C=triton.next_power_of_2(columns), num_warps=warps_for(columns),
            # A product that is rounded once less would not give the numbers of other devices.
            enable_fp_fusion=False,
        )  # fmt: skip
    return best
