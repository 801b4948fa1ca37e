"""Steps of the online softmax and of its gradients, for a tile of queries and a tile of keys."""

import triton
import triton.language as tl


@triton.jit
def weigh(b_s, b_max, scale, m_s, MASKED: tl.constexpr):
    """Weights of a tile's scores, the new maximum, and the factor that rescales older sums.

    The weights are (BLOCK_M, BLOCK_N), the others (BLOCK_M,). All are in powers of 2: `scale` > 0
    includes log2(e).
    """
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
    b_base = b_new
    if MASKED:
        # A query that has seen nothing yet has a maximum of -inf, and -inf - -inf is NaN.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    return tl.exp2(b_s * scale - b_base[:, None]), b_new, tl.exp2(b_max - b_base)


@triton.jit
def attend_tile(
    b_q, b_k, b_v, b_acc, b_max, b_sum, scale, m_s, MASKED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One step of the online softmax: (BLOCK_M, BLOCK_D) and twice (BLOCK_M,)."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_p, b_max, b_old = weigh(b_s, b_max, scale, m_s, MASKED)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    # b_acc: (BLOCK_M, BLOCK_D)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
    return b_acc, b_max, b_sum


@triton.jit
def score_gradient(
    b_s, b_grad, b_v, b_lse, b_delta, scale, m_s, dtype, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient (BLOCK_M, BLOCK_N) of a tile of scores, not yet times their scale."""
    b_p = tl.exp2(b_s * scale - b_lse[:, None])
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if MASKED:
        b_ds = tl.where(m_s, b_ds, 0.0)
    return b_ds.to(dtype)


@triton.jit
def add_to_queries(
    b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dq, scale, m_s,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ (BLOCK_M, BLOCK_D) with a tile of keys added, not yet times the scale."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    b_ds = score_gradient(
        b_s, b_grad, b_v, b_lse, b_delta, scale, m_s, b_k.dtype, MASKED, PRECISION
    )  # (BLOCK_M, BLOCK_N)
    return tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)


@triton.jit
def add_to_keys(
    b_q, b_grad, b_k, b_v, b_lse, b_delta, b_dk, b_dv, scale, m_s,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV with a tile of queries added, (BLOCK_N, BLOCK_D) each.

    dK is not yet times the scale. The product that gives b_dp stands before the product into b_dv:
    the weights are then computed beside the first, the gradient of the scores beside the second.
    """
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    b_p = tl.exp2(b_s * scale - b_lse[None, :])
    if MASKED:
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    # b_dv: (BLOCK_N, BLOCK_D)
    b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    return tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION), b_dv
