"""The float64 truth against torch's own attention, and what it does where that gives NaN."""

import pytest
import torch
import torch.nn.functional as F

from diffattn.kernels.reference import reference_attention


def inputs(*shape: int) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("masked", [False, True])
def test_equals_sdpa_with_gradients(masked: bool) -> None:
    q, k, v = inputs(2, 19, 3, 8)
    mask = torch.rand(2, 3, 19, 19) < 0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True
    out, _ = reference_attention(q, k, v, mask)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), weight)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (q, k, v), weight))


def test_lse_is_the_log_of_the_sum_of_exponentials() -> None:
    q, k, v = inputs(2, 7, 3, 4)
    _, lse = reference_attention(q, k, v, None, scale=0.7)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.7
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_large_scores_do_not_overflow() -> None:
    q, k, v = inputs(1, 5, 1, 4)
    out, lse = reference_attention(q * 1e4, k, v, None)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_key_mask_removes_keys() -> None:
    q, k, v = inputs(2, 9, 2, 4)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[:, 6:] = False
    out, lse = reference_attention(q, k, v, None, key_mask=key_mask)
    shorter, shorter_lse = reference_attention(q, k[:, :6], v[:, :6], None)
    torch.testing.assert_close(out, shorter)
    torch.testing.assert_close(lse, shorter_lse)


def test_a_row_that_sees_nothing_gives_0_and_no_gradient() -> None:
    q, k, v = inputs(1, 6, 2, 4)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2] = False
    out, lse = reference_attention(q, k, v, mask)
    assert (out[:, 2] == 0).all()
    assert (lse[..., 2] == -torch.inf).all()
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert (gradients[0][:, 2] == 0).all()
    assert all(g.isfinite().all() for g in gradients)
