"""Two numbers per query that the backward kernels read, from one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import on_device, padded_head_dim
from .launching import launch
from .primitives import LOG2_E, load_tile, tile_of_program, token_offsets

# Queries per program, which only streams through memory.
_TILE = 64


@dataclass(frozen=True)
class RowSums:
    """Two numbers per query, padded to whole blocks so that kernels read them without a mask.

    Attributes:
        delta: float32 `(batch, heads, padded tokens)`, sum(out * grad_out) - grad_lse; 0 where a
            query sees nothing and past the end.
        log2_lse: float32 like `delta`, the LSE to base 2; inf where a query sees nothing and past
            the end, so that weights exp2(s - inf) are 0.
    """

    delta: torch.Tensor
    log2_lse: torch.Tensor

    @property
    def tokens(self) -> int:
        """Queries per head, padded."""
        return self.delta.shape[-1]


@triton.jit(do_not_specialize=["tokens_q", "tokens_padded"])
def row_sums_kernel(
    p_out, p_grad_out, p_lse, p_grad_lse, p_delta, p_log2_lse,
    s_ob, s_ot, s_oh, s_od, s_gb, s_gt, s_gh, s_gd, s_lb, s_lh, s_lt, s_nb, s_nh, s_nt,
    tokens_q, tokens_padded, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Delta and base-2 LSE of a tile of queries."""
    i_tile, i_b, i_h, _ = tile_of_program(tl.cdiv(tokens_padded, BLOCK_M), heads, 0, 0)
    start_m = i_tile.to(tl.int64) * BLOCK_M
    o_m = token_offsets(BLOCK_M, WIDE)
    m_m = start_m + o_m < tokens_q
    p_out += i_b * s_ob + i_h * s_oh + start_m * s_ot
    p_grad_out += i_b * s_gb + i_h * s_gh + start_m * s_gt
    # Both (BLOCK_M, BLOCK_D).
    b_out = load_tile(p_out, s_ot, s_od, o_m, m_m, True, D, BLOCK_D).to(tl.float32)
    b_grad = load_tile(p_grad_out, s_gt, s_gd, o_m, m_m, True, D, BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_out * b_grad, 1)  # (BLOCK_M,)
    o_m = start_m + o_m
    # b_lse: (BLOCK_M,)
    b_lse = tl.load(p_lse + i_b * s_lb + i_h * s_lh + o_m * s_lt, mask=m_m, other=float("-inf"))
    if HAS_GRAD_LSE:
        p_grad_lse += i_b * s_nb + i_h * s_nh
        b_delta -= tl.load(p_grad_lse + o_m * s_nt, mask=m_m, other=0.0).to(tl.float32)
    m_empty = b_lse == float("-inf")
    first = (i_b * heads + i_h) * tokens_padded
    m_m = o_m < tokens_padded
    tl.store(p_delta + first + o_m, tl.where(m_empty, 0.0, b_delta), mask=m_m)
    tl.store(p_log2_lse + first + o_m, tl.where(m_empty, float("inf"), b_lse * LOG2_E), mask=m_m)


def row_sums(
    out: torch.Tensor,
    grad_out: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    *,
    block_q: int,
    wide: bool,
) -> RowSums:
    """The sums of all queries.

    Args:
        out, grad_out: `(batch, tokens, heads, head_dim)`.
        lse, grad_lse: `(batch, heads, tokens)`; the gradient may be None.
        block_q: the number of tokens is padded to a multiple of this.
        wide: whether 64 tokens of a head span more memory than 32-bit offsets reach.
    """
    batch, tokens, heads, head_dim = out.shape
    padded = -(-tokens // block_q) * block_q
    delta, log2_lse = lse.new_empty((2, batch, heads, padded), dtype=torch.float32)
    grad = lse if grad_lse is None else grad_lse
    with on_device(out.device):
        launch(
            row_sums_kernel,
            batch * heads * -(-padded // _TILE),
            (out, grad_out, lse, grad, delta, log2_lse),
            (*out.stride(), *grad_out.stride(), *lse.stride(), *grad.stride(),
             tokens, padded, heads),
            D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=_TILE,
            HAS_GRAD_LSE=grad_lse is not None, WIDE=wide, num_warps=8,
        )  # fmt: skip
    return RowSums(delta, log2_lse)
