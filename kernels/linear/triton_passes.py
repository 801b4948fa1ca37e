"""The passes of linear attention in Triton: kernels for the passes of `TorchPasses`.

Features never leave the registers. Products have float32 operands, because features of 16-bit
inputs may be too large or too small for 16 bits. For 16-bit inputs the operands are multiplied as
TF32. For float32 inputs they are multiplied in full, unless `torch.set_float32_matmul_precision`
allows TF32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.launch import float32_precision, on_device, padded_head_dim
from ..common.primitives import load_tile, store_tile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256

# Programs that keep a GPU busy: sequences are cut into spans to have as many.
_PROGRAMS = 512
# Fewer tokens than this are not worth a partial state.
_SHORTEST_SPAN = 256


@triton.jit
def features(b_x, FEATURES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """elu(x) + 1, relu(x) or the softmax over the channels, of float32 (BLOCK_T, BLOCK_D)."""
    if FEATURES == "elu":
        return tl.where(b_x > 0, b_x + 1.0, tl.exp(tl.minimum(b_x, 0.0)))
    if FEATURES == "relu":
        return tl.maximum(b_x, 0.0)
    if D != BLOCK_D:
        b_x = tl.where((tl.arange(0, BLOCK_D) < D)[None, :], b_x, -float("inf"))
    b_power = tl.exp(b_x - tl.max(b_x, 1)[:, None])
    return b_power / tl.sum(b_power, 1)[:, None]


@triton.jit
def turn(b_x, b_cos, b_sin, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rotate neighbouring channels of b_x (BLOCK_T, BLOCK_D) by angles (BLOCK_T, BLOCK_D / 2)."""
    b_even, b_odd = tl.split(tl.reshape(b_x, (BLOCK_T, BLOCK_D // 2, 2)))
    b_both = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    return tl.reshape(b_both, (BLOCK_T, BLOCK_D))


@triton.jit
def turn_columns(b_x, b_cos, b_sin, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """`turn` of transposed tiles, as the next product wants them on Blackwell."""
    b_pairs = tl.permute(tl.reshape(b_x, (BLOCK_D // 2, 2, BLOCK_T)), (0, 2, 1))
    b_even, b_odd = tl.split(b_pairs)
    b_both = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    return tl.reshape(tl.permute(b_both, (0, 2, 1)), (BLOCK_D, BLOCK_T))


@triton.jit
def load_angles(
    p_rotation, start, tokens, m_t, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Cosines and sines of a tile of tokens, both (BLOCK_T, BLOCK_D / 2)."""
    o_t = tl.arange(0, BLOCK_T)
    o_p = tl.arange(0, BLOCK_D // 2)
    p_tile = p_rotation + start * (D // 2) + o_t[:, None] * (D // 2) + o_p[None, :]
    m_tile = m_t[:, None] & (o_p < D // 2)[None, :]
    b_cos = tl.load(p_tile, mask=m_tile, other=1.0)
    b_sin = tl.load(p_tile + tokens.to(tl.int64) * (D // 2), mask=m_tile, other=0.0)
    return b_cos, b_sin


@triton.jit
def load_factor(p_factor, start, o_t, m_t, heads):
    """Factors (BLOCK_T,) of a head's tokens, from (batch, tokens, heads)."""
    return tl.load(p_factor + (start + o_t) * heads, mask=m_t, other=0.0)


@triton.jit(do_not_specialize=["tokens", "span"])
def collect_kernel(
    p_x, p_y, p_rotation, p_mask, p_x_factor, p_y_factor, p_state, p_total,
    s_xb, s_xt, s_xh, s_xd, s_yb, s_yt, s_yh, s_yd, s_mb, s_mt, tokens, heads, span,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_ROTATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of the state of a span of tokens."""
    i_split = tl.program_id(0)
    i_bh = tl.program_id(1)
    i_e = tl.program_id(2)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_mask += i_b * s_mb
    p_x_factor += i_b * tokens * heads + i_h
    p_y_factor += i_b * tokens * heads + i_h
    b_state = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    b_total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    first = i_split.to(tl.int64) * span
    for i in tl.range(0, span // BLOCK_T):
        start = first + i * BLOCK_T
        m_t = start + o_t < tokens
        if HAS_MASK:
            m_t = tl.load(p_mask + (start + o_t) * s_mt, mask=m_t, other=0) != 0  # (BLOCK_T,)
        # b_x: (BLOCK_T, BLOCK_D)
        b_x = load_tile(p_x + start * s_xt, s_xt, s_xd, o_t, m_t, True, D, BLOCK_D).to(tl.float32)
        if HAS_ROTATION:
            b_cos, b_sin = load_angles(p_rotation, start, tokens, m_t, D, BLOCK_T, BLOCK_D)
            b_x = turn(b_x, b_cos, -b_sin, BLOCK_T, BLOCK_D)
        b_features = tl.where(
            m_t[:, None], features(b_x, FEATURES, D, BLOCK_D), 0.0
        )  # (BLOCK_T, BLOCK_D)
        p_tile = p_y + start * s_yt + o_t[:, None] * s_yt + o_e[None, :] * s_yd
        # b_y: (BLOCK_T, BLOCK_E)
        b_y = tl.load(p_tile, mask=m_t[:, None] & (o_e < D)[None, :], other=0.0).to(tl.float32)
        if HAS_FACTORS:
            b_y *= load_factor(p_y_factor, start, o_t, m_t, heads)[:, None]
            b_x_factor = load_factor(p_x_factor, start, o_t, m_t, heads)  # (BLOCK_T,)
            b_total += tl.sum(b_features * b_x_factor[:, None], 0)
        else:
            b_total += tl.sum(b_features, 0)
        b_left = tl.trans(b_features)  # (BLOCK_D, BLOCK_T)
        if HAS_ROTATION:
            b_left = turn_columns(b_left, tl.trans(b_cos), tl.trans(b_sin), BLOCK_T, BLOCK_D)
        b_state = tl.dot(b_left, b_y, b_state, input_precision=PRECISION)  # (BLOCK_D, BLOCK_E)
    i_out = i_split * tl.num_programs(1).to(tl.int64) + i_bh
    p_tile = p_state + i_out * D * D + o_d[:, None] * D + o_e[None, :]
    tl.store(p_tile, b_state, mask=(o_d < D)[:, None] & (o_e < D)[None, :])
    if i_e == 0:
        tl.store(p_total + i_out * D + o_d, b_total, mask=o_d < D)


@triton.jit(do_not_specialize=["tokens"])
def apply_kernel(
    p_x, p_state, p_mean, p_rotation, p_mask, p_out, p_inverse,
    s_xb, s_xt, s_xh, s_xd, s_mb, s_mt, tokens, heads, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_ROTATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_MEAN: tl.constexpr,
    PRECISION: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """BLOCK_E columns of the output: features of a tile times a state, divided if HAS_MEAN."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    i_bh = tl.program_id(1)
    i_e = tl.program_id(2)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    m_in = start + o_t < tokens
    m_t = m_in
    if HAS_MASK:
        # m_t: (BLOCK_T,)
        m_t = tl.load(p_mask + i_b * s_mb + (start + o_t) * s_mt, mask=m_in, other=0) != 0
    p_x += i_b * s_xb + i_h * s_xh + start * s_xt
    # b_x: (BLOCK_T, BLOCK_D)
    b_x = load_tile(p_x, s_xt, s_xd, o_t, m_t, True, D, BLOCK_D).to(tl.float32)
    if HAS_ROTATION:
        b_cos, b_sin = load_angles(p_rotation, start, tokens, m_t, D, BLOCK_T, BLOCK_D)
        b_x = turn(b_x, b_cos, -b_sin, BLOCK_T, BLOCK_D)
    b_features = tl.where(
        m_t[:, None], features(b_x, FEATURES, D, BLOCK_D), 0.0
    )  # (BLOCK_T, BLOCK_D)
    first = i_b * tokens + start
    if HAS_MEAN:
        b_mean = tl.load(p_mean + i_bh * D + o_d, mask=o_d < D, other=0.0)  # (BLOCK_D,)
        b_inverse = 1 / (tl.sum(b_features * b_mean[None, :], 1) + eps)  # (BLOCK_T,)
        if i_e == 0:
            tl.store(p_inverse + (first + o_t) * heads + i_h, b_inverse, mask=m_in)
    if HAS_ROTATION:
        b_features = turn(b_features, b_cos, b_sin, BLOCK_T, BLOCK_D)
    p_tile = p_state + i_bh.to(tl.int64) * D * D + o_d[:, None] * D + o_e[None, :]
    # b_state: (BLOCK_D, BLOCK_E)
    b_state = tl.load(p_tile, mask=(o_d < D)[:, None] & (o_e < D)[None, :], other=0.0)
    b_out = tl.dot(b_features, b_state, input_precision=PRECISION)  # (BLOCK_T, BLOCK_E)
    if HAS_MEAN:
        b_out *= b_inverse[:, None]
    p_tile = p_out + ((first + o_t) * heads + i_h)[:, None] * D + o_e[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_in[:, None] & (o_e < D)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def pull_back_kernel(
    p_x, p_y, p_state, p_mean, p_rotation, p_mask, p_x_factor, p_y_factor, p_dx,
    s_xb, s_xt, s_xh, s_xd, s_yb, s_yt, s_yh, s_yd, s_mb, s_mt, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    HAS_ROTATION: tl.constexpr, HAS_MASK: tl.constexpr, HAS_FACTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of x for a tile of tokens: see `TorchPasses.pull_back`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_in = start + o_t < tokens
    m_t = m_in
    if HAS_MASK:
        # m_t: (BLOCK_T,)
        m_t = tl.load(p_mask + i_b * s_mb + (start + o_t) * s_mt, mask=m_in, other=0) != 0
    p_y += i_b * s_yb + i_h * s_yh + start * s_yt
    p_state += i_bh.to(tl.int64) * D * D
    b_grad = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for i_e in tl.range(0, tl.cdiv(D, BLOCK_E)):
        o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
        p_tile = p_y + o_t[:, None] * s_yt + o_e[None, :] * s_yd
        # b_y: (BLOCK_T, BLOCK_E)
        b_y = tl.load(p_tile, mask=m_t[:, None] & (o_e < D)[None, :], other=0.0).to(tl.float32)
        p_tile = p_state + o_d[:, None] * D + o_e[None, :]
        # b_state: (BLOCK_D, BLOCK_E)
        b_state = tl.load(p_tile, mask=(o_d < D)[:, None] & (o_e < D)[None, :], other=0.0)
        # b_grad: (BLOCK_T, BLOCK_D)
        b_grad = tl.dot(b_y, tl.trans(b_state), b_grad, input_precision=PRECISION)
    b_direct = tl.load(p_mean + i_bh * D + o_d, mask=o_d < D, other=0.0)[None, :]  # (1, BLOCK_D)
    if HAS_FACTORS:
        i_first = i_b * tokens * heads + i_h
        b_grad *= load_factor(p_y_factor + i_first, start, o_t, m_t, heads)[:, None]
        b_direct *= load_factor(p_x_factor + i_first, start, o_t, m_t, heads)[:, None]
    p_x += i_b * s_xb + i_h * s_xh + start * s_xt
    # b_x: (BLOCK_T, BLOCK_D)
    b_x = load_tile(p_x, s_xt, s_xd, o_t, m_t, True, D, BLOCK_D).to(tl.float32)
    if HAS_ROTATION:
        b_cos, b_sin = load_angles(p_rotation, start, tokens, m_t, D, BLOCK_T, BLOCK_D)
        b_x = turn(b_x, b_cos, -b_sin, BLOCK_T, BLOCK_D)
        b_grad = turn(b_grad, b_cos, -b_sin, BLOCK_T, BLOCK_D)
    b_grad = (b_grad + b_direct) * tl.exp(tl.minimum(b_x, 0.0))
    if HAS_ROTATION:
        b_grad = turn(b_grad, b_cos, b_sin, BLOCK_T, BLOCK_D)
    b_grad = tl.where(m_t[:, None], b_grad, 0.0)
    p_dx += ((i_b * tokens + start) * heads + i_h) * D
    store_tile(p_dx, heads * D, o_t, m_in, b_grad, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens"])
def denominator_kernel(
    p_grad_out, p_out, p_inverse, p_gradient,
    s_gb, s_gt, s_gh, s_gd, s_ob, s_ot, s_oh, s_od, tokens, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The gradient of the denominators of a tile of tokens."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_T
    i_bh = tl.program_id(1)
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    m_t = start + o_t < tokens
    p_grad_out += i_b * s_gb + i_h * s_gh + start * s_gt
    p_out += i_b * s_ob + i_h * s_oh + start * s_ot
    # Both (BLOCK_T, BLOCK_D).
    b_grad = load_tile(p_grad_out, s_gt, s_gd, o_t, m_t, True, D, BLOCK_D).to(tl.float32)
    b_out = load_tile(p_out, s_ot, s_od, o_t, m_t, True, D, BLOCK_D).to(tl.float32)
    o_out = (i_b * tokens + start + o_t) * heads + i_h
    b_inverse = tl.load(p_inverse + o_out, mask=m_t, other=0.0)  # (BLOCK_T,)
    tl.store(p_gradient + o_out, -tl.sum(b_grad * b_out, 1) * b_inverse, mask=m_t)


@dataclass(frozen=True)
class LinearTile:
    """How a kernel cuts its work.

    Attributes:
        block_t: tokens at a time.
        block_e: columns of the state at a time.
        num_warps: as Triton takes it.
    """

    block_t: int
    block_e: int
    num_warps: int


# By largest head_dim. Compiled for sm_80, sm_90 and sm_100 without a spilled register.
_Table = dict[int, LinearTile]
_TILES: dict[str, _Table] = {
    "collect": {
        64: LinearTile(32, 64, 4),
        128: LinearTile(32, 64, 8),
        256: LinearTile(16, 32, 8),
    },
    "apply": {
        64: LinearTile(64, 64, 8),
        128: LinearTile(32, 64, 8),
        256: LinearTile(32, 32, 8),
    },
    "pull_back": {
        64: LinearTile(32, 32, 8),
        128: LinearTile(32, 32, 8),
        256: LinearTile(16, 32, 8),
    },
    "denominator": {256: LinearTile(16, 0, 8)},
}

# For float32 in full, which no matrix unit multiplies.
_FULL_PRECISION: dict[str, _Table] = {
    "collect": {
        64: LinearTile(16, 32, 8),
        128: LinearTile(16, 32, 8),
        256: LinearTile(16, 16, 8),
    },
    "apply": {
        64: LinearTile(32, 32, 8),
        128: LinearTile(16, 16, 8),
        256: LinearTile(16, 16, 8),
    },
    "pull_back": {
        64: LinearTile(32, 32, 8),
        128: LinearTile(16, 32, 8),
        256: LinearTile(16, 16, 8),
    },
    "denominator": _TILES["denominator"],
}


def tile_of(kernel: str, x: torch.Tensor) -> LinearTile:
    """The shipped tile of "collect", "apply", "pull_back" or "denominator" for x."""
    table = (_FULL_PRECISION if _precision(x.dtype) == "ieee" else _TILES)[kernel]
    return next(tile for largest, tile in table.items() if x.shape[-1] <= largest)


def check_supported(x: torch.Tensor) -> None:
    """Check that the kernels take a tensor like x.

    Raises:
        ValueError: if its dtype, head_dim or device is not supported.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"the kernels take {', '.join(map(str, DTYPES))}; got {x.dtype}")
    if x.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"head_dim may be 1 to {MAX_HEAD_DIM}; got {x.shape[-1]}")
    if x.device.type == "cpu" and isinstance(collect_kernel, triton.JITFunction):
        raise ValueError(
            "the Triton kernels run on a GPU, but q is on cpu; use backend='torch', or set"
            " TRITON_INTERPRET=1 before Triton is imported to run them in its interpreter"
        )


def collect(
    x: torch.Tensor,
    y: torch.Tensor,
    rotation: torch.Tensor | None,
    mask: torch.Tensor | None,
    y_factor: torch.Tensor | None = None,
    x_factor: torch.Tensor | None = None,
    *,
    features: str = "elu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `TorchPasses.collect`; the factors come both or not at all.

    Features of SLA are "softmax", over the channels, and "relu", too.
    """
    batch, tokens, heads, dim = x.shape
    tile = tile_of("collect", x)
    columns = triton.cdiv(dim, tile.block_e)
    # Partial states of spans of tokens are added up afterwards: in the same order every time.
    wanted = max(1, _PROGRAMS // (batch * heads * columns))
    span = max(_SHORTEST_SPAN, triton.cdiv(tokens, wanted))
    span = triton.cdiv(span, tile.block_t) * tile.block_t
    splits = triton.cdiv(tokens, span)
    state = x.new_empty(splits, batch, heads, dim, dim, dtype=torch.float32)
    total = x.new_empty(splits, batch, heads, dim, dtype=torch.float32)
    with on_device(x.device):
        collect_kernel[(splits, batch * heads, columns)](
            x, y, _or(rotation, x), _bytes(mask, x), _or(x_factor, x), _or(y_factor, x),
            state, total,
            *x.stride(), *y.stride(), *_mask_strides(mask), tokens, heads, span,
            D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_T=tile.block_t, BLOCK_E=tile.block_e,
            HAS_ROTATION=rotation is not None, HAS_MASK=mask is not None,
            HAS_FACTORS=y_factor is not None,
            PRECISION=_precision(x.dtype), FEATURES=features, **_options(tile),
        )  # fmt: skip
    return state.sum(0), total.sum(0)


def apply(
    x: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor | None,
    eps: float,
    rotation: torch.Tensor | None,
    mask: torch.Tensor | None,
    *,
    features: str = "elu",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `TorchPasses.apply`; the state and the mean are contiguous. Features as of `collect`."""
    batch, tokens, heads, dim = x.shape
    tile = tile_of("apply", x)
    out = x.new_empty(x.shape)
    inverse = None if mean is None else x.new_empty(x.shape[:3], dtype=torch.float32)
    grid = (triton.cdiv(tokens, tile.block_t), batch * heads, triton.cdiv(dim, tile.block_e))
    with on_device(x.device):
        apply_kernel[grid](
            x, state, _or(mean, x), _or(rotation, x), _bytes(mask, x), out, _or(inverse, x),
            *x.stride(), *_mask_strides(mask), tokens, heads, eps,
            D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_T=tile.block_t, BLOCK_E=tile.block_e,
            HAS_ROTATION=rotation is not None, HAS_MASK=mask is not None,
            HAS_MEAN=mean is not None,
            PRECISION=_precision(x.dtype), FEATURES=features, **_options(tile),
        )  # fmt: skip
    return out, inverse


def pull_back(
    x: torch.Tensor,
    y: torch.Tensor,
    state: torch.Tensor,
    mean: torch.Tensor,
    rotation: torch.Tensor | None,
    mask: torch.Tensor | None,
    y_factor: torch.Tensor | None = None,
    x_factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `TorchPasses.pull_back`; the state and the mean are contiguous."""
    batch, tokens, heads, dim = x.shape
    tile = tile_of("pull_back", x)
    out = x.new_empty(x.shape)
    with on_device(x.device):
        pull_back_kernel[(triton.cdiv(tokens, tile.block_t), batch * heads)](
            x, y, state, mean, _or(rotation, x), _bytes(mask, x), _or(x_factor, x),
            _or(y_factor, x), out,
            *x.stride(), *y.stride(), *_mask_strides(mask), tokens, heads,
            D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_T=tile.block_t, BLOCK_E=tile.block_e,
            HAS_ROTATION=rotation is not None, HAS_MASK=mask is not None,
            HAS_FACTORS=y_factor is not None,
            PRECISION=_precision(x.dtype), **_options(tile),
        )  # fmt: skip
    return out


def denominator_gradient(
    grad_out: torch.Tensor, out: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """See `TorchPasses.denominator_gradient`."""
    batch, tokens, heads, dim = out.shape
    tile = tile_of("denominator", out)
    gradient = torch.empty_like(inverse)
    with on_device(out.device):
        denominator_kernel[(triton.cdiv(tokens, tile.block_t), batch * heads)](
            grad_out, out, inverse, gradient, *grad_out.stride(), *out.stride(), tokens, heads,
            D=dim, BLOCK_D=padded_head_dim(dim), BLOCK_T=tile.block_t, **_options(tile),
        )  # fmt: skip
    return gradient


def _or(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """`x`, or some other tensor in place of one that the kernel does not read."""
    return other if x is None else x.contiguous()


def _bytes(mask: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if mask is None else mask.view(torch.uint8)


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


def _precision(dtype: torch.dtype) -> str:
    return float32_precision() if dtype == torch.float32 else "tf32"


def _options(tile: LinearTile) -> dict[str, object]:
    # Triton is about to change its own default for fusion.
    return {"num_warps": tile.num_warps, "num_stages": 2, "enable_fp_fusion": True}
