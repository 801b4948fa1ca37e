"""In an autocast region sparse attention does what torch does for its own attention."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_families
import tiny_wan
import torch
from cuda_norms import CudaNorms

import diffattn
from diffattn import AttentionMask, FullMask, TokenGrid, VMoBAAttn, attention
from diffattn.attach.compiled import remember, traced_attention, traced_method
from diffattn.kernels.linear import linear_attention
from diffattn.methods import from_dict
from diffattn.methods.base import Site
from diffattn.methods.gna import GNAAttn
from diffattn.models import FAMILIES, family_of
from diffattn.selected import selected_attention
from diffattn.selected.key_blocks import KeyBlocks

DTYPES = (torch.bfloat16, torch.float16)
SHAPE = (2, 60, 2, 16)
GRID = TokenGrid(3, 4, 5)


def inputs(*dtypes: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator).to(dtype).requires_grad_() for dtype in dtypes]


class TestOperators:
    """Inside a region an operator is the operator over tensors in the region's dtype."""

    def mixed(self, dtype: torch.dtype) -> list[torch.Tensor]:
        return inputs(torch.float32, torch.float32, dtype)

    def check(self, attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> None:
        given, cast = self.mixed(dtype), self.mixed(dtype)
        expected = attend(*(x.to(dtype) for x in cast))
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads = torch.autograd.grad(expected, cast, weight)
        with torch.autocast("cpu", dtype):
            out = attend(*given)
            found = torch.autograd.grad(out, given, weight)  # backward inside of the region, too
        assert out.dtype == dtype
        assert torch.equal(out, expected)
        for one, other in zip(found, grads, strict=True):
            assert torch.equal(one, other)

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(self, request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    @pytest.fixture
    def mask(self) -> AttentionMask:
        return GNAAttn(window=(3, 3, 3)).for_model("wan", GRID).mask(GRID)

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_attention(self, backend: str, dtype: torch.dtype, mask: AttentionMask) -> None:
        self.check(lambda q, k, v: attention(q, k, v, mask, backend=backend), dtype)

    def test_attention_with_its_lse(self, dtype: torch.dtype, mask: AttentionMask) -> None:
        self.check(lambda q, k, v: attention(q, k, v, mask, return_lse=True)[0], dtype)

    def test_dense_attention(self, dtype: torch.dtype) -> None:
        self.check(attention, dtype)

    def test_selected_attention(self, dtype: torch.dtype) -> None:
        blocks = KeyBlocks.of_lengths([30, 20, 10])
        bits = torch.full((2, 2, 60, 1), 0b101, dtype=torch.int32)
        self.check(lambda q, k, v: selected_attention(q, k, v, blocks, bits), dtype)

    def test_linear_attention(self, dtype: torch.dtype) -> None:
        self.check(linear_attention, dtype)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_traced_attention(self, compiled: bool, dtype: torch.dtype) -> None:
        source = GNAAttn(window=(3, 3, 3)).for_model("wan", GRID)
        serial = remember(source)
        self.check_traced(
            lambda q, k, v: traced_attention(q, k, v, GRID, serial), dtype, compiled=compiled
        )

    @pytest.mark.parametrize("compiled", [False, True])
    def test_traced_method(self, compiled: bool, dtype: torch.dtype) -> None:
        source = ByMethod()  # found for as long as it lives
        serial = remember(source)
        self.check_traced(
            lambda q, k, v: traced_method(q, k, v, GRID, serial), dtype, compiled=compiled
        )

    def check_traced(
        self, attend: Callable[..., torch.Tensor], dtype: torch.dtype, *, compiled: bool
    ) -> None:
        torch._dynamo.reset()
        if compiled:
            attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
        self.check(attend, dtype)

    def test_float64_stays(self, mask: AttentionMask) -> None:
        given = inputs(*[torch.float64] * 3)
        expected = attention(*given, mask)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(attention(*given, mask), expected)

    def test_float64_beside_others_is_refused(self, mask: AttentionMask) -> None:
        given = inputs(torch.float64, torch.float32, torch.float32)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError) as error:  # noqa: PT011
            attention(*given, mask)
        assert str(error.value) == (
            "query is torch.float64, key torch.bfloat16 and value torch.bfloat16, but all three"
            " must be of one floating-point dtype"
        )

    def test_outside_of_a_region_nothing_is_cast(self) -> None:
        given = inputs(torch.float32, torch.float32, torch.bfloat16)
        with pytest.raises(ValueError, match=r"must be of one floating-point dtype$"):
            attention(*given, FullMask(GRID))


class ByMethod:
    """Attends by a method that compiled code calls as one operator."""

    method = VMoBAAttn(topk=1).for_model("wan", GRID)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grid: TokenGrid,
        *,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        site = Site("wan", 0, 2, grid)
        return self.method.attend(query, key, value, site, scale=scale, key_mask=key_mask)


def step(model: torch.nn.Module, case: Any, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A training step in a region with CUDA's norms: the output, and the norm of the gradients."""
    model.train()
    model.zero_grad()
    with CudaNorms(), torch.autocast("cpu", dtype):
        out = model(**case.inputs(), return_dict=False)[0]
        # float16 needs accelerate's scaler; these losses are small enough without.
        loss = out.float().square().mean()
    loss.backward()
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite() for grad in grads)
    return out.detach().float(), float(torch.stack(grads).norm())


WAN = tiny_families.Case(
    build=tiny_wan.transformer,
    inputs=lambda: {
        "hidden_states": tiny_families.noise(2, 16, 3, 8, 12),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": tiny_families.noise(2, 7, tiny_wan.TEXT_DIM, seed=1),
    },
    grids=(TokenGrid(3, 4, 6),),
    sites=(),
    pixel=lambda t, h, w: (),
)
CASES = tiny_families.CASES | {"wan": WAN}
WHOLE = {"type": "gna", "window": "full", "dense_layers": 0, "dense_steps": 0}


# Families with more than one kind of call at a site, which tests of their own make.
SEVERAL_CALLS = {"cosmos-3", "wan-animate-2"}


def test_every_family_is_here() -> None:
    found = {family_of(case.build()).name for case in CASES.values()}
    assert found == {family.name for family in FAMILIES} - SEVERAL_CALLS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_family_trains_like_the_stock_model(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    stock, stock_norm = step(case.build(), case, dtype)
    model = case.build()
    attachment = diffattn.set_attn_processor(model, from_dict(WHOLE))
    out, norm = step(model, case, dtype)
    assert attachment is not None
    assert attachment.sparse_calls
    error, scale = (out - stock).abs().max(), stock.abs().max()
    if error >= 0.05 * scale:
        # Of some models with random weights, rounding moves the output far by itself.
        with torch.no_grad():
            exact = case.build().train()(**case.inputs(), return_dict=False)[0]
        assert error < 1.5 * (stock - exact).abs().max()
    assert abs(norm - stock_norm) < 0.05 * stock_norm


CLEAR = {"type": "clear", "radius": 2, "frame_radius": 1, "down_factor": 2}
METHODS = [
    *(("wan", {"type": name}) for name in ("radial", "vmoba", "agent", "linfusion", "freeswim")),
    *(("hunyuanvideo", {"type": name}) for name in ("radial", "vmoba", "agent", "linfusion")),
    *(("sdxl", {"type": name}) for name in ("agent", "linfusion")),
    *((name, CLEAR) for name in ("wan", "hunyuanvideo", "sdxl")),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "method"), METHODS, ids=lambda it: str(getattr(it, "get", str)("type"))
)
def test_every_method_trains(name: str, method: dict[str, Any], dtype: torch.dtype) -> None:
    case = CASES[name]
    sparse = from_dict(method | {"dense_layers": 0, "dense_steps": 0})
    model = case.build()
    attachment = diffattn.set_attn_processor(model, sparse)
    low, _ = step(model, case, dtype)
    assert attachment is not None
    assert attachment.sparse_calls
    wide = case.build().train()
    diffattn.set_attn_processor(wide, sparse)
    with torch.no_grad():
        full = wide(**case.inputs(), return_dict=False)[0]
    # VMoBA and Agent choose tokens by scores: near ties may fall either way.
    assert (low - full).abs().mean() < 0.1 * full.abs().mean()


@pytest.mark.parametrize("method", [WHOLE, {"type": "vmoba"}], ids=lambda it: it["type"])
def test_compiled_blocks_cast_as_well(method: dict[str, Any]) -> None:
    outs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = WAN.build()
        sparse = from_dict(method | {"dense_layers": 0, "dense_steps": 0})
        attachment = diffattn.set_attn_processor(model, sparse)
        assert attachment is not None
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outs.append(model(**WAN.inputs(), return_dict=False)[0])
        assert bool(attachment.sparse_calls) is not compiled
    assert outs[0].dtype == torch.bfloat16
    assert torch.equal(*outs)
