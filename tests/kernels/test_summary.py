"""Attention to summary keys, in matrix products and in Triton, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from summary_oracle import summary_truth

from diffattn.blocks import pack_bits
from diffattn.kernels.summary import summary_attention


def case(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    *,
    block_q: int,
    shared: bool = False,
    device: str = "cpu",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v and bias that want gradients, and the bits."""
    batch, queries, keys, heads, dim = sizes
    leaves = [torch.randn(batch, n, heads, dim).to(device, dtype) for n in (queries, keys, keys)]
    lead = (1, 1) if shared else (batch, heads)
    bias = torch.randn(*lead, keys, device=device)
    bias[..., keys // 2] = -torch.inf
    hidden = torch.rand(*lead, -(-queries // block_q), keys, device=device) < 0.4
    hidden[..., 0, :] |= not shared  # a block of queries that sees nothing
    return [x.requires_grad_() for x in (*leaves, bias)], pack_bits(hidden)


def check(leaves: list[torch.Tensor], hidden: torch.Tensor, **options: Any) -> None:
    """Compare results and gradients, of the log-sum-exp too, with float64."""
    out, lse = summary_attention(*leaves, hidden, **options)
    truth = [x.detach().double().requires_grad_() for x in leaves]
    options.pop("backend", None)
    want, want_lse = summary_truth(*truth, hidden, **options)
    assert out.dtype == leaves[0].dtype
    assert torch.equal(lse.isinf(), want_lse.isinf())
    seen = want_lse.isfinite()
    along, along_lse = torch.randn_like(out), torch.randn_like(lse)
    loss = (out * along).sum() + (lse * along_lse)[seen].sum()
    want_loss = (want * along.double()).sum() + (want_lse * along_lse.double())[seen].sum()
    unit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    at_most = 4 * unit[leaves[0].dtype]
    assert (out.double() - want).abs().max() <= at_most * want.abs().max()
    torch.testing.assert_close(lse.double()[seen], want_lse[seen], atol=at_most, rtol=at_most)
    found = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(want_loss, truth)
    largest = max(grad.abs().max() for grad in expected)
    for got, right, leaf in zip(found, expected, leaves, strict=True):
        assert got.dtype == leaf.dtype
        rounding = max(at_most, 4 * unit[leaf.dtype])
        assert (got.double() - right).abs().max() <= rounding * largest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "block_q", "shared"),
    [
        pytest.param((2, 70, 37, 2, 8), 16, False, id="odd"),
        pytest.param((2, 5, 1, 1, 3), 8, True, id="one key, one short block"),
        pytest.param((1, 64, 64, 3, 16), 64, True, id="whole blocks"),
    ],
)
def test_equals_the_definition(
    sizes: tuple[int, int, int, int, int], block_q: int, shared: bool, dtype: torch.dtype
) -> None:
    check(*case(sizes, dtype, block_q=block_q, shared=shared), block_q=block_q)


@given(st.integers(1, 90), st.integers(1, 70), st.integers(1, 40), st.floats(-2, 2))
@settings(max_examples=25, deadline=None)
def test_equals_the_definition_at_any_size(
    queries: int, keys: int, block_q: int, scale: float
) -> None:
    sizes = (1, queries, keys, 2, 4)
    check(*case(sizes, torch.float64, block_q=block_q), block_q=block_q, scale=scale)


def test_parts_of_the_queries_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, hidden = case((1, 200, 40, 2, 8), torch.float64, block_q=16)
    whole = summary_attention(*leaves, hidden, block_q=16)
    monkeypatch.setattr("diffattn.kernels.summary.torch_passes._SCORES_AT_ONCE", 3000)
    for got, want in zip(summary_attention(*leaves, hidden, block_q=16), whole, strict=True):
        torch.testing.assert_close(got, want)
    check(leaves, hidden, block_q=16)


@pytest.mark.parametrize(
    ("sizes", "dtype", "block_q", "shared"),
    [
        pytest.param((2, 70, 37, 2, 24), torch.float32, 16, False, id="odd"),
        pytest.param((1, 130, 70, 1, 64), torch.bfloat16, 64, True, id="bfloat16"),
        pytest.param((1, 33, 33, 2, 40), torch.float16, 32, False, id="float16"),
        pytest.param((1, 97, 5, 1, 16), torch.float32, 48, False, id="blocks of 48"),
    ],
)
@pytest.mark.parametrize("scale", [None, -0.7])
def test_triton_equals_the_definition(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    block_q: int,
    shared: bool,
    scale: float | None,
    device: str,
) -> None:
    leaves, hidden = case(sizes, dtype, block_q=block_q, shared=shared, device=device)
    check(leaves, hidden, block_q=block_q, scale=scale, backend="triton")


def test_triton_takes_any_strides_and_keys_in_float32(device: str) -> None:
    leaves, hidden = case((2, 40, 20, 2, 16), torch.bfloat16, block_q=16, device=device)
    q, k, v, bias = (x.detach() for x in leaves)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (x.float().transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v))
    found = [x.requires_grad_() for x in (q, k, v, bias)]
    check(found, hidden, block_q=16, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_keys_that_do_not_exist_may_hold_nan(backend: str, device: str) -> None:
    leaves, hidden = case((1, 32, 9, 1, 16), torch.float32, block_q=16, device=device)
    q, k, v, bias = (x.detach() for x in leaves)
    want = summary_attention(q, k, v, bias, hidden, block_q=16)
    k[:, 4], v[:, 4] = torch.nan, torch.nan  # the key of bias -inf
    got = summary_attention(q, k, v, bias, hidden, block_q=16, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(got[0], want[0], atol=2e-6, rtol=2e-6)


def test_bad_input_is_named() -> None:
    (q, k, v, bias), hidden = case((2, 40, 20, 2, 16), torch.float32, block_q=16)
    with pytest.raises(ValueError, match=r"hidden must be torch.int32 \(1 or 2, 1 or 2, 5, 1\)"):
        summary_attention(q, k, v, bias, hidden, block_q=8)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 \(1 or 2, 1 or 2, 20\)"):
        summary_attention(q, k, v, bias[..., 1:], hidden, block_q=16)
    with pytest.raises(ValueError, match="k and v must have the batch, heads and head_dim of q"):
        summary_attention(q, k, v[:, 1:], bias, hidden, block_q=16)
    with pytest.raises(ValueError, match=r"k and v of the dtype of q or torch\.float32"):
        summary_attention(q, k.half(), v.half(), bias, hidden, block_q=16)
    with pytest.raises(ValueError, match="block_q must be at least 1 query; got 0"):
        summary_attention(q, k, v, bias, hidden, block_q=0)
    with pytest.raises(ValueError, match="backend must be 'torch' or 'triton'; got 'flex'"):
        summary_attention(q, k, v, bias, hidden, block_q=16, backend="flex")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q, k, v must be non-empty"):
        summary_attention(q[:, :0], k, v, bias, hidden, block_q=16)


def test_forward_mode_is_refused_by_name() -> None:
    (q, k, v, bias), hidden = case((1, 16, 3, 1, 4), torch.float32, block_q=16)
    with pytest.raises(NotImplementedError, match="summary keys has no forward-mode derivative"):
        torch.func.jvp(
            lambda q: summary_attention(q, k, v, bias, hidden, block_q=16)[0], (q,), (q,)
        )


def test_the_operator_obeys_torch() -> None:
    (q, k, v, bias), hidden = case((1, 20, 5, 1, 4), torch.float64, block_q=8)
    torch.library.opcheck(
        torch.ops.diffattn.summary.default,
        (q, k, v, bias, hidden, 8, 0.5, "torch"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
