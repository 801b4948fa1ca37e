"""Tokens in another order for a whole forward: what permuting in every attention call gives."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import diffusers
import pytest
import stock
import tiny_edit_models
import tiny_families
import tiny_wan
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from stock import IN_TILES
from tiny_families import BATCH, noise, valid_text
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn import DenseAttn, TokenGrid, _compat
from diffattn.attach.backend import Group
from diffattn.attach.denoiser import attached_to
from diffattn.methods import Method
from diffattn.models import FAMILIES, family_of
from diffattn.orders import TileOrder

GRID = TokenGrid(3, 5, 7)  # no axis is a multiple of the tile's
IMAGE = TokenGrid(1, 7, 9)


Inputs = dict[str, Any]


def latents(channels: int, patch: int = 2) -> torch.Tensor:
    return noise(BATCH, channels, GRID.frames, patch * GRID.height, patch * GRID.width)


def wan_inputs(**changes: Any) -> Inputs:
    inputs = {
        "hidden_states": latents(16),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 5, tiny_wan.TEXT_DIM, seed=1),
    }
    return inputs | changes


def i2v_inputs() -> Inputs:
    return wan_inputs(
        hidden_states=latents(36),
        encoder_hidden_states=noise(BATCH, 512, tiny_wan.TEXT_DIM, seed=1),
        encoder_hidden_states_image=noise(BATCH, 3, 8, seed=2),
    )


def hunyuanvideo_inputs() -> Inputs:
    return {
        "hidden_states": latents(4),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def mochi_inputs() -> Inputs:
    return {
        "hidden_states": latents(4),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([900, 400]),
        "encoder_attention_mask": valid_text(7, 7, 4).bool(),
    }


def cogvideox_inputs(rope: bool) -> Inputs:
    inputs = {
        "hidden_states": latents(4).transpose(1, 2),
        "timestep": torch.tensor([900, 400]),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
    }
    if rope:
        angle = noise(GRID.tokens, 8, seed=3).repeat_interleave(2, dim=1)
        inputs["image_rotary_emb"] = (angle.cos(), angle.sin())
    return inputs


def ltx_inputs(**changes: Any) -> Inputs:
    inputs = {
        "hidden_states": noise(BATCH, GRID.tokens, 8),
        "encoder_hidden_states": noise(BATCH, 7, 16, seed=1),
        "timestep": torch.tensor([900.0, 400.0]),
        "encoder_attention_mask": valid_text(7, 7, 4),
        "num_frames": GRID.frames,
        "height": GRID.height,
        "width": GRID.width,
    }
    return inputs | changes


def flux_inputs(text: int = 7, **changes: Any) -> Inputs:
    inputs = {
        "hidden_states": noise(BATCH, IMAGE.tokens, 16),
        "encoder_hidden_states": noise(BATCH, text, 16, seed=1),
        "pooled_projections": noise(BATCH, 8, seed=2),
        "timestep": torch.tensor([0.9, 0.4]),
        "img_ids": tiny_families.image_ids(IMAGE.height, IMAGE.width),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    return inputs | changes


def packed_inputs(**changes: Any) -> Inputs:
    """Those of models with Flux' blocks."""
    inputs = flux_inputs()
    return {
        n: x for n, x in inputs.items() if n not in ("pooled_projections", "guidance")
    } | changes


def valid_keys() -> torch.Tensor:
    """bool (batch, tokens): some of the text is padding, also before text that counts."""
    mask = torch.ones(BATCH, 7 + IMAGE.tokens, dtype=torch.bool)
    mask[0, 0] = mask[1, 4:7] = False
    return mask


def krea2_inputs() -> Inputs:
    ids = tiny_families.image_ids(IMAGE.height, IMAGE.width)
    return {
        "hidden_states": noise(BATCH, IMAGE.tokens, 16),
        "encoder_hidden_states": noise(BATCH, 7, 2, 16, seed=1),
        "timestep": torch.tensor([0.9, 0.4]),
        "position_ids": torch.cat([torch.zeros(7, 3), ids]),
        "encoder_attention_mask": valid_text(7, 7, 4).bool(),
    }


def per_token_timesteps() -> torch.Tensor:
    return 900 * torch.rand(BATCH, GRID.tokens, generator=torch.Generator().manual_seed(4))


CASES: dict[str, tuple[Any, Any]] = {
    "wan": (tiny_wan.transformer, wan_inputs),
    "wan-ti2v": (tiny_wan.transformer, lambda: wan_inputs(timestep=per_token_timesteps())),
    "wan-i2v": (
        lambda: tiny_wan.transformer(in_channels=36, image_dim=8, added_kv_proj_dim=48),
        i2v_inputs,
    ),
    "hunyuanvideo": (tiny_families.hunyuanvideo, hunyuanvideo_inputs),
    "mochi": (tiny_families.mochi, mochi_inputs),
    "cogvideox-2b": (
        lambda: tiny_families.cogvideox(sample_height=10, sample_width=14),
        lambda: cogvideox_inputs(rope=False),
    ),
    "cogvideox-5b": (
        lambda: tiny_families.cogvideox(use_rotary_positional_embeddings=True),
        lambda: cogvideox_inputs(rope=True),
    ),
    "ltx": (tiny_families.ltx, ltx_inputs),
    "ltx-i2v": (tiny_families.ltx, lambda: ltx_inputs(timestep=per_token_timesteps())),
    "flux": (tiny_families.flux, flux_inputs),
    "flux, much text": (tiny_families.flux, lambda: flux_inputs(text=39)),
    "longcat-image": (tiny_edit_models.longcat, lambda: packed_inputs()),
    "ovis-image": (tiny_edit_models.ovis, lambda: packed_inputs()),
    "bria": (tiny_edit_models.bria, lambda: packed_inputs()),
    "bria-fibo": (
        tiny_edit_models.bria_fibo,
        lambda: packed_inputs(text_encoder_layers=[noise(BATCH, 7, 16, seed=n) for n in range(4)]),
    ),
    "chroma": (tiny_edit_models.chroma, lambda: packed_inputs(attention_mask=valid_keys())),
    "krea-2": (tiny_edit_models.krea2, krea2_inputs),
}


def forward(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@contextlib.contextmanager
def calls_in_order() -> Iterator[list[TileOrder | None]]:
    """What each attention call of an attached site was told of the order of its tokens."""
    told: list[TileOrder | None] = []
    stock_site = Group.site

    def site(self: Group, tokens: int) -> Any:
        out = stock_site(self, tokens)
        told.append(out.order)
        return out

    with mock.patch.object(Group, "site", site):
        yield told


def once(model: Any, inputs: Inputs) -> torch.Tensor:
    """The output of a forward, which must have been in another order throughout."""
    with calls_in_order() as told:
        out = forward(model, inputs)
    assert told
    assert all(order is not None for order in told)
    return out


def per_call(model: Any, inputs: Inputs) -> torch.Tensor:
    """The output of a forward, in which each attention call must have permuted its own tokens."""
    with calls_in_order() as told:
        out = forward(model, inputs)
    assert told
    assert all(order is None for order in told)
    return out


@contextlib.contextmanager
def watched(model: torch.nn.Module) -> Iterator[None]:
    """With code of the user's in the model, which switches the order of whole forwards off."""
    hook = next(m for m in model.modules() if m is not model).register_forward_hook(lambda *_: None)
    yield
    hook.remove()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, Inputs]:
    build, inputs = CASES[request.param]
    return build(), inputs()


def grid_of(model: torch.nn.Module, tokens: int) -> TokenGrid:
    video = IMAGE if family_of(model).images else GRID
    text = tokens - video.tokens
    before = text if family_of(model).text == "before" else 0
    return replace(video, text_before=before, text_after=text - before)


class TestFamilies:
    def test_all_are_here(self, case: Any) -> None:
        with_flow = {family.name for family in FAMILIES if family.flow is not None}
        assert {family_of(build()).name for build, _ in CASES.values()} == with_flow
        assert type(case[0]).__name__ == family_of(case[0]).flow.model_class

    def test_output_is_that_of_permuting_in_each_call(self, case: Any) -> None:
        model, inputs = case
        dense = forward(model, inputs)
        diffattn.set_attn_processor(model, IN_TILES)
        out = once(model, inputs)
        with watched(model):
            want = per_call(model, inputs)
        assert not torch.allclose(want, dense, atol=1e-3), "the mask should matter"
        torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)

    def test_output_is_that_of_the_stock_model_with_the_mask(self, case: Any) -> None:
        model, inputs = case
        sites = list(family_of(model).layers(model))
        with stock.masked(model, sites, lambda tokens: grid_of(model, tokens), stock.NEARBY):
            want = forward(model, inputs)
        diffattn.set_attn_processor(model, IN_TILES)
        torch.testing.assert_close(once(model, inputs), want, atol=1e-5, rtol=1e-4)

    def test_dense_layers_are_right_in_any_order(self, case: Any) -> None:
        model, inputs = case
        sites = list(family_of(model).layers(model))
        some = {"by schedule": replace(IN_TILES, dense_layers=1)}
        some["by method"] = {sites[0]: DenseAttn(), "*": IN_TILES}
        some["not attached"] = dict.fromkeys(sites[1:], IN_TILES)
        with stock.masked(model, sites[1:], lambda tokens: grid_of(model, tokens), stock.NEARBY):
            want = forward(model, inputs)
        for how, method in some.items():
            diffattn.set_attn_processor(model, method)
            torch.testing.assert_close(once(model, inputs), want, atol=1e-5, rtol=1e-4, msg=how)

    def test_arguments_may_come_by_position(self, case: Any) -> None:
        model, inputs = case
        diffattn.set_attn_processor(model, IN_TILES)
        want = once(model, inputs)
        names = list(inspect.signature(model.forward).parameters)
        last = max(names.index(name) for name in inputs)
        args = [inputs.get(name) for name in names[: last + 1]]
        with torch.no_grad():
            assert torch.equal(model(*args, return_dict=False)[0], want)

    def test_no_trace_is_left(self, case: Any) -> None:
        model, inputs = case
        want = forward(model, inputs)
        kept = {name: x.clone() for name, x in inputs.items() if torch.is_tensor(x)}
        diffattn.set_attn_processor(model, IN_TILES)
        once(model, inputs)
        assert all(torch.equal(inputs[name], x) for name, x in kept.items())
        diffattn.set_attn_processor(model, None)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert not model._forward_hooks_always_called
        assert torch.equal(forward(model, inputs), want)


def wan() -> Any:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, IN_TILES)
    return model


@pytest.fixture
def wan_output() -> torch.Tensor:
    """What Wan gives under the mask, however its tokens are ordered."""
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, stock.NEARBY)
    return forward(model, wan_inputs())


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


class TestSwitchedOff:
    """Each call permutes its own tokens where a forward cannot, and the output is the same."""

    def test_where_gradients_are_taken(self, wan_output: torch.Tensor) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = wan().train()
            if checkpointing:
                model.enable_gradient_checkpointing()
            with calls_in_order() as told:
                out = model(**wan_inputs(), return_dict=False)[0]
                # A teacher's forward before the student's backward leaves no order behind.
                with torch.no_grad():
                    once(model, wan_inputs())
                out.square().mean().backward()
            assert told[:3] == [None] * 3
            assert told[6:] == [None] * 3 * checkpointing
            assert_same(out.detach(), wan_output)
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(checkpointed, plain)

    @pytest.mark.parametrize(
        "methods",
        [
            {"blocks.0": IN_TILES, "blocks.*": replace(IN_TILES, tile=(1, 4, 4))},
            {"blocks.0": IN_TILES, "blocks.*": stock.NEARBY},
        ],
        ids=["other tiles", "raster"],
    )
    def test_where_methods_disagree(
        self, methods: dict[str, Method], wan_output: torch.Tensor
    ) -> None:
        model = tiny_wan.transformer()
        diffattn.set_attn_processor(model, methods)
        assert_same(per_call(model, wan_inputs()), wan_output)

    def test_where_a_method_is_more_than_a_mask(self, wan_output: torch.Tensor) -> None:
        class More(stock.NearbyInTiles):
            def attend(self, *args: Any, **options: Any) -> torch.Tensor:
                return super().attend(*args, **options)

        model = tiny_wan.transformer()
        diffattn.set_attn_processor(model, More(dense_layers=0, dense_steps=0))
        assert_same(per_call(model, wan_inputs()), wan_output)

    def test_where_a_user_looks_into_the_model(self, wan_output: torch.Tensor) -> None:
        model = wan()
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            hook = getattr(model.blocks[1].ffn, register)(lambda *_: None)
            assert_same(per_call(model, wan_inputs()), wan_output)
            hook.remove()
        hook = model.register_forward_pre_hook(lambda *_: None)
        assert_same(per_call(model, wan_inputs()), wan_output)
        hook.remove()
        assert_same(once(model, wan_inputs()), wan_output)

    def test_where_a_user_has_put_in_a_processor(self) -> None:
        class Own(WanAttnProcessor):
            pass

        model = tiny_wan.transformer()
        model.blocks[0].attn1.set_processor(Own())
        last = {"blocks.1": IN_TILES, "blocks.2": IN_TILES}
        diffattn.set_attn_processor(model, last)
        out = per_call(model, wan_inputs())
        model.blocks[0].attn1.set_processor(WanAttnProcessor())
        assert_same(once(model, wan_inputs()), out)

    def test_under_step_caches(self, wan_output: torch.Tensor) -> None:
        model = wan()
        model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        with model.cache_context("cond"):
            assert_same(per_call(model, wan_inputs()), wan_output)
        model.disable_cache()
        assert_same(once(model, wan_inputs()), wan_output)

    def test_for_models_with_more_between_their_blocks(self) -> None:
        inputs = wan_inputs(control_hidden_states=noise(BATCH, 96, 3, 10, 14, seed=5))
        outputs = []
        for method in (stock.NEARBY, IN_TILES):
            model = tiny_wan.vace_transformer()
            diffattn.set_attn_processor(model, method)
            outputs.append(per_call(model, inputs))
        assert_same(*outputs)

    def test_for_subclasses(self, wan_output: torch.Tensor) -> None:
        model = wan()
        model.__class__ = type("WanWithMore", (type(model),), {})
        assert_same(per_call(model, wan_inputs()), wan_output)

    def test_for_blocks_that_replace_tokens(self) -> None:
        outputs = []
        for method in (stock.NEARBY, IN_TILES):
            model = tiny_families.hunyuanvideo(image_condition_type="token_replace")
            diffattn.set_attn_processor(model, method)
            outputs.append(per_call(model, hunyuanvideo_inputs()))
        assert_same(*outputs)

    @pytest.mark.parametrize(
        "more",
        [
            {"controlnet_block_samples": [noise(BATCH, IMAGE.tokens, 32, seed=5)]},
            {"controlnet_single_block_samples": (noise(BATCH, IMAGE.tokens, 32, seed=5),)},
            {"joint_attention_kwargs": {"scale": 1.0}},
        ],
        ids=lambda more: next(iter(more)),
    )
    def test_for_residuals_and_attention_arguments_of_flux(self, more: Inputs) -> None:
        outputs = []
        for method in (stock.NEARBY, IN_TILES):
            model = tiny_families.flux()
            diffattn.set_attn_processor(model, method)
            outputs.append(per_call(model, flux_inputs(**more)))
        assert_same(*outputs)
        plain = once(model, flux_inputs(joint_attention_kwargs={}, controlnet_block_samples=None))
        assert ("joint_attention_kwargs" in more) == torch.allclose(plain, outputs[0], atol=1e-5)

    def test_for_attention_arguments_of_cogvideox(self) -> None:
        inputs = cogvideox_inputs(rope=True)
        mask = torch.ones(BATCH, 7 + GRID.tokens, dtype=torch.bool)
        mask[1, 20:60] = False
        outputs = []
        for method in (stock.NEARBY, IN_TILES):
            model = tiny_families.cogvideox(use_rotary_positional_embeddings=True)
            diffattn.set_attn_processor(model, method)
            plain = forward(model, inputs)
            outputs.append(per_call(model, inputs | {"attention_kwargs": {"scale": 1.0}}))
            assert_same(outputs[-1], plain)
        assert_same(*outputs)


@contextlib.contextmanager
def reusing(model: Any) -> Iterator[None]:
    """With a step cache of another package, which puts its own `forward` in the model.

    The cache gives what the blocks made in the call before, as cache-dit and TeaCache do.
    """
    last = model.get_submodule(family_of(model).flow.leave)
    own, own_last = model.forward, last.forward
    kept: list[torch.Tensor] = []

    def from_before(tokens: torch.Tensor) -> torch.Tensor:
        kept.append(tokens)
        return own_last(kept[-2] if len(kept) > 1 else tokens)

    def cached(*args: Any, **kwargs: Any) -> Any:
        last.__dict__["forward"] = from_before
        try:
            return own(*args, **kwargs)
        finally:
            del last.__dict__["forward"]

    model.forward = cached
    yield
    del model.forward


def test_caches_of_other_packages_get_tokens_in_one_order(case: Any) -> None:
    """What is kept of a dense forward is used in a sparse forward, and the other way round."""
    model, inputs = case
    outputs = []
    for method in (stock.NEARBY, IN_TILES):
        attachment = diffattn.set_attn_processor(model, method)
        with reusing(model):
            with attachment.dense():
                forward(model, inputs)
            of_dense = per_call(model, inputs)
            with attachment.dense():
                of_sparse = forward(model, inputs)
        outputs.append((of_dense, of_sparse))
        assert not torch.allclose(of_dense, of_sparse, atol=1e-3), "the mask should matter"
    for got, want in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def own_forward(model: Any, patch: pytest.MonkeyPatch) -> None:
    stock_forward = model.forward
    patch.setattr(model, "forward", lambda *args, **kwargs: stock_forward(*args, **kwargs))


def forward_of_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    stock_forward = type(model).forward

    @functools.wraps(stock_forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock_forward(self, *args, **kwargs)

    patch.setattr(type(model), "forward", patched)


def under_offloading(model: Any, patch: pytest.MonkeyPatch) -> None:
    own_forward(model, patch)
    add_hook_to_module(model, ModelHook())


def under_casting(model: Any, patch: pytest.MonkeyPatch) -> None:
    own_forward(model.blocks[1].ffn.net[2], patch)
    model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)


def compiled_by_hand(model: Any, patch: pytest.MonkeyPatch) -> None:
    own_forward(model, patch)
    model.forward = torch.compile(model.forward, backend="eager")


def forward_of_a_block(model: Any, patch: pytest.MonkeyPatch) -> None:
    own_forward(model.blocks[2], patch)


def block_of_another_package(model: Any, patch: pytest.MonkeyPatch) -> None:
    class Block(type(model.blocks[0])):
        def forward(self, *args: Any) -> Any:
            return super().forward(*args)

    model.blocks[0].__class__ = Block


def hook_of_accelerate(model: Any, patch: pytest.MonkeyPatch) -> None:
    class Keep(ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output

    add_hook_to_module(model.blocks[1], SequentialHook(ModelHook(), Keep()))


def hook_on_every_module(model: Any, patch: pytest.MonkeyPatch) -> None:
    hooks: dict[int, Any] = {0: lambda *_: None}
    patch.setattr(torch.nn.modules.module, "_global_forward_hooks", hooks)


def register(function: Any, patch: pytest.MonkeyPatch) -> Any:
    """Make a function a backend of diffusers until the test ends, as another package would."""
    registry, member = _AttentionBackendRegistry, _compat._new_member("theirs")
    for table in (registry._backends, registry._constraints, registry._supported_arg_names):
        patch.setitem(table, member, None)  # gone afterwards
    registry.register(member)(function)
    return member


def backend_of_another_package(model: Any, patch: pytest.MonkeyPatch) -> None:
    member = register(lambda query, key, value: query, patch)
    model.blocks[0].attn2.processor._attention_backend = member


@pytest.mark.parametrize(
    "look",
    [
        own_forward,
        forward_of_class,
        under_offloading,
        under_casting,
        compiled_by_hand,
        forward_of_a_block,
        block_of_another_package,
        hook_of_accelerate,
        hook_on_every_module,
        backend_of_another_package,
    ],
)
def test_no_code_of_others_sees_tokens_in_another_order(
    look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, IN_TILES)
    once(model, wan_inputs())
    look(model, monkeypatch)
    out = per_call(model, wan_inputs())
    diffattn.set_attn_processor(model, stock.NEARBY)
    assert_same(out, forward(model, wan_inputs()))


def test_a_backend_of_another_package_for_dense_layers_gets_the_models_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def theirs(query: Any, key: Any, value: Any, scale: float | None = None) -> torch.Tensor:
        return value.cumsum(1)  # depends on the order of the tokens

    member = register(theirs, monkeypatch)
    outputs = []
    for method in (stock.NEARBY, IN_TILES):
        model = tiny_wan.transformer()
        model.set_attention_backend("native")
        for block in model.blocks:
            block.attn1.processor._attention_backend = member
        diffattn.set_attn_processor(model, replace(method, dense_layers=1))
        outputs.append(per_call(model, wan_inputs()))
    assert_same(*outputs)


def test_hooks_that_move_weights_do_not_switch_it_off(wan_output: torch.Tensor) -> None:
    model = wan()
    for module in model.modules():
        add_hook_to_module(module, SequentialHook(AlignDevicesHook(), ModelHook()))
    assert_same(once(model, wan_inputs()), wan_output)


class TestTogether:
    def test_dense_steps_are_bit_equal_to_the_stock_model(self) -> None:
        pipe = tiny_wan.PIPELINES["t2v"]()
        pipe.set_progress_bar_config(disable=True)
        stock_output = tiny_wan.run(pipe, steps=3)
        pipe.set_attn_processor(stock.NearbyInTiles(dense_layers=0, dense_steps=3))
        with calls_in_order() as told:
            assert torch.equal(tiny_wan.run(pipe, steps=3), stock_output)
        assert told == []

    def test_a_run_with_dense_steps_at_both_ends(self) -> None:
        settings = {"dense_layers": 1, "dense_steps": 1, "last_dense_steps": 1}
        outputs = []
        for method in (stock.Nearby(**settings), stock.NearbyInTiles(**settings)):
            pipe = tiny_wan.PIPELINES["t2v"]()
            pipe.set_attn_processor(method)
            with calls_in_order() as told:
                outputs.append(tiny_wan.run(pipe, steps=4))
            assert len(told) == 2 * 2 * 2  # steps, branches of guidance, layers
            assert all(
                (order is not None) == isinstance(method, stock.NearbyInTiles) for order in told
            )
        assert_same(*outputs)

    def test_grids_one_after_another(self) -> None:
        model = wan()
        want = tiny_wan.transformer()
        diffattn.set_attn_processor(want, stock.NEARBY)
        for frames, height, width in [(3, 5, 7), (2, 4, 4), (1, 3, 9), (3, 5, 7)]:
            inputs = wan_inputs(hidden_states=noise(1, 16, frames, 2 * height, 2 * width))
            inputs["timestep"], text = torch.tensor([900]), inputs["encoder_hidden_states"]
            inputs["encoder_hidden_states"] = text[:1]
            assert_same(once(model, inputs), forward(want, inputs))

    @pytest.mark.parametrize("attach_first", [False, True])
    def test_lora_on_the_modules_where_tokens_enter_and_leave(self, attach_first: bool) -> None:
        def add_lora(model: Any) -> None:
            torch.manual_seed(5)
            targets = ["to_q", "proj_out", "patch_embedding"]
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            model.add_adapter(config, "trained")

        want = tiny_wan.transformer()
        diffattn.set_attn_processor(want, stock.NEARBY)
        plain = forward(want, wan_inputs())
        add_lora(want)
        model = tiny_wan.transformer()
        if not attach_first:
            add_lora(model)
        diffattn.set_attn_processor(model, IN_TILES)
        if attach_first:
            assert_same(once(model, wan_inputs()), plain)
            add_lora(model)
        out = forward(want, wan_inputs())
        assert not torch.allclose(out, plain, atol=1e-3)
        assert_same(once(model, wan_inputs()), out)
        model.disable_adapters()
        assert_same(once(model, wan_inputs()), plain)

    @pytest.mark.parametrize("attach_first", [False, True])
    def test_offloading_and_casting_do_not_switch_it_off(
        self, attach_first: bool, wan_output: torch.Tensor
    ) -> None:
        if diffusers.__version__ < "0.37" and torch.accelerator.current_accelerator() is None:
            pytest.skip(f"diffusers {diffusers.__version__} has no offloading on a CPU alone")
        model = wan() if attach_first else tiny_wan.transformer()
        cpu = torch.device("cpu")
        apply_group_offloading(model, cpu, cpu, offload_type="leaf_level")
        model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
        if not attach_first:
            diffattn.set_attn_processor(model, IN_TILES)
        assert_same(once(model, wan_inputs()), wan_output)

    def test_copies_have_orders_of_their_own(self) -> None:
        model = tiny_families.flux()
        diffattn.set_attn_processor(model, IN_TILES)
        want = once(model, flux_inputs())
        copied = copy.deepcopy(model)
        per_call(model, flux_inputs(joint_attention_kwargs={"scale": 1.0}))
        assert torch.equal(once(copied, flux_inputs()), want)
        diffattn.set_attn_processor(copied, None)
        assert torch.equal(once(model, flux_inputs()), want)

    def test_a_forward_that_fails_leaves_no_order_behind(self, wan_output: torch.Tensor) -> None:
        model = wan()
        with pytest.raises(RuntimeError):
            forward(model, wan_inputs(encoder_hidden_states=noise(BATCH, 5, 3)))
        assert attached_to(model).groups[0].call.order is None
        assert_same(once(model, wan_inputs()), wan_output)

    def test_an_interrupt_leaves_no_order_to_the_next_forward(
        self, wan_output: torch.Tensor
    ) -> None:
        model = wan()
        with (
            mock.patch.object(Group, "site", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            forward(model, wan_inputs())
        out = model(**wan_inputs(), return_dict=False)[0]  # per call, as it takes gradients
        assert_same(out.detach(), wan_output)

    @pytest.mark.parametrize("how", ["whole", "repeated blocks"])
    def test_compiled_models_have_one_graph(self, how: str, wan_output: torch.Tensor) -> None:
        torch._dynamo.reset()
        model = wan()
        counter = CompileCounterWithBackend("aot_eager")
        if how == "whole":
            call: Any = torch.compile(model, fullgraph=True, backend=counter)
        else:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
            call = model
        assert_same(once(call, wan_inputs()), wan_output)
        assert_same(once(call, wan_inputs()), wan_output)
        assert counter.frame_count == 1

    def test_low_precision(self, wan_output: torch.Tensor) -> None:
        model = wan().to(torch.bfloat16)
        inputs = wan_inputs()
        cast = {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
        out = once(model, cast)
        with watched(model):
            torch.testing.assert_close(per_call(model, cast), out, atol=0.02, rtol=0.02)
        assert out.dtype == torch.bfloat16
        assert (out - wan_output).norm() < 0.05 * wan_output.norm()


class TestRefusals:
    """What none of the six models does, and would be wrong in another order."""

    @pytest.fixture
    def dispatch(self) -> Any:
        model = tiny_wan.transformer()
        diffattn.set_attn_processor(model, stock.NearbyInTiles(dense_layers=3, dense_steps=0))
        forward(model, wan_inputs())
        group = attached_to(model).groups[0]
        assert not group.sparse
        group.last.order = TileOrder(GRID, IN_TILES.tile)
        backend = diffattn.attach.backend.backend_of(group)
        x = torch.randn(1, GRID.tokens, 2, 24)
        return lambda **options: backend(x, x, x, **options)

    def test_a_causal_call(self, dispatch: Any) -> None:
        with pytest.raises(RuntimeError, match="call is causal or has a BlockMask, which is about"):
            dispatch(is_causal=True)

    def test_a_mask_of_pairs(self, dispatch: Any) -> None:
        mask = torch.ones(1, 1, GRID.tokens, GRID.tokens, dtype=torch.bool)
        with pytest.raises(ValueError, match="cannot be combined with a sparse method"):
            dispatch(attn_mask=mask)

    def test_masks_of_keys_are_fine(self, dispatch: Any) -> None:
        mask = torch.ones(1, GRID.tokens, dtype=torch.bool)
        assert torch.equal(dispatch(attn_mask=mask), dispatch())

    def test_other_tokens_than_those_put_in_order(self) -> None:
        model = wan()
        forward(model, wan_inputs())
        group = attached_to(model).groups[0]
        group.last.order = TileOrder(TokenGrid(3, 5, 8), IN_TILES.tile)
        with pytest.raises(RuntimeError, match="over 3x5x7, but this forward has put tokens of 3x"):
            group.site(GRID.tokens)
