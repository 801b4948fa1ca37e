"""Forward-mode derivatives of the kernels: against float64, and against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_within, random_layout, stack_layouts, tensors
from selections import starts_of

from diffattn.blocks import EMPTY, FULL, PARTIAL, BlockLayout, layout_from_states
from diffattn.kernels.block_sparse import block_sparse_attention
from diffattn.kernels.common.tile_tables import TileConfig
from diffattn.kernels.cpu import block_sparse as cpu
from diffattn.kernels.cpu import gather as gather_cpu
from diffattn.kernels.cpu import tangent as cpu_tangent
from diffattn.kernels.gather import selected_attention

Tensors = tuple[torch.Tensor, ...]
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]

DTYPES = {
    "cpu": [torch.float64, torch.float32, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16, torch.bfloat16],
}
kernels = pytest.mark.parametrize("kernel", ["cpu", "triton"])
kernels_and_dtypes = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{kernel}-{str(dtype).removeprefix('torch.')}")
        for kernel, of_kernel in DTYPES.items()
        for dtype in of_kernel
    ],
)


def inputs(
    batch: int, tokens_q: int, tokens_kv: int, heads: int, head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, Tensors]:  # fmt: skip
    """q, k, v and their tangents."""
    tokens = (tokens_q, tokens_kv, tokens_kv)
    x, dx = (
        tuple(torch.randn(batch, n, heads, head_dim).to(dtype) for n in tokens) for _ in range(2)
    )
    return x, dx


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook lines, in the dtype of the inputs, and 0 for a query that sees nothing."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)
    blind = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(blind, 0)
    weights = torch.softmax(scores, -1).masked_fill(blind, 0)
    lse = scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def attend(kernel: str, layout: BlockLayout | Tensors, block_q: int, block_kv: int) -> Attend:
    """Attention over a layout, of `(q, k, v, **options)` on the CPU, wherever the kernel runs."""
    if isinstance(layout, BlockLayout):
        layout = tensors(layout)
    if kernel == "cpu":
        return lambda *qkv, **options: cpu.block_sparse_attention(
            *qkv, layout, block_q=block_q, block_kv=block_kv, **options
        )
    return lambda *qkv, **options: block_sparse_attention(
        *qkv, [x.to(qkv[0].device) for x in layout], block_q=block_q, block_kv=block_kv, **options
    )


def check(
    function: Attend,
    x: Tensors,
    dx: Tensors,
    mask: torch.Tensor,
    device: str,
    *,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the tangents, and the primal results, with float64 attention under the mask."""
    batch, tokens_q, heads, _ = x[0].shape
    mask = mask.expand(batch, heads, tokens_q, x[1].shape[1])
    options: dict[str, Any] = {}
    if scale is not None:
        options["scale"] = scale
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
        options["key_mask"] = key_mask.to(device)
    primal, found = torch.func.jvp(
        lambda *x: function(*x, **options),
        tuple(t.to(device) for t in x), tuple(t.to(device) for t in dx),
    )  # fmt: skip
    eager, truth = (
        torch.func.jvp(lambda *x: dense(*x, mask, scale), *(tuple(map(to, t)) for t in (x, dx)))
        for to in (lambda t: t, torch.Tensor.double)
    )
    # The output's tangent is a difference of tangents of scores times values.
    exact, moving = (tuple(t.double() for t in some) for some in (x, dx))
    d_scores = torch.einsum("bqhd,bkhd->bhqk", moving[0], exact[1])
    d_scores += torch.einsum("bqhd,bkhd->bhqk", exact[0], moving[1])
    largest = (d_scores * (scale or x[0].shape[-1] ** -0.5)).abs().max().item()
    largest *= max(1, exact[2].abs().max().item())
    for name, got, of_eager, of_truth in (
        *zip(("out", "lse"), primal, eager[0], truth[0], strict=True),
        *zip(("out tangent", "lse tangent"), found, eager[1], truth[1], strict=True),
    ):
        assert_within(name, got.cpu(), of_eager, of_truth, x[0].dtype, largest)
    return found


@kernels_and_dtypes
@pytest.mark.parametrize(
    ("tokens_q", "tokens_kv", "block_q", "block_kv"),
    [
        pytest.param(31, 31, 16, 16, id="prime"),
        pytest.param(33, 33, 16, 16, id="one-over"),
        pytest.param(47, 18, 32, 16, id="more-queries"),
        pytest.param(19, 70, 16, 32, id="more-keys"),
        pytest.param(1, 65, 16, 64, id="one-query"),
        pytest.param(65, 1, 64, 16, id="text-of-length-1"),
    ],
)
def test_is_the_tangent_of_dense_attention_under_the_mask(
    tokens_q: int, tokens_kv: int, block_q: int, block_kv: int,
    kernel: str, dtype: torch.dtype, device: str,
) -> None:  # fmt: skip
    layout = random_layout(tokens_q, tokens_kv, block_q, block_kv)
    x, dx = inputs(2, tokens_q, tokens_kv, 3, 16, dtype)
    check(attend(kernel, layout, block_q, block_kv), x, dx, layout.dense(), device)


@kernels
@pytest.mark.parametrize("head_dim", [1, 24, 80, 128])
def test_head_dims(head_dim: int, kernel: str, device: str) -> None:
    layout = random_layout(40, 40, 32, 16)
    check(attend(kernel, layout, 32, 16), *inputs(1, 40, 40, 1, head_dim), layout.dense(), device)


@pytest.mark.parametrize("kernel", ["triton"])
def test_several_tiles_per_block(kernel: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diffattn.kernels.block_sparse.tangent.tangent_tiles",
        lambda *_: TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2),
    )
    layout = random_layout(70, 75, 64, 32)
    check(attend(kernel, layout, 64, 32), *inputs(1, 70, 75, 2, 16), layout.dense(), device)


def test_rows_in_parts(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(cpu_tangent, "_SCORES_PER_PART", 100)
    layout = random_layout(70, 75, 32, 16)
    check(attend("cpu", layout, 32, 16), *inputs(1, 70, 75, 2, 8), layout.dense(), "cpu")


@kernels
@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1), (2, 3)])
def test_layouts_per_sample_and_per_head(batch: int, heads: int, kernel: str, device: str) -> None:
    layouts = [random_layout(35, 50, 16, 16) for _ in range(batch * heads)]
    mask = torch.cat([layout.dense()[0] for layout in layouts]).unflatten(0, (batch, heads))
    function = attend(kernel, stack_layouts(layouts, batch, heads), 16, 16)
    check(function, *inputs(2, 35, 50, 3, 16), mask, device)


@kernels_and_dtypes
def test_key_mask(kernel: str, dtype: torch.dtype, device: str) -> None:
    layout = random_layout(40, 55, 16, 16)
    key_mask = torch.rand(3, 55) < 0.7
    key_mask[1] = False
    key_mask[2] = True
    found = check(
        attend(kernel, layout, 16, 16), *inputs(3, 40, 55, 2, 16, dtype), layout.dense(), device,
        key_mask=key_mask,
    )  # fmt: skip
    assert not any(x[1].any() for x in found)


@kernels
def test_what_is_left_in_padding_does_not_matter(kernel: str, device: str) -> None:
    layout = random_layout(40, 55, 16, 16)
    key_mask = (torch.rand(2, 55) < 0.7).to(device)
    function = attend(kernel, layout, 16, 16)
    x, dx = (tuple(t.to(device) for t in some) for some in inputs(2, 40, 55, 2, 16))

    def tangents() -> Tensors:
        return torch.func.jvp(lambda *x: function(*x, key_mask=key_mask), x, dx)[1]

    clean = tangents()
    for t in (*x[1:], *dx[1:]):
        t[~key_mask] = torch.nan
    for got, want in zip(tangents(), clean, strict=True):
        assert torch.equal(got, want)


@kernels
def test_a_query_that_sees_nothing_has_no_tangent(kernel: str, device: str) -> None:
    states = torch.tensor([[EMPTY, EMPTY], [EMPTY, PARTIAL], [FULL, FULL]], dtype=torch.uint8)
    bits = torch.ones(1, 16, 16, dtype=torch.bool)
    bits[:, 3:5] = False
    layout = layout_from_states(
        states, lambda r, c: bits, tokens_q=40, tokens_kv=32, block_q=16, block_kv=16
    )
    out, lse = check(
        attend(kernel, layout, 16, 16), *inputs(2, 40, 32, 2, 16), layout.dense(), device
    )
    nothing = torch.zeros(40, dtype=torch.bool)
    nothing[:16] = nothing[19:21] = True
    assert not out[:, nothing].any()
    assert not lse[:, :, nothing].any()
    assert out[:, ~nothing].all()


@kernels
@pytest.mark.parametrize("scale", [0.9, -0.4])
def test_scale(scale: float, kernel: str, device: str) -> None:
    layout = random_layout(40, 40, 16, 16)
    x, dx = inputs(1, 40, 40, 2, 16)
    check(attend(kernel, layout, 16, 16), x, dx, layout.dense(), device, scale=scale)


@kernels
def test_any_strides(kernel: str, device: str) -> None:
    layout = random_layout(40, 40, 16, 16)

    def strided() -> Tensors:
        return (
            torch.randn(2, 16, 40, 3).permute(0, 2, 3, 1),  # tokens inside
            torch.randn(2, 3, 40, 16).transpose(1, 2),  # heads first
            torch.randn(2, 40, 1, 16).expand(2, 40, 3, 16),  # stride 0
        )

    check(attend(kernel, layout, 16, 16), strided(), strided(), layout.dense(), device)


def test_tiles_that_reach_beyond_32_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(40, 40, 16, 16)
    monkeypatch.setattr("diffattn.kernels.block_sparse.launch._MAX_OFFSET", 1)
    key_mask = torch.rand(2, 40) < 0.7
    x, dx = inputs(2, 40, 40, 2, 16)
    check(attend("triton", layout, 16, 16), x, dx, layout.dense(), device, key_mask=key_mask)


@kernels
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_tangent_of_one_argument(which: int, kernel: str, device: str) -> None:
    layout = random_layout(40, 40, 16, 16)
    x, dx = inputs(1, 40, 40, 2, 16)
    moving = (x[which],)

    def function(one: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest = (one if i == which else t.to(one.device) for i, t in enumerate(x))
        return attend(kernel, layout, 16, 16)(*rest)

    def exact(one: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rest = (one if i == which else t.double() for i, t in enumerate(x))
        return dense(*rest, layout.dense(), None)

    _, found = torch.func.jvp(
        function, tuple(t.to(device) for t in moving), (dx[which].to(device),)
    )
    _, truth = torch.func.jvp(exact, (x[which].double(),), (dx[which].double(),))
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, atol=1e-5, rtol=1e-5)


def selection(
    batch: int, heads: int, tokens_q: int, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits, of which one query selects nothing, and the token mask that they stand for."""
    chosen = torch.rand(batch, heads, tokens_q, len(lengths)) < 0.4
    chosen[:, :, 0] = False
    bits = (chosen.int() << torch.arange(len(lengths), dtype=torch.int32)).sum(-1, keepdim=True)
    return bits.int(), chosen.repeat_interleave(torch.tensor(lengths), -1)


@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_selected_blocks(dtype: torch.dtype, masked: bool) -> None:
    lengths = [7, 1, 16, 13, 1]
    bits, mask = selection(2, 3, 29, lengths)
    key_mask = torch.rand(2, 38) < 0.6 if masked else None

    def function(*qkv: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return gather_cpu.selected_attention(*qkv, starts_of(lengths), bits, **options)

    out, lse = check(function, *inputs(2, 29, 38, 3, 16, dtype), mask, "cpu", key_mask=key_mask)
    assert not out[:, 0].any()
    assert not lse[:, :, 0].any()


def differences(function: Attend, x: Tensors, dx: Tensors, step: float = 1e-5) -> Tensors:
    ahead, behind = (function(*(t + s * d for t, d in zip(x, dx, strict=True)))
                     for s in (step, -step))  # fmt: skip
    return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))


@pytest.mark.parametrize("which", ["block-sparse", "selected"])
def test_is_what_finite_differences_say(which: str) -> None:
    x, dx = inputs(2, 37, 41, 2, 8, torch.float64)
    key_mask = torch.rand(2, 41) < 0.8
    if which == "block-sparse":
        layout = random_layout(37, 41, 16, 16)
        layout.full_count.clamp_(min=1)  # of an LSE of -inf there is no difference

        def function(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return attend("cpu", layout, 16, 16)(*x, key_mask=key_mask)
    else:
        lengths = [20, 21]
        bits = torch.randint(1, 4, (2, 2, 37, 1), dtype=torch.int32)

        def function(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return gather_cpu.selected_attention(*x, starts_of(lengths), bits, key_mask=key_mask)

    _, found = torch.func.jvp(function, x, dx)
    for got, want in zip(found, differences(function, x, dx), strict=True):
        assert want.abs().max() > 0.1
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-7)


def test_the_triton_gather_says_that_it_has_none(device: str) -> None:
    lengths = [7, 9]
    bits, _ = selection(1, 2, 16, lengths)
    x, dx = (tuple(t.to(device) for t in some) for some in inputs(1, 16, 16, 2, 16))

    def function(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return selected_attention(*x, starts_of(lengths).to(device), bits.to(device))

    message = "the Triton kernel for selected blocks has no forward-mode derivative .*func.jvp"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, x, dx)
