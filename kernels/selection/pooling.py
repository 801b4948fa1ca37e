"""Tokens in another order, and the means of their blocks, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..common.launch import on_device, padded_head_dim

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_TOKENS = 64  # of a block that a program reads at a time


@triton.jit(do_not_specialize=["tokens", "places", "heads", "blocks", "s_cb"])
def pooling_kernel(
    p_x, p_token, p_counted, p_starts, p_moved, p_means, s_xb, s_xt, s_xh, s_xd, s_cb, s_ct,
    tokens, places, heads, blocks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    MOVES: tl.constexpr, HAS_COUNTED: tl.constexpr,
):  # fmt: skip
    """The mean of a block of one head, and its tokens at their places."""
    # Heads follow one another: the programs at work read whole tokens together.
    i_h = tl.program_id(0) % heads
    i_block = tl.program_id(0) // heads
    i_b = tl.program_id(1).to(tl.int64)
    p_x += i_b * s_xb + i_h.to(tl.int64) * s_xh
    p_moved += (i_b * places * heads + i_h) * D
    p_counted += i_b * s_cb
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    start = tl.load(p_starts + i_block)
    stop = tl.load(p_starts + i_block + 1)
    b_sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    b_number = tl.zeros((BLOCK_T,), dtype=tl.int32)
    for first in range(start, stop, BLOCK_T):
        o_p = first + tl.arange(0, BLOCK_T)
        m_p = o_p < stop
        o_t = o_p.to(tl.int64)
        m_t = m_p
        if MOVES:
            o_t = tl.load(p_token + o_p, mask=m_p, other=0).to(tl.int64)  # (BLOCK_T,)
            # A place past the last token is empty.
            m_t = m_p & (o_t < tokens)
        p_tile = p_x + o_t[:, None] * s_xt + o_d[None, :] * s_xd
        b_x = tl.load(p_tile, mask=m_t[:, None] & m_d[None, :], other=0.0)  # (BLOCK_T, BLOCK_D)
        if MOVES:
            p_to = p_moved + o_p.to(tl.int64)[:, None] * (heads * D) + o_d[None, :]
            tl.store(p_to, b_x, mask=m_p[:, None] & m_d[None, :])
        b_wide = b_x.to(tl.float32)
        if HAS_COUNTED:
            m_counted = tl.load(p_counted + o_p.to(tl.int64) * s_ct, mask=m_p, other=0) != 0
            # A NaN in padding must not reach a sum.
            b_wide = tl.where(m_counted[:, None], b_wide, 0.0)
            b_number += m_counted.to(tl.int32)
        b_sum += tl.sum(b_wide, 0)
    number = stop - start
    if HAS_COUNTED:
        number = tl.sum(b_number, 0)
    b_mean = b_sum / tl.maximum(number, 1).to(tl.float32)
    p_mean = p_means + ((i_b * blocks + i_block) * heads + i_h) * D
    tl.store(p_mean + o_d, b_mean, mask=m_d)


def pooled(
    x: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    token: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of blocks, of tokens that stand in their places already or are put there.

    Args:
        x: `(batch, tokens, heads, head_dim)`, of any strides; one of `DTYPES`.
        starts: int32 `(blocks + 1,)`, the first place of each block, and the end of all.
        longest: places of the longest block.
        token: int `(places,)`, the token at each place, or a number past the last token for a place
            that is filled by 0; None if each token stands at its place.
        counted: bool `(batch, places)`, False for places that count in no mean.

    Returns:
        The tokens at their places, `(batch, places, heads, head_dim)`: `x` itself without `token`.
        float32 `(batch, blocks, heads, head_dim)`: the means; 0 for a block where nothing counts.
    """
    batch, tokens, heads, dim = x.shape
    blocks = starts.shape[0] - 1
    places = tokens if token is None else token.shape[0]
    moved = x if token is None else x.new_empty(batch, places, heads, dim)
    means = x.new_empty(batch, blocks, heads, dim, dtype=torch.float32)
    strides = (0, 0) if counted is None else counted.stride()
    with on_device(x.device):
        pooling_kernel[(blocks * heads, batch)](
            x, starts if token is None else token,
            starts if counted is None else counted.view(torch.uint8), starts, moved, means,
            *x.stride(), *strides, tokens, places, heads, blocks,
            D=dim, BLOCK_D=padded_head_dim(dim),
            BLOCK_T=min(_MOST_TOKENS, triton.next_power_of_2(longest)),
            MOVES=token is not None, HAS_COUNTED=counted is not None,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return moved, means
