"""Function modes that change torch's attention have their effect on sparse attention."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import tiny_families
import torch
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import diffattn
from diffattn import TokenGrid, attention
from diffattn.interception import modes_are_active
from diffattn.methods import from_dict
from diffattn.methods.base import Site
from diffattn.methods.gna import GNAAttn

GRID = TokenGrid(3, 4, 5)
SHAPE = (2, 60, 2, 16)


class Watching(TorchFunctionMode):
    """Calls what it sees, and counts calls of torch's attention."""

    def __init__(self, factor: float = 1.0, **added: Any) -> None:
        super().__init__()
        self.seen, self._factor, self._added = 0, factor, added

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            self.seen += 1
            out = func(*args, **kwargs, **self._added)
            return out if self._factor == 1 else out * self._factor
        return func(*args, **kwargs)


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def attend_by(method: dict[str, Any]) -> Callable[..., torch.Tensor]:
    made = from_dict(method | {"dense_layers": 0, "dense_steps": 0}).for_model("wan", GRID)
    module = torch.nn.Module()
    module.heads, module.head_dim = SHAPE[2:]  # type: ignore[assignment]
    with_weights = made.type in ("sla", "sla2")
    weights = made.site_weights(module, joint=False) if with_weights else None
    site = Site("wan", 0, 2, GRID, weights=weights)
    return lambda q, k, v: made.attend(q, k, v, site)


METHODS: dict[str, dict[str, Any]] = {
    "radial": {},
    "gna": {"window": (3, 3, 3)},
    "clear": {"radius": 2, "frame_radius": 1, "down_factor": 2},
    "vmoba": {},
    "linfusion": {},
    "agent": {"cell": (1, 2, 2)},
    "freeswim": {},
    "sol": {"block": 16},
    "block-topk": {"block": 16, "remainder": "summary"},
    "svg2": {"remainder": "summary", "query_cluster": 20, "key_cluster": 8, "block": 16},
    "vsa": {"tile": (4, 4, 4)},
    "attention-tile": {},
    "lvsa": {},
    "sla": {"block_q": 16, "block_kv": 16, "keep": 0.3},
    "sla2": {"block_q": 16, "block_kv": 16, "keep": 0.3},
}


@pytest.mark.parametrize("name", METHODS)
class TestMethods:
    def test_scores_are_skipped(self, name: str, tensors: list[torch.Tensor]) -> None:
        attend = attend_by({"type": name, **METHODS[name]})
        with AttentionScoreSkipFunctionMode():
            out = attend(*tensors)
        assert torch.equal(out, tensors[2])

    def test_a_mode_that_only_looks_sees_one_call(
        self, name: str, tensors: list[torch.Tensor]
    ) -> None:
        attend = attend_by({"type": name, **METHODS[name]})
        expected = attend(*tensors)
        with Watching() as mode:
            out = attend(*tensors)
        assert mode.seen == 1
        assert torch.equal(out, expected)


class TestModes:
    @pytest.fixture
    def attend(self) -> Callable[..., torch.Tensor]:
        mask = GNAAttn(window=(3, 3, 3)).for_model("wan", GRID).mask(GRID)
        return lambda q, k, v: attention(q, k, v, mask)

    def test_the_inner_mode_comes_first(
        self, attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor]
    ) -> None:
        expected = attend(*tensors)
        with Watching(3.0) as outer, Watching(2.0) as inner:
            assert torch.equal(attend(*tensors), expected * 2 * 3)
            assert _get_current_function_mode_stack() == [outer, inner]
        with Watching() as unseen, AttentionScoreSkipFunctionMode():
            assert torch.equal(attend(*tensors), tensors[2])
        assert unseen.seen == 0

    def test_gradients_go_through(
        self, attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor]
    ) -> None:
        leaves = [x.requires_grad_() for x in tensors]
        expected = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
        with Watching():
            found = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_an_argument_that_sparse_attention_lacks(
        self, attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor]
    ) -> None:
        with Watching(is_causal=True) as mode, pytest.raises(NotImplementedError) as error:
            attend(*tensors)
        assert str(error.value) == (
            "Watching gives scaled_dot_product_attention more arguments (is_causal), which sparse"
            " attention does not take: leave the mode's layers dense, by a pattern of"
            " set_attn_processor"
        )
        assert mode.seen == 1
        assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("method", ["gna", "vmoba", "agent"])
def test_layer_skip_with_attention_scores(method: str) -> None:
    """diffusers' hook, on the family that it takes: a layer gives its values."""
    case = tiny_families.CASES["qwen-image"]
    settings = {"window": "full"} if method == "gna" else {}
    skip = LayerSkipConfig(
        indices=[0, 1], skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    outs = {}
    for attached in (False, True):
        for skipped in (False, True):
            model = case.build()
            if attached:
                diffattn.set_attn_processor(
                    model,
                    from_dict({"type": method, "dense_layers": 0, "dense_steps": 0, **settings}),
                )
            if skipped:
                apply_layer_skip(model, skip)
            with torch.no_grad():
                outs[attached, skipped] = model(**case.inputs(), return_dict=False)[0]
    # With the scores skipped in all layers, no method is left.
    torch.testing.assert_close(outs[True, True], outs[False, True], atol=1e-5, rtol=1e-5)
    assert (outs[True, True] - outs[True, False]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["gna", "clear"])
def test_compiled_blocks_skip_scores_as_well(method: str) -> None:
    """By a method that is an operator otherwise, and by a method that is not."""
    case = tiny_families.CASES["qwen-image"]
    more = {"gna": {"window": 3}, "clear": {"radius": 2, "down_factor": 2}}.get(method, {})
    skip = LayerSkipConfig(
        indices=[1], skip_attention=False, skip_attention_scores=True, skip_ff=False
    )
    outs = {}
    for how in ("plain", "skipped", "compiled"):
        torch._dynamo.reset()
        model = case.build()
        diffattn.set_attn_processor(
            model, from_dict({"type": method, "dense_layers": 0, "dense_steps": 0, **more})
        )
        if how != "plain":
            apply_layer_skip(model, skip)
        if how == "compiled":
            model.transformer_blocks[1].compile(backend="eager")
        with torch.no_grad():
            outs[how] = model(**case.inputs(), return_dict=False)[0]
    torch.testing.assert_close(outs["compiled"], outs["skipped"], atol=1e-6, rtol=1e-5)
    assert (outs["skipped"] - outs["plain"]).abs().max() > 1e-3


def test_compiled_code_asks_for_modes_other_than_the_default_device() -> None:
    torch._dynamo.reset()
    asked = torch.compile(
        lambda x: x + 1 if modes_are_active() else x, fullgraph=True, backend="eager"
    )
    x = torch.zeros(3)
    with torch.device("cpu"):
        assert torch.equal(asked(x), x)
        assert not modes_are_active()
    with Watching():
        assert torch.equal(asked(x), x + 1)
        assert modes_are_active()
    assert torch.equal(asked(x), x)
