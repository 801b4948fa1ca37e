"""Linear attention in Triton, on a GPU or else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_oracle import linear_truth, rotations

from diffattn.kernels.linear import linear_attention


def check(
    device: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, *, masked: bool,
    rotated: bool,
) -> None:  # fmt: skip
    """Compare output and gradients with float64, by pairs of tokens."""
    batch, queries, keys, heads, dim = sizes
    q, k, v = (
        torch.randn(batch, tokens, heads, dim).to(device, dtype).requires_grad_()
        for tokens in (queries, keys, keys)
    )
    options: dict[str, Any] = {"eps": 0.03, "rotation": None, "key_mask": None}
    if rotated:
        options["rotation"] = rotations(keys, dim).to(device)
    if masked:
        options["key_mask"] = torch.rand(batch, keys, device=device) < 0.5
        options["key_mask"][-1] = batch == 1
    out = linear_attention(q, k, v, backend="triton", **options)
    assert out.dtype == dtype
    leaves = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    want = linear_truth(*leaves, **options)
    along = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), along)
    expected = torch.autograd.grad(want, leaves, along.double())
    # 16-bit inputs are multiplied as TF32, which has the fraction of float16.
    unit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    # dq and dk are differences of what is as large as dv.
    largest = max(grad.abs().max() for grad in expected)
    assert (out.double() - want).abs().max() <= 4 * unit * want.abs().max()
    for got, truth in zip(found, expected, strict=True):
        assert (got.double() - truth).abs().max() <= 4 * unit * largest


@pytest.mark.parametrize(
    ("sizes", "dtype", "masked"),
    [
        pytest.param((2, 31, 31, 2, 16), torch.float32, True, id="prime"),
        pytest.param((1, 31, 31, 2, 32), torch.bfloat16, True, id="prime-bfloat16"),
        pytest.param((1, 33, 65, 1, 40), torch.float16, True, id="one-over-float16"),
        pytest.param((1, 1, 33, 2, 12), torch.float32, False, id="one-query"),
        pytest.param((3, 33, 1, 1, 16), torch.float32, False, id="one-key"),
        pytest.param((1, 17, 17, 1, 80), torch.bfloat16, False, id="padded-channels"),
        pytest.param((1, 9, 9, 1, 160), torch.float16, False, id="wide-heads"),
    ],
)
def test_equals_the_definition(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, masked: bool, device: str
) -> None:
    check(device, sizes, dtype, masked=masked, rotated=sizes[1] == sizes[2])


@pytest.mark.parametrize("tokens", [32, 71])
def test_spans_that_are_added_up(tokens: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.kernels.linear.triton_passes._SHORTEST_SPAN", 1)
    check(device, (2, tokens, tokens, 1, 6), torch.float32, masked=True, rotated=True)


def test_any_strides_and_what_is_left_in_padding(device: str) -> None:
    q, k, v = (torch.randn(2, 3, 41, 16, device=device).transpose(1, 2) for _ in range(3))
    want = linear_attention(q, k[:, :29], v[:, :29])
    k[:, 29:], v[:, 30:] = float("nan"), float("inf")
    mask = (torch.arange(41, device=device) < 29).expand(2, -1)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = linear_attention(*leaves, key_mask=mask, backend="triton")
    torch.testing.assert_close(out, want)
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert grad.isfinite().all()


def test_it_is_deterministic(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.kernels.linear.triton_passes._SHORTEST_SPAN", 1)
    results = []
    qkv = [torch.randn(1, 70, 2, 16, device=device).requires_grad_() for _ in range(3)]
    for _ in range(2):
        out = linear_attention(*qkv, backend="triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 4, 1, 8), torch.float64, "the kernels take torch.float32, .*; got torch.float64"),
        ((1, 4, 1, 257), torch.float32, "head_dim may be 1 to 256; got 257"),
    ],
)
def test_what_the_kernels_do_not_take(
    shape: tuple[int, ...], dtype: torch.dtype, message: str, device: str
) -> None:
    x = torch.zeros(shape, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=message):
        linear_attention(x, x, x, backend="triton")


def test_tangent(device: str) -> None:
    x, dx = (
        tuple(torch.randn(2, tokens, 2, 16).to(device) for tokens in (33, 33, 33)) for _ in range(2)
    )
    options: dict[str, Any] = {
        "eps": 0.03,
        "rotation": rotations(33, 16).to(device),
        "key_mask": torch.rand(2, 33, device=device) < 0.5,
    }
    found = torch.func.jvp(lambda *x: linear_attention(*x, backend="triton", **options), x, dx)
    exact = (tuple(t.double() for t in some) for some in (x, dx))
    want = torch.func.jvp(lambda *x: linear_truth(*x, **options), *exact)
    for got, truth in zip(found, want, strict=True):
        torch.testing.assert_close(got.double(), truth, atol=1e-5, rtol=1e-5)
