"""Backends by name: one of a program's own wherever a mask is attended under, and unknown ones."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_wan
import torch
from stock import NEARBY

import diffattn
from diffattn import FullMask, LinFusionAttn, PredicateMask, TokenGrid, VMoBAAttn, attention
from diffattn.attach.compiled import remember, traced_attention
from diffattn.blocks import BlockLayout
from diffattn.kernels.reference import reference_attention
from diffattn.methods import Site
from diffattn.operator import BACKEND_VARIABLE, BACKENDS

GRID = TokenGrid(2, 3, 4, text_after=2)
MASK = PredicateMask(GRID, lambda q, k: (q - k).abs() < 7)


class Mine:
    """Dense attention in torch under the layout's mask, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: BlockLayout,
        scale: float | None,
        key_mask: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls += 1
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        seen = layout.dense()
        if key_mask is not None:
            seen = seen & key_mask[:, None, None, :]
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse[..., None]).exp().nan_to_num()
        out = torch.einsum("bhqk,bkhd->bqhd", weights, value).contiguous()
        return out, lse if return_lse else None


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mine]:
    """A backend of this program's own under the name of "mine"."""
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    made = Mine()
    diffattn.register_backend("mine", made.forward)
    yield made
    del BACKENDS["mine"]


def tensors(count: int = 3, grid: TokenGrid = GRID) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, grid.tokens, 2, 8, generator=generator) for _ in range(count)]


def test_attention_by_it(mine: Mine) -> None:
    q, k, v, weight = tensors(4)
    key_mask = torch.rand(2, GRID.tokens, generator=torch.Generator().manual_seed(1)) < 0.8
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(
        *leaves, MASK, scale=0.3, key_mask=key_mask, return_lse=True, backend="mine"
    )
    (out * weight).sum().backward()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference_attention(*exact, MASK.dense(), scale=0.3, key_mask=key_mask)
    (want * weight).sum().backward()
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-6, rtol=1e-5)
    for mine_, truth in zip(leaves, exact, strict=True):
        torch.testing.assert_close(mine_.grad.double(), truth.grad, atol=1e-5, rtol=1e-4)
    assert mine.calls == 1


def test_the_environment_chooses_it(mine: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    want = attention(q, k, v, MASK)
    assert mine.calls == 0
    monkeypatch.setenv(BACKEND_VARIABLE, "mine")
    torch.testing.assert_close(attention(q, k, v, MASK), want)
    assert mine.calls == 1


def test_an_attached_model_by_it(mine: Mine, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, 2, 8, 6, generator=torch.Generator().manual_seed(2)),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.ones(1, 5, tiny_wan.TEXT_DIM),
        "return_dict": False,
    }
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, NEARBY)
    with torch.no_grad():
        want = model(**inputs)[0]
        monkeypatch.setenv(BACKEND_VARIABLE, "mine")
        got = model(**inputs)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert mine.calls == tiny_wan.LAYERS


@pytest.mark.parametrize("with_gradients", [False, True])
def test_compiled_code_by_it(with_gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    own, asked = Mine(), []

    def gradients(grad_out: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        asked.append(arguments)
        query, key, value, _, _, layout, scale, key_mask = arguments
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            out, _ = own.forward(*leaves, layout, scale, key_mask, False)
            return torch.autograd.grad(out, leaves, grad_out)

    diffattn.register_backend("mine", own.forward, gradients if with_gradients else None)
    try:
        monkeypatch.setenv(BACKEND_VARIABLE, "mine")
        serial = remember(NEARBY)

        def traced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return traced_attention(q, k, v, GRID, serial)

        leaves = [x.requires_grad_() for x in tensors()]
        out = torch.compile(traced, fullgraph=True, backend="aot_eager")(*leaves)
        out.square().sum().backward()
    finally:
        del BACKENDS["mine"]
    exact = [x.double().requires_grad_() for x in tensors()]
    want, _ = reference_attention(*exact, NEARBY.mask(GRID).dense())
    want.square().sum().backward()
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=1e-5)
    for got, truth in zip(leaves, exact, strict=True):
        torch.testing.assert_close(got.grad.double(), truth.grad, atol=1e-5, rtol=1e-4)
    assert len(asked) == with_gradients
    assert own.calls == 2


def test_operators_with_kernels_of_their_own_refuse_it(
    mine: Mine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BACKEND_VARIABLE, "mine")
    grid = TokenGrid(2, 3, 4)
    q, k, v = tensors(3, grid)
    site = Site("wan", 0, 1, grid)
    with pytest.raises(NotImplementedError, match="'mine' has no attention over selected blocks"):
        VMoBAAttn(topk=1).attend(q, k, v, site)
    linear = "'mine' has no linear attention; choose from triton, cpu, flex, reference"
    with pytest.raises(NotImplementedError, match=linear):
        LinFusionAttn(mid_dim=-1).attend(q, k, v, site)
    with pytest.raises(NotImplementedError, match=linear):
        LinFusionAttn(mid_dim=-1).attend(q.to("meta"), k.to("meta"), v.to("meta"), site)
    assert mine.calls == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unknown_names_are_errors_everywhere(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = "unknown backend 'tritno'; choose from triton, cpu, flex, reference"
    grid = TokenGrid(2, 3, 4)
    q, k, v = (x.to(device) for x in tensors(3, grid))
    for mask in (None, FullMask(grid)):
        with pytest.raises(ValueError, match=unknown):
            attention(q, k, v, mask, backend="tritno")
    monkeypatch.setenv(BACKEND_VARIABLE, "tritno")
    site = Site("wan", 0, 1, grid)
    methods = [LinFusionAttn(mid_dim=-1)]
    if device == "cpu":  # blocks cannot be worked out where tensors hold nothing
        methods += [NEARBY, diffattn.DenseAttn(), VMoBAAttn(topk=1)]
    for method in methods:
        with pytest.raises(ValueError, match=unknown):
            method.attend(q, k, v, site)


def test_what_cannot_be_registered(mine: Mine) -> None:
    register = diffattn.register_backend
    register("mine", mine.forward)  # the same once more
    with pytest.raises(ValueError, match="'mine' cannot be registered: the name is taken; choose"):
        register("mine", Mine().forward)
    with pytest.raises(ValueError, match="'cpu' cannot be registered: the name is taken"):
        register("cpu", mine.forward)
    with pytest.raises(ValueError, match="name is ' ', but must be text"):
        register(" ", mine.forward)
    with pytest.raises(TypeError, match="forward of backend 'other' is None, but must be a funct"):
        register("other", None)
    with pytest.raises(TypeError, match="gradients of backend 'other' is 3, but must be a funct"):
        register("other", mine.forward, 3)
    assert "other" not in BACKENDS
