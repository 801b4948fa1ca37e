"""Methods whose blocks Triton kernels pool, score, choose and list, beside torch's operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_device import triton_device

from diffattn import BlockTopKAttn, Method, SLA2Attn, SLAAttn, SolAttn, TokenGrid, VSAAttn
from diffattn.methods.base import Site
from diffattn.operator import BACKEND_VARIABLE
from diffattn.routing import AboveMean, Count, Mass
from diffattn.selected import by_kernels
from diffattn.selected.by_kernels import selection_kernels

HEADS, HEAD_DIM = 2, 16
VIDEO = TokenGrid(3, 5, 7)
WITH_TEXT = TokenGrid(3, 5, 6, 5, 20)
METHODS = {
    "sol": SolAttn(block=16),
    "sol, exact variance": SolAttn(block=16, variance="exact", order="hilbert"),
    "block-summary": BlockTopKAttn(block=32, remainder="block-summary"),
    "parts": BlockTopKAttn(block=16, keep=0.4),
    "mean": BlockTopKAttn(block=32, score="mean", order="raster", neighbours=1),
    "mass": BlockTopKAttn(block=16, score="mean", keep=Mass(0.8)),
    "count": BlockTopKAttn(block=16, keep=Count(3), parts=2),
    "above mean": BlockTopKAttn(block=16, keep=AboveMean(0.5)),
    "vsa": VSAAttn(keep=0.4),
    "sla": SLAAttn(block_q=32, block_kv=16, keep=0.3),
    "sla, elu": SLAAttn(block_q=16, block_kv=16, keep=0.3, features="elu"),
    "sla, relu": SLAAttn(block_q=16, block_kv=32, keep=0.3, features="relu"),
    "sla, rest": SLAAttn(block_q=16, block_kv=16, keep=0.3, linear="rest", drop=0.2),
    "sla2": SLA2Attn(block_q=16, block_kv=16, keep=0.3),
}


class _Module(torch.nn.Module):
    """What the weights of a site need to know of an attention module."""

    heads, head_dim = HEADS, HEAD_DIM

    def __init__(self) -> None:
        super().__init__()
        self.to_q = torch.nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)


def case(method: Method, grid: TokenGrid, batch: int = 2) -> tuple[list[torch.Tensor], Site]:
    """Tokens on the CPU, and a site with weights that are not 0."""
    torch.manual_seed(1)
    qkv = [torch.randn(batch, grid.tokens, HEADS, HEAD_DIM) for _ in range(3)]
    weights = method.site_weights(_Module(), joint=False)
    if weights is not None:
        for parameter in weights.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return qkv, Site("wan", 2, 30, grid, weights=weights)


def padding(grid: TokenGrid) -> torch.Tensor:
    """The first sample lacks text and some tokens of the video; the second lacks nothing."""
    key_mask = torch.ones(2, grid.tokens, dtype=torch.bool)
    key_mask[0, -18:] = False
    key_mask[0, 3:40:4] = False
    return key_mask


@torch.no_grad()
def results(
    method: Method, qkv: list[torch.Tensor], site: Site, device: str, **options: Any
) -> list[torch.Tensor]:
    """The output, and the selection, on the CPU."""
    tensors = [x.to(device) for x in qkv]
    if site.weights is not None:
        site.weights.to(device)
    if options.get("key_mask") is not None:
        options["key_mask"] = options["key_mask"].to(device)
    out = method.attend(*tensors, site, **options)
    chosen = method.selection(tensors[0], tensors[1], site, **options)  # type: ignore[attr-defined]
    return [out.cpu(), chosen.cpu()]


@pytest.mark.parametrize("name", METHODS)
def test_kernels_give_what_torch_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(METHODS[name], VIDEO, 1, monkeypatch)


@pytest.mark.parametrize("name", ["sol", "parts", "mass", "vsa", "sla, elu", "sla2"])
def test_text_and_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(METHODS[name], WITH_TEXT, 2, monkeypatch, key_mask=padding(WITH_TEXT))


def check(
    method: Method, grid: TokenGrid, batch: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Compare a call by kernels with the same call by torch's operators."""
    qkv, site = case(method, grid, batch)
    want = results(method, qkv, site, "cpu", **options)
    device = triton_device(monkeypatch)
    # Attention itself keeps the backend of the device: the interpreter takes long.
    monkeypatch.setattr(by_kernels, "backend_of", lambda device: "triton")
    assert selection_kernels(qkv[0].to(device)) is not None
    found = results(method, qkv, site, device, **options)
    assert torch.equal(found[1], want[1])
    torch.testing.assert_close(found[0], want[0], atol=2e-5, rtol=2e-5)


class TestWhenKernelsTakeACall:
    def test_not_where_gradients_are_wanted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.zeros(1, 4, 1, 16, device=triton_device(monkeypatch), requires_grad=True)
        monkeypatch.setenv(BACKEND_VARIABLE, "triton")
        assert selection_kernels(x) is None
        assert selection_kernels(x.detach()) is not None
        with torch.no_grad():
            assert selection_kernels(x) is not None

    def test_not_for_other_backends_and_dtypes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.zeros(1, 4, 1, 16, device=triton_device(monkeypatch))
        monkeypatch.setenv(BACKEND_VARIABLE, "reference")
        assert selection_kernels(x) is None
        monkeypatch.setenv(BACKEND_VARIABLE, "triton")
        assert selection_kernels(x) is not None
        assert selection_kernels(x.double()) is None
        assert selection_kernels(x.to("meta")) is None

    def test_not_under_transforms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.zeros(3, 4, device=triton_device(monkeypatch))
        monkeypatch.setenv(BACKEND_VARIABLE, "triton")
        found = []

        def look(x: torch.Tensor) -> torch.Tensor:
            found.append(selection_kernels(x))
            return x

        torch.func.jvp(look, (x,), (x,))
        torch.vmap(look)(x)
        assert found == [None, None]
