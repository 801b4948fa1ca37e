"""attention(): masks and layouts in, the right backend, clear errors."""

import pytest
import torch

from diffattn import BlockLayout, FullMask, PredicateMask, RadialAttn, TokenGrid, attention
from diffattn.attention import BACKEND_VARIABLE
from diffattn.kernels.reference import reference_attention

GRID = TokenGrid(5, 4, 7, text_after=3)


def inputs(
    batch: int = 2, heads: int = 3, head_dim: int = 16, grid: TokenGrid = GRID
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, batch, grid.tokens, heads, head_dim)
    return tuple(torch.randn(shape, generator=generator).unbind(0))


MASKS = {
    "full": FullMask(GRID),
    "radial": RadialAttn(block_size=16).mask(GRID),
    "paper": RadialAttn(rule="paper").mask(GRID),
    "causal and near": PredicateMask(GRID, lambda q, k: k <= q)
    & PredicateMask(GRID, lambda q, k: (q - k).abs() < 20),
    "some rows empty": PredicateMask(GRID, lambda q, k: (q % 3 == 1) & (k < 40)),
}


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_dense_attention_under_the_mask(name: str, backend: str | None) -> None:
    q, k, v = inputs()
    want, want_lse = reference_attention(q, k, v, MASKS[name].dense())
    out, lse = attention(q, k, v, MASKS[name], return_lse=True, backend=backend)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-5)
    layout = MASKS[name].blocks(32, 16)
    torch.testing.assert_close(attention(q, k, v, layout, backend=backend), out)


@pytest.mark.parametrize("name", MASKS)
def test_gradients(name: str) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    weight = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(1))
    (attention(*leaves, MASKS[name]) * weight).sum().backward()
    got = [x.grad.clone() for x in leaves]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, _ = reference_attention(*exact, MASKS[name].dense())
    (out * weight).sum().backward()
    for mine, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth.grad, atol=1e-5, rtol=1e-4)


def test_no_mask_is_dense() -> None:
    q, k, v = inputs()
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, FullMask(GRID)))


@pytest.mark.parametrize("mask", [None, MASKS["radial"]], ids=["dense", "sparse"])
def test_padded_keys_are_hidden(mask: object) -> None:
    q, k, v = inputs()
    key_mask = torch.rand(2, GRID.tokens, generator=torch.Generator().manual_seed(2)) < 0.6
    dense = None if mask is None else mask.dense()
    want, _ = reference_attention(q, k, v, dense, key_mask=key_mask)
    out = attention(q, k, v, mask, key_mask=key_mask)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)


def test_a_sample_whose_keys_are_all_padding_gives_zeros() -> None:
    q, k, v = inputs()
    key_mask = torch.tensor([[True], [False]]).expand(2, GRID.tokens)
    for mask in (None, MASKS["radial"]):
        out = attention(q, k, v, mask, key_mask=key_mask)
        assert not out[1].any()
        assert out[0].any()


def test_the_environment_chooses_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    monkeypatch.setenv(BACKEND_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'; choose from cpu, reference"):
        attention(q, k, v, MASKS["full"])
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    out = attention(q, k, v, MASKS["full"])
    want, _ = reference_attention(q, k, v, None)
    assert torch.equal(out, want.float())


def test_other_devices_say_what_is_missing() -> None:
    q, k, v = (x.to("meta") for x in inputs())
    with pytest.raises(NotImplementedError, match=r"sparse kernel for the CPU only.* are on meta"):
        attention(q, k, v, MASKS["full"])


def test_errors_say_what_is_wrong() -> None:
    q, k, v = inputs()
    layout: BlockLayout = MASKS["full"].blocks(16)
    for arguments, message in [
        ((q[0], k, v, layout), r"query has shape \(143, 3, 16\), but must be \(batch, tokens"),
        ((q, k, v[:, 1:], layout), "do not fit: batch and heads must be equal"),
        ((q, k[:, :, :2], v[:, :, :2], layout), "do not fit: batch and heads must be equal"),
        ((q, k[..., :8], v[..., :8], layout), "head_dim is 16 in query and 8 in key"),
        ((q[:, 1:], k[:, 1:], v[:, 1:], layout), "over 143 x 143 tokens, but .* have 142 and 142"),
        ((q, k, v, layout.to("meta")), "blocks are on meta and the query on cpu"),
        ((q, k, v, "radial"), "mask is a str, but must be an AttentionMask or a BlockLayout"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*arguments)
    with pytest.raises(ValueError, match=r"key_mask is torch.float32 \(2, 143\), but must be bool"):
        attention(q, k, v, layout, key_mask=torch.ones(2, 143))
    with pytest.raises(ValueError, match="return_lse needs a mask"):
        attention(q, k, v, return_lse=True)
