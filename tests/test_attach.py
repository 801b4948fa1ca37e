"""Attaching to Wan models and pipelines: exact, complete, and without a trace afterwards."""

import copy
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import diffattn
from diffattn import CLEARAttn, DenseAttn, RadialAttn, TokenGrid

# Sparse everywhere, with blocks small enough that they matter on these grids.
SPARSE = RadialAttn(
    decay_factor=0.0, split_threshold=8, block_size=4, dense_layers=0, dense_steps=0
)
INPUTS = [(2, 16, 5, 12, 10), (1, 16, 1, 6, 10), (3, 16, 7, 6, 22)]


def forward(model: torch.nn.Module, shape: tuple[int, ...] = INPUTS[0]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    batch = shape[0]
    inputs = {
        "hidden_states": torch.randn(shape, generator=generator),
        "timestep": torch.tensor([900.0, 400.0, 10.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 5, tiny_wan.TEXT_DIM, generator=generator),
    }
    if hasattr(model, "vace_blocks"):
        control = (batch, 96, *shape[2:])
        inputs["control_hidden_states"] = torch.randn(control, generator=generator)
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


class MaskedProcessor:
    """The stock processor, handed a boolean mask: what a user could do without diffattn."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self, stock: Any, mask: torch.Tensor) -> None:
        self.stock, self.mask = stock, mask

    def __call__(self, attn: Any, hidden: Any, text: Any, mask: Any, rotary: Any) -> torch.Tensor:
        assert mask is None
        return self.stock(attn, hidden, text, self.mask, rotary)


def with_mask(model: torch.nn.Module, mask: torch.Tensor) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith("attn1"):
            module.processor = MaskedProcessor(module.processor, mask)
    return model


@pytest.fixture(params=["t2v", "vace"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny_wan.transformer() if request.param == "t2v" else tiny_wan.vace_transformer()


@pytest.mark.parametrize("shape", INPUTS)
def test_dense_method_gives_the_models_own_output(model: Any, shape: tuple[int, ...]) -> None:
    want = forward(model, shape)
    attachment = diffattn.set_attn_processor(model, DenseAttn())
    torch.testing.assert_close(forward(model, shape), want, atol=2e-6, rtol=1e-5)
    assert attachment.sparse_calls == attachment.sites


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize(
    "method",
    [SPARSE, RadialAttn(rule="paper", dense_layers=0, dense_steps=0)],
    ids=["block", "paper"],
)
def test_sparse_method_is_the_stock_model_with_that_mask(
    model: Any, shape: tuple[int, ...], method: RadialAttn
) -> None:
    grid = TokenGrid(shape[2], shape[3] // 2, shape[4] // 2)
    mask = method.mask(grid).dense()
    assert grid.frames == 1 or mask.double().mean() < 0.9, "the mask should matter"
    want = forward(with_mask(model, mask), shape)
    attachment = diffattn.set_attn_processor(model, method)
    torch.testing.assert_close(forward(model, shape), want, atol=2e-6, rtol=1e-5)
    expected = 3 if not hasattr(model, "vace_blocks") else 5
    assert attachment.sites == expected
    assert attachment.sparse_calls == expected
    assert attachment.dense_calls == 0


def test_none_restores_objects_and_bits(model: Any) -> None:
    before = dict(model.attn_processors)
    want = forward(model)
    diffattn.set_attn_processor(model, SPARSE)
    assert not torch.equal(forward(model), want)
    assert diffattn.set_attn_processor(model, None) is None
    after = model.attn_processors
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(forward(model), want)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not any("diffattn" in name for name in vars(model))


def test_attaching_again_replaces(model: Any) -> None:
    before = dict(model.attn_processors)
    first = diffattn.set_attn_processor(model, SPARSE)
    second = diffattn.set_attn_processor(model, DenseAttn())
    forward(model)
    assert first.sparse_calls == 0
    assert second.sparse_calls == second.sites
    diffattn.set_attn_processor(model, None)
    assert all(model.attn_processors[name] is before[name] for name in before)


def test_nothing_process_wide_changes(model: Any) -> None:
    active = _AttentionBackendRegistry.get_active_backend()
    members = list(AttentionBackendName)
    diffattn.set_attn_processor(model, SPARSE)
    other = tiny_wan.transformer()
    want = forward(tiny_wan.transformer())
    assert torch.equal(forward(other), want)
    assert _AttentionBackendRegistry.get_active_backend() == active
    assert list(AttentionBackendName) == members


def test_gradients_reach_the_weights(model: Any) -> None:
    shape = INPUTS[0]
    mask = SPARSE.mask(TokenGrid(5, 6, 5)).dense()
    gradients = []
    for one in (with_mask(model, mask), model):
        if one is model:
            diffattn.set_attn_processor(model, SPARSE)
        one.zero_grad()
        generator = torch.Generator().manual_seed(7)
        inputs = {"hidden_states": torch.randn(shape, generator=generator)}
        if hasattr(model, "vace_blocks"):
            inputs["control_hidden_states"] = torch.ones(2, 96, *shape[2:])
        out = one(
            **inputs,
            timestep=torch.tensor([900.0, 400.0]),
            encoder_hidden_states=torch.ones(2, 5, tiny_wan.TEXT_DIM),
            return_dict=False,
        )[0]
        out.square().mean().backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", tiny_wan.PIPELINES)
def test_pipelines(kind: str) -> None:
    pipe = tiny_wan.PIPELINES[kind]()
    want = tiny_wan.run(pipe)
    steps, guidance_calls = 2, 2
    assert pipe.set_attn_processor(None) is None

    dense = pipe.set_attn_processor(DenseAttn())
    torch.testing.assert_close(tiny_wan.run(pipe), want, atol=1e-4, rtol=1e-4)
    per_forward = len(next(iter(dense.models.values())).sites)
    assert dense.sparse_calls == steps * guidance_calls * per_forward

    sparse = pipe.set_attn_processor(SPARSE)
    assert not torch.allclose(tiny_wan.run(pipe), want, atol=1e-3)
    assert sparse.sparse_calls == steps * guidance_calls * per_forward
    assert sparse.dense_calls == 0

    pipe.set_attn_processor(None)
    assert torch.equal(tiny_wan.run(pipe), want)
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler))


@pytest.mark.parametrize("kind", tiny_wan.PIPELINES)
def test_pipeline_grid_is_the_grid_of_the_call(kind: str) -> None:
    pipe = tiny_wan.PIPELINES[kind]()
    attachment = pipe.set_attn_processor(SPARSE)
    tiny_wan.run(pipe, height=64, width=128, num_frames=13)
    grids = {model.grid for model in attachment.models.values()}
    assert grids == {diffattn.models.pipeline_grid(pipe, 64, 128, 13)}


def test_grid_of_a_model_with_fewer_pixels_a_token_than_its_pipeline_allows_sizes() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal = 4, 1
    assert diffattn.models.pipeline_grid(pipe, 96, 112, 16) == TokenGrid(16, 12, 14)
    with pytest.raises(ValueError, match=r"height is 104, but .* multiple of 16: try 96 or 112"):
        diffattn.models.pipeline_grid(pipe, 104, 112, 16)


def test_two_experts_are_both_attached_and_share_the_clock() -> None:
    pipe = tiny_wan.PIPELINES["two experts"]()
    method = RadialAttn(
        dense_steps=1, last_dense_steps=1, dense_layers=1, block_size=4, split_threshold=8
    )
    attachment = pipe.set_attn_processor(method)
    assert list(attachment.models) == ["transformer", "transformer_2"]
    tiny_wan.run(pipe, steps=6)
    # Two calls a step, three sites a call; in the four steps between, two of the three are sparse.
    assert attachment.sparse_calls == 4 * 2 * 2
    assert attachment.sparse_calls + attachment.dense_calls == 6 * 2 * 3
    both = [model.sparse_calls + model.dense_calls for model in attachment.models.values()]
    assert min(both) > 0, "both experts should have run"
    assert {model.variant for model in attachment.models.values()} == {"wan2.2"}


@pytest.mark.parametrize(
    ("parameters", "steps", "sparse"),
    [
        ({"dense_steps": 0, "dense_layers": 0}, 4, 4 * 3),
        ({"dense_steps": 0.25, "dense_layers": 0}, 4, 3 * 3),
        ({"dense_steps": 0, "dense_layers": 2}, 4, 4 * 1),
        ({"dense_steps": 0, "dense_layers": 9}, 4, 0),
        ({"dense_steps": 1, "last_dense_steps": 0.5, "dense_layers": 1}, 4, 1 * 2),
        ({"dense_steps": 10, "dense_layers": 0}, 4, 0),
        ({}, 8, 6 * 2),
    ],
)
def test_schedules(parameters: dict, steps: int, sparse: int) -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(RadialAttn(**parameters))
    tiny_wan.run(pipe, steps=steps)
    assert attachment.sparse_calls == 2 * sparse
    assert attachment.dense_calls == 2 * (steps * 3 - sparse)


def test_second_order_schedulers_call_step_more_often() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    # 4 steps of Heun's method are 7 model calls: dense_steps counts what the scheduler counts.
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    attachment = pipe.set_attn_processor(
        RadialAttn(dense_steps=2, last_dense_steps=1, dense_layers=0)
    )
    tiny_wan.run(pipe, steps=4)
    assert attachment.sparse_calls + attachment.dense_calls == 7 * 2 * 3
    assert attachment.dense_calls == 3 * 2 * 3


def test_without_guidance() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(RadialAttn(dense_steps=1, dense_layers=0))
    tiny_wan.run(pipe, steps=4, guidance_scale=1.0)
    assert attachment.dense_calls == 1 * 3
    assert attachment.sparse_calls == 3 * 3


def test_an_interrupted_call_leaves_nothing_behind() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    method = RadialAttn(dense_steps=2, dense_layers=0, block_size=4, split_threshold=8)
    pipe.set_attn_processor(method)
    want = tiny_wan.run(pipe, steps=4)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        tiny_wan.run(pipe, steps=4, callback_on_step_end=stop)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        pipe._interrupt = True
        return tensors

    tiny_wan.run(pipe, steps=4, callback_on_step_end=interrupt)
    assert torch.equal(tiny_wan.run(pipe, steps=4), want)


def test_a_pipeline_called_twice_with_other_sizes() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    sizes = [(96, 64, 9, 3), (64, 64, 5, 4), (96, 64, 9, 3), (32, 32, 1, 2)]
    method = RadialAttn(dense_steps=1, dense_layers=1, block_size=4, split_threshold=8)
    fresh = []
    for size in sizes:
        other = tiny_wan.PIPELINES["t2v"]()
        other.set_attn_processor(method)
        fresh.append(tiny_wan.run(other, *size))
    pipe.set_attn_processor(method)
    for size, want in zip(sizes, fresh, strict=True):
        assert torch.equal(tiny_wan.run(pipe, *size), want)


def test_a_scheduler_put_in_later_is_followed() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(RadialAttn(dense_steps=0.5, dense_layers=0))
    first = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    )
    tiny_wan.run(pipe, steps=4)
    assert attachment.sparse_calls == attachment.dense_calls == 2 * 2 * 3
    assert not {"step", "set_timesteps"} & set(vars(first))


def test_patterns_choose_methods() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor({"blocks.0": DenseAttn(), "blocks.*": SPARSE})
    assert attachment.sites == 3
    methods = [group.chosen for group in attachment.models["transformer"].groups]
    assert methods == [DenseAttn(), SPARSE]
    stock = dict(tiny_wan.transformer().attn_processors)
    attachment = pipe.set_attn_processor({"blocks.2.attn1": SPARSE})
    assert attachment.sites == 1
    tiny_wan.run(pipe)
    assert attachment.sparse_calls == 4
    assert len(stock) == len(pipe.transformer.attn_processors)


def test_one_method_on_two_pipelines() -> None:
    one, two = tiny_wan.PIPELINES["t2v"](), tiny_wan.PIPELINES["t2v"]()
    method = RadialAttn(block_size=4, split_threshold=8, dense_steps=0, dense_layers=0)
    one.set_attn_processor(method)
    two.set_attn_processor(method)
    small = tiny_wan.run(one, 64, 64, 5)
    tiny_wan.run(two, 96, 64, 9)
    assert torch.equal(tiny_wan.run(one, 64, 64, 5), small)


def test_methods_copy_and_pickle() -> None:
    method = RadialAttn(decay_factor=0.3)
    mask = method.mask(TokenGrid(2, 3, 4))
    assert method.mask(TokenGrid(2, 3, 4)) is mask
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert other == method
        assert torch.equal(other.mask(TokenGrid(2, 3, 4)).dense(), mask.dense())


def test_description_of_a_run() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(RadialAttn())
    grid = TokenGrid(16, 12, 12)
    said = attachment.describe(grid, 20)
    assert (
        said.density
        == attachment.models["transformer"]
        .groups[0]
        .chosen.for_model("wan2.1", grid)
        .mask(grid)
        .density
    )
    assert (said.dense_layers, said.dense_steps, said.last_dense_steps) == (1, 5, 0)
    assert (said.sites, said.layers, said.num_steps) == (3, 3, 20)
    assert str(said) == (
        "radial attention: 47.1% of the token pairs attend, 47.1% of the blocks are computed; 1 of"
        " 3 layers, the first 5 and the last 0 of 20 steps stay dense"
    )


def test_description_counts_pooled_keys() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    attachment = pipe.set_attn_processor(CLEARAttn(radius=3, down_factor=4))
    said = attachment.describe(TokenGrid(3, 9, 13), 20)
    assert said.extra_keys == 18
    assert "% of the blocks are computed, and 18 pooled keys for every token; 0 of 3" in str(said)


def test_diffusers_own_processors_still_go_to_the_models() -> None:
    pipe = tiny_wan.PIPELINES["t2v"]()
    pipe.set_attn_processor(SPARSE)
    theirs = WanAttnProcessor()
    assert pipe.set_attn_processor(theirs) is None
    assert all(p is theirs for p in pipe.transformer.attn_processors.values())
    each = {name: WanAttnProcessor() for name in pipe.transformer.attn_processors}
    pipe.set_attn_processor(each)
    assert len(each) == 6, "the caller's dict is left alone"
    assert all(pipe.transformer.attn_processors[name] is p for name, p in each.items())


class FusedProcessor(WanAttnProcessor):
    """Stands for what `fuse_qkv_projections` puts in place on some models."""


class XFormersProcessor(WanAttnProcessor):
    """Stands for what `enable_xformers_memory_efficient_attention` puts in place."""


def exchange_blocks(model: Any) -> None:
    model.blocks = copy.deepcopy(model.blocks)


@pytest.mark.parametrize(
    ("disconnect", "why"),
    [
        (
            lambda model: model.set_attention_backend("native"),
            "set_attention_backend gave it another backend",
        ),
        (
            lambda model: model.set_attn_processor(WanAttnProcessor()),
            "it was given a WanAttnProcessor",
        ),
        (
            lambda model: model.set_attn_processor(FusedProcessor()),
            "it was given a FusedProcessor by fuse_qkv_projections",
        ),
        (
            lambda model: model.set_attn_processor(XFormersProcessor()),
            "it was given a XFormersProcessor by enable_xformers_memory_efficient_attention",
        ),
        (exchange_blocks, "its block was exchanged"),
    ],
    ids=["backend", "processor", "fuse_qkv_projections", "xformers", "blocks"],
)
def test_being_disconnected_is_reported_once(disconnect: Any, why: str) -> None:
    model = tiny_wan.transformer()
    active = _AttentionBackendRegistry.get_active_backend()[0]
    diffattn.set_attn_processor(model, SPARSE)
    forward(model)
    disconnect(model)
    try:
        message = rf"3 of 3 attention sites .* no longer attached: {why} \(blocks\.0\.attn1\)"
        with pytest.warns(UserWarning, match=message):
            forward(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forward(model)
    finally:
        _AttentionBackendRegistry._active_backend = active


def test_without_a_pipeline_dense_steps_are_reported() -> None:
    with pytest.warns(UserWarning, match="without a pipeline there are no steps to count"):
        diffattn.set_attn_processor(tiny_wan.transformer(), RadialAttn())


def test_unknown_model() -> None:
    with pytest.raises(ValueError, match="does not know the attention sites of Linear; it knows"):
        diffattn.set_attn_processor(torch.nn.Linear(2, 2), SPARSE)


def test_target_without_a_denoiser() -> None:
    with pytest.raises(ValueError, match="object has no denoiser: none of its components"):
        diffattn.set_attn_processor(object(), SPARSE)


def test_pattern_that_matches_nothing() -> None:
    model = tiny_wan.transformer()
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=r"no attention site matches the pattern 'block\.0'"):
        diffattn.set_attn_processor(model, {"blocks.*": SPARSE, "block.0": DenseAttn()})
    assert all(model.attn_processors[name] is before[name] for name in before)


def test_what_is_no_processor_at_all() -> None:
    with pytest.raises(TypeError, match="processor is a float, but must be a method of diffattn"):
        diffattn.set_attn_processor(tiny_wan.transformer(), 0.5)


def test_methods_do_not_mix_with_processors() -> None:
    with pytest.raises(TypeError, match=r"'blocks\.1' is a object, but the others are methods"):
        diffattn.set_attn_processor(
            tiny_wan.transformer(), {"blocks.0": SPARSE, "blocks.1": object()}
        )


def test_masks_that_are_not_padding_are_refused() -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    forward(model)
    attn = model.blocks[0].attn1
    hidden = torch.randn(2, 150, 48)
    with pytest.raises(ValueError, match="only padding masks over keys can"):
        attn(hidden, attention_mask=torch.ones(150, 150, dtype=torch.bool))
    # Numbers that happen to repeat are not known to: only `expand` says so.
    with pytest.raises(ValueError, match="only padding masks over keys can"):
        attn(hidden, attention_mask=torch.ones(2, 2, 150, 150, dtype=torch.bool))


def test_calls_outside_of_a_known_grid_are_refused() -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    with pytest.raises(RuntimeError, match="called outside of its model's forward"):
        model.blocks[0].attn1(torch.randn(1, 150, 48))
    forward(model)
    with pytest.raises(RuntimeError, match="has 149 tokens, but the model's input makes a grid of"):
        model.blocks[0].attn1(torch.randn(1, 149, 48))


def test_padding_masks_are_honoured() -> None:
    model = tiny_wan.transformer()
    diffattn.set_attn_processor(model, SPARSE)
    forward(model)
    torch.manual_seed(0)
    hidden = torch.randn(2, 150, 48)
    keys = torch.rand(2, 150) < 0.7
    mask = SPARSE.mask(TokenGrid(5, 6, 5)).dense()
    with torch.no_grad():
        stock = tiny_wan.transformer().blocks[0].attn1
        want = stock(hidden, attention_mask=(mask & keys[:, None, :])[:, None])
        repeated = keys[:, None, None, :].expand(2, 2, 150, 150)
        for form in (keys, keys[:, None, None, :], repeated):
            got = model.blocks[0].attn1(hidden, attention_mask=form)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_dropped_model_is_freed_with_its_backends() -> None:
    names = []
    for _ in range(5):
        model = tiny_wan.transformer()
        diffattn.set_attn_processor(model, SPARSE)
        forward(model)
        names.append(model.blocks[0].attn1.processor._attention_backend.value)
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None
    assert len(set(names)) == 1
