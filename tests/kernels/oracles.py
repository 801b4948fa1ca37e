"""What the kernel tests compare with: float64 attention, and how far plain eager is from it."""

from __future__ import annotations

import torch

from diffattn.blocks import PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.reference import reference_attention

LAYOUT_FIELDS = (
    "full_count",
    "full_index",
    "partial_count",
    "partial_index",
    "partial_mask",
    "bit_masks",
)
# A kernel may round at other places than eager attention does: its error is allowed to be this
# many times eager's, plus this many units of rounding of the largest value.
TIMES_EAGER = 3
UNITS = 2
# Torch's fused attention on the CPU computes exp() to this many units of float32 (exp_u20).
EXP_UNITS = 20


def tensors(layout: BlockLayout) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(layout, name) for name in LAYOUT_FIELDS)


def random_layout(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int, *, partial: bool = True
) -> BlockLayout:
    """A layout with random empty, partial and full blocks."""
    states = torch.randint(0, 3, (-(-tokens_q // block_q), -(-tokens_kv // block_kv)))
    if not partial:
        states = states // 2 * 2
    return layout_from_states(
        states.to(torch.uint8),
        lambda row, column: torch.rand(row.numel(), block_q, block_kv) < 0.5,
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=block_q,
        block_kv=block_kv,
    )


def inputs(
    device: str,
    batch: int,
    tokens_q: int,
    tokens_kv: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Random q, k and v that want gradients."""
    return [
        torch.randn(batch, tokens, heads, head_dim).to(device, dtype).requires_grad_()
        for tokens in (tokens_q, tokens_kv, tokens_kv)
    ]


def layout_of_mask(dense: torch.Tensor, block: int) -> BlockLayout:
    """The layout of a token mask `(tokens_q, tokens_kv)` in square blocks."""
    tokens_q, tokens_kv = dense.shape
    padded = torch.nn.functional.pad(dense, (0, -tokens_kv % block, 0, -tokens_q % block))
    blocks = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)
    return layout_from_states(
        torch.full(blocks.shape[:2], PARTIAL, dtype=torch.uint8),
        lambda row, column: blocks[row, column],
        tokens_q=tokens_q,
        tokens_kv=tokens_kv,
        block_q=block,
        block_kv=block,
    )


def stack_layouts(layouts: list[BlockLayout], batch: int, heads: int) -> tuple[torch.Tensor, ...]:
    """Index lists with one of `layouts` for every sample and head, in that order."""
    offsets = [0]
    for layout in layouts:
        offsets.append(offsets[-1] + layout.bit_masks.shape[0])

    def together(name: str, shift: list[int]) -> torch.Tensor:
        parts = [getattr(layout, name)[0, 0] + s for layout, s in zip(layouts, shift, strict=False)]
        width = max(part.shape[-1] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
        return torch.stack(parts).unflatten(0, (batch, heads)).to(torch.int32)

    none = [0] * len(layouts)
    return (
        together("full_count", none),
        together("full_index", none),
        together("partial_count", none),
        together("partial_index", none),
        together("partial_mask", offsets),
        torch.cat([layout.bit_masks for layout in layouts]),
    )


def eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook lines in the dtype of the inputs; the LSE from scores in that dtype."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, -1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def assert_within(
    name: str,
    got: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype,
    largest: float = 0,
) -> None:
    """The error of `got` is at most a small multiple of that of `eager` in the same dtype.

    `largest` is the largest value rounded on the way, where that can exceed the largest result.
    """
    assert got.shape == truth.shape, (name, got.shape, truth.shape)
    finite = truth.isfinite()
    assert torch.equal(got.double()[~finite], truth[~finite]), f"{name}: wrong infinities"
    got, eager, truth = (x.detach()[finite].double() for x in (got, eager, truth))
    if not truth.numel():
        return
    error = (got - truth).abs().max().item()
    allowed = TIMES_EAGER * (eager - truth).abs().max().item()
    units = UNITS * torch.finfo(dtype).eps + EXP_UNITS * torch.finfo(torch.float32).eps
    allowed += units * max(truth.abs().max().item(), largest)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_matches_eager(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backward: bool = False,
) -> None:
    """Check output and LSE, and with `backward` the gradients of a random function of both."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if key_mask is not None:
        by_key = key_mask[:, None, None, :]
        mask = by_key if mask is None else mask & by_key
        mask = mask.expand(-1, -1, q.shape[1], -1)
    truth = reference_attention(q, k, v, mask, scale=scale)
    eager = eager_attention(q, k, v, mask, scale)
    assert out.dtype == q.dtype
    assert_within("out", out, eager[0], truth[0], q.dtype)
    assert_within("lse", lse, eager[1], truth[1], q.dtype)
    if not backward:
        return
    # A row that sees nothing has an LSE of -inf: nothing can depend on it.
    seen = truth[1].isfinite()
    weights = torch.randn_like(out), torch.randn_like(lse)[seen]

    def gradients(o: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = (weights[0].to(o.dtype), weights[1].to(m.dtype))
        return torch.autograd.grad((o, m[seen]), (q, k, v), values)

    found, eagers = gradients(out, lse), gradients(*eager)
    truths = _float64_gradients(q, k, v, mask, scale, weights, seen)
    # dq and dk come from differences of these.
    d_weights = torch.einsum("bqhd,bkhd->bhqk", weights[0].double(), v.double()).abs().max().item()
    d_scores = scale * max(d_weights, *weights[1].abs().tolist(), 0.0)
    largest = (d_scores * k.abs().max().item(), d_scores * q.abs().max().item(), 0.0)
    for name, *three, most in zip(("dq", "dk", "dv"), found, eagers, truths, largest, strict=True):
        assert_within(name, *three, q.dtype, most)


def _float64_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    weights: tuple[torch.Tensor, torch.Tensor],
    seen: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    # From float64 leaves: gradients of the low-precision ones would be rounded on arrival.
    leaves = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = reference_attention(*leaves, mask, scale=scale)
    values = (weights[0].double(), weights[1].double())
    return torch.autograd.grad((out, lse[seen]), leaves, values)
