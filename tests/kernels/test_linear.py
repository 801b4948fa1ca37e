"""Linear attention in matrix products: against float64, by pairs of tokens, as it is defined."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import linear_truth, rotations

from diffattn.kernels.linear import linear_attention
from diffattn.kernels.linear.torch_passes import TorchPasses

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(
    batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype = torch.float64
) -> Qkv:
    q, k, v = (
        torch.randn(batch, tokens, heads, dim, dtype=dtype).requires_grad_()
        for tokens in (queries, keys, keys)
    )
    return q, k, v


def key_masks(batch: int, keys: int) -> torch.Tensor:
    """About half of the keys; none at all in the last sample."""
    mask = torch.rand(batch, keys) < 0.5
    mask[:, 0] = True
    mask[-1] = batch == 1
    return mask


@given(
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 2, 13, 65]),
    keys=st.sampled_from([1, 3, 17, 64]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([2, 6, 10]),
    chunk=st.sampled_from([1, 7, 16, 4096]),
    masked=st.booleans(),
    rotated=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_output_and_gradients_are_those_of_the_definition(
    batch: int, queries: int, keys: int, heads: int, dim: int, chunk: int, masked: bool,
    rotated: bool,
) -> None:  # fmt: skip
    if rotated:
        queries = keys
    qkv = inputs(batch, queries, keys, heads, dim)
    options: dict[str, Any] = {
        "eps": 0.03,
        "key_mask": key_masks(batch, keys) if masked else None,
        "rotation": rotations(keys, dim) if rotated else None,
    }
    out = linear_attention(*qkv, chunk=chunk, **options)
    want = linear_truth(*qkv, **options)
    torch.testing.assert_close(out, want, atol=1e-10, rtol=1e-10)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, qkv, weights)
    for got, expected in zip(found, torch.autograd.grad(want, qkv, weights), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


@given(
    queries=st.sampled_from([1, 13, 65]),
    keys=st.sampled_from([1, 17, 64]),
    chunk=st.sampled_from([1, 7, 4096]),
    masked=st.booleans(),
    rotated=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_tangent_is_that_of_the_definition(
    queries: int, keys: int, chunk: int, masked: bool, rotated: bool
) -> None:
    queries = keys if rotated else queries
    qkv, tangents = (tuple(x.detach() for x in inputs(2, queries, keys, 2, 6)) for _ in range(2))
    options: dict[str, Any] = {
        "eps": 0.03,
        "key_mask": key_masks(2, keys) if masked else None,
        "rotation": rotations(keys, 6) if rotated else None,
    }
    found = torch.func.jvp(lambda *x: linear_attention(*x, chunk=chunk, **options), qkv, tangents)
    want = torch.func.jvp(lambda *x: linear_truth(*x, **options), qkv, tangents)
    torch.testing.assert_close(found, want, atol=1e-9, rtol=1e-9)


def test_tangent_is_what_finite_differences_say() -> None:
    qkv, tangents = (tuple(x.detach() for x in inputs(2, 13, 13, 2, 6)) for _ in range(2))
    options = {"key_mask": key_masks(2, 13), "rotation": rotations(13, 6)}
    _, found = torch.func.jvp(lambda *x: linear_attention(*x, **options), qkv, tangents)
    ahead, behind = (
        linear_attention(*(x + s * dx for x, dx in zip(qkv, tangents, strict=True)), **options)
        for s in (1e-5, -1e-5)
    )
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, (ahead - behind) / 2e-5, atol=1e-8, rtol=1e-6)


def test_tangents_of_both_results_of_a_pass() -> None:
    """Those of the denominator too, which linear attention does not hand out."""
    passes = TorchPasses(chunk=5)
    state, d_state = torch.rand(2, 2, 3, 6, 6, dtype=torch.float64)
    mean, d_mean = torch.rand(2, 2, 3, 6, dtype=torch.float64)
    q, dq = torch.randn(2, 2, 13, 3, 6, dtype=torch.float64)
    rotation = rotations(13, 6)
    (out, inverse), want = torch.func.jvp(
        lambda q, state, mean: passes.apply(q, state, mean, 0.1, rotation, None),
        (q, state, mean),
        (dq, d_state, d_mean),
    )
    found = passes.apply_tangent(q, state, mean, out, inverse, dq, d_state, d_mean, rotation)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-10)


def test_gradients_beside_a_tangent() -> None:
    qkv, tangents = inputs(2, 13, 9, 2, 6), inputs(2, 13, 9, 2, 6)

    def gradients(function: Any) -> tuple[torch.Tensor, ...]:
        out, tangent = torch.func.jvp(function, qkv, tangents)
        return torch.autograd.grad((out - tangent.detach()).square().sum(), qkv)

    for got, want in zip(gradients(linear_attention), gradients(linear_truth), strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def test_no_key_that_counts_gives_0() -> None:
    qkv = inputs(2, 5, 4, 2, 6)
    out = linear_attention(*qkv, key_mask=torch.tensor([[True] * 4, [False] * 4]))
    assert not out[1].any()
    assert out[0].any()
    grads = torch.autograd.grad(out.sum(), qkv)
    assert not any(grad[1].any() for grad in grads)


def test_what_is_left_in_padding_does_not_matter() -> None:
    q, k, v = inputs(1, 5, 9, 2, 6)
    want = linear_attention(q, k[:, :4], v[:, :4])
    mask = torch.arange(9)[None] < 4
    k, v = (x.detach().clone() for x in (k, v))
    k[:, 4:], v[:, 5:] = float("nan"), float("inf")
    k.requires_grad_(), v.requires_grad_()
    out = linear_attention(q, k, v, key_mask=mask)
    torch.testing.assert_close(out, want)
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("centre", [-7.0, 0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_and_large_features_in_16_bits(dtype: torch.dtype, centre: float) -> None:
    """Where elu(x) + 1 in 16 bits is off by 5 %, or overflows."""
    q, k, v = (x.to(dtype) for x in inputs(1, 257, 257, 2, 64))
    q, k = q + centre, k + centre
    out = linear_attention(q, k, v)
    want = linear_truth(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    error = (out - want).norm() / want.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_any_strides() -> None:
    qkv = inputs(2, 11, 11, 3, 8)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    torch.testing.assert_close(linear_attention(*turned), linear_attention(*qkv))


class TestProperties:
    """Those that make it hold at other resolutions than it was trained for."""

    def test_tokens_in_another_order(self) -> None:
        q, k, v = inputs(2, 23, 23, 2, 8)
        order = torch.randperm(23)
        out = linear_attention(q[:, order], k[:, order], v[:, order])
        torch.testing.assert_close(out, linear_attention(q, k, v)[:, order])

    def test_every_token_twice(self) -> None:
        qkv = inputs(2, 23, 23, 2, 8)
        out = linear_attention(*(torch.cat([x, x], 1) for x in qkv))
        torch.testing.assert_close(out[:, :23], linear_attention(*qkv))

    def test_constant_values(self) -> None:
        q, k, v = inputs(1, 23, 23, 2, 8)
        out = linear_attention(q - 5, k - 5, torch.ones_like(v), eps=1e-4)
        feature_q, feature_k = (q - 5).exp(), (k - 5).exp()
        assert q.max() < 5
        assert k.max() < 5
        z = torch.einsum("bqhd,bhd->bqh", feature_q, feature_k.mean(1)) + 1e-4
        torch.testing.assert_close(out, (1 - 1e-4 / z)[..., None].expand_as(out))
        assert out.max() < 0.999, "eps should matter here"


def test_one_graph_when_compiled() -> None:
    torch._dynamo.reset()
    qkv = inputs(2, 19, 19, 2, 8, torch.float32)
    options = {"key_mask": key_masks(2, 19), "rotation": rotations(19, 8)}
    compiled = torch.compile(linear_attention, backend="aot_eager", fullgraph=True)
    out, want = compiled(*qkv, **options), linear_attention(*qkv, **options)
    torch.testing.assert_close(out, want)
    found, expected = (torch.autograd.grad(x.square().sum(), qkv) for x in (out, want))
    for got, grad in zip(found, expected, strict=True):
        torch.testing.assert_close(got, grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1 token; got 0"),
        ({"backend": "cuda"}, "backend must be 'torch' or 'triton'; got 'cuda'"),
        (
            {"key_mask": torch.ones(2, 5)},
            r"key_mask must be torch.bool .* = \(2, 5\); got torch",
        ),
        (
            {"rotation": torch.zeros(2, 4, 4)},
            r"rotation must be torch.float32 \(2, 5, 4\); got torch.float32 \(2, 4, 4\)",
        ),
        (
            {"rotation": torch.zeros(2, 5, 4).double()},
            r"rotation must be .*; got torch.float64 \(2, 5, 4\)",
        ),
        (
            {"q": torch.zeros(2, 6, 2, 8), "rotation": torch.zeros(2, 6, 4)},
            "of the same tokens with an even head_dim; got 6 queries, 5 keys, head_dim 8",
        ),
        ({"k": torch.zeros(2, 5, 3, 8)}, "k and v must have the batch, heads and head_dim of q"),
        ({"v": torch.zeros(2, 5, 2, 8).half()}, "q, k, v must share one dtype"),
        ({"k": torch.zeros(2, 5, 2, 8, device="meta")}, "k is on meta, but q on cpu"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    call = {name: torch.zeros(2, 5, 2, 8) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        linear_attention(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU"
)
def test_the_kernel_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="run on a GPU, but q is on cpu; use backend='torch'"):
        linear_attention(*inputs(1, 5, 5, 2, 8, torch.float32), backend="triton")
