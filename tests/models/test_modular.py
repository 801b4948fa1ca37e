"""Modular pipelines: denoisers under any name, loaded late, replaced, and the steps of a run."""

import re
import warnings
from typing import Any

import diffusers
import pytest
import stock
import tiny_families
import tiny_video_models
import tiny_wan
import torch
from tiny_modular import MODULAR
from tiny_pipelines import PIPELINES

import diffattn
from diffattn.models import denoisers, pipeline_grid, without_grid


class Refused(torch.nn.Module):
    """A stand-in of a model that diffattn refuses, known by its name."""


Refused.__name__ = "SanaVideoTransformer3DModel"


@pytest.fixture(params=MODULAR)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_steps_are_counted_by_the_scheduler(name: str) -> None:
    case = MODULAR[name]
    pipe = case.build()
    method = stock.Nearby(dense_layers=1, dense_steps=0.4, last_dense_steps=1)
    attachment = pipe.set_attn_processor(method)
    (layers,) = {model.layers for model in attachment.models.values()}
    for runs in (1, 2):
        case.run(pipe, steps=5)
        # The first two steps and the last stay dense, and the first layer of those between.
        assert attachment.sparse_calls == runs * 2 * case.forwards * (layers - 1)
        assert attachment.dense_calls == runs * case.forwards * (3 * layers + 2)


def test_a_scheduler_put_in_later_is_followed() -> None:
    case = MODULAR["wan"]
    pipe = case.build()
    attachment = pipe.set_attn_processor(stock.Nearby(dense_layers=0, dense_steps=1))
    pipe.update_components(scheduler=case.components()["scheduler"])
    case.run(pipe, steps=3)
    assert (attachment.sparse_calls, attachment.dense_calls) == (2 * 2 * 3, 2 * 3)


def test_components_that_are_not_loaded_are_told_so() -> None:
    pipe = MODULAR["wan"].empty()
    message = (
        "WanModularPipeline has no denoiser yet: its components transformer, scheduler are not"
        " loaded. Load its components first, with load_components() or update_components()"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.set_attn_processor(stock.NEARBY)
    with pytest.raises(ValueError, match=re.escape(message)):
        diffattn.plan(pipe, "gna")


def test_a_denoiser_put_in_later_is_reported() -> None:
    case = MODULAR["wan"]
    pipe = case.build()
    attachment = pipe.set_attn_processor(stock.NEARBY)
    pipe.update_components(transformer=tiny_wan.transformer(seed=1))
    message = "the pipeline's transformer was exchanged after set_attn_processor: the new WanTrans"
    with pytest.warns(UserWarning, match=message):
        case.run(pipe)
    assert attachment.sparse_calls + attachment.dense_calls == 0


def test_a_denoiser_loaded_later_is_reported() -> None:
    case = MODULAR["wan 2.2"]
    pipe = case.build()
    second = pipe.transformer_2
    pipe.update_components(transformer_2=None)
    assert list(pipe.set_attn_processor(stock.NEARBY).models) == ["transformer"]
    pipe.update_components(transformer_2=second)
    message = "the pipeline's transformer_2 was added after set_attn_processor: the new WanTransf"
    with pytest.warns(UserWarning, match=message):
        case.run(pipe)
    pipe.set_attn_processor(None)
    assert list(pipe.set_attn_processor(stock.NEARBY).models) == ["transformer", "transformer_2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        case.run(pipe)


@pytest.mark.parametrize("component", ["unconditional_transformer", "transformer_ref", "denoiser"])
def test_a_denoiser_has_any_name(component: str) -> None:
    pipe = PIPELINES["ltx"].build()
    other = tiny_families.ltx()
    setattr(pipe, component, other)
    assert denoisers(pipe) == {"transformer": pipe.transformer, component: other}
    attachment = pipe.set_attn_processor(stock.NEARBY)
    assert list(attachment.models) == ["transformer", component]


def test_a_model_that_is_two_components_is_one_denoiser() -> None:
    pipe = PIPELINES["ltx"].build()
    pipe.transformer_2 = pipe.transformer
    want = PIPELINES["ltx"].run(pipe)
    attachment = pipe.set_attn_processor(stock.NEARBY)
    assert list(attachment.models) == ["transformer"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PIPELINES["ltx"].run(pipe)
    pipe.set_attn_processor(None)
    assert torch.equal(PIPELINES["ltx"].run(pipe), want)


def test_a_refused_model_beside_a_known_one_stays_dense_and_is_reported() -> None:
    pipe = PIPELINES["ltx"].build()
    pipe.refiner = Refused()
    assert list(denoisers(pipe)) == ["transformer"]
    assert list(without_grid(pipe)) == ["refiner"]
    message = "the pipeline's refiner attends densely: SanaVideoTransformer3DModel .* is linear"
    with pytest.warns(UserWarning, match=message):
        attachment = pipe.set_attn_processor(stock.NEARBY)
    PIPELINES["ltx"].run(pipe)
    assert attachment.sparse_calls > 0


@pytest.mark.parametrize("component", ["transformer", "refiner"])
def test_a_refused_model_alone_is_refused_with_its_reason(component: str) -> None:
    pipe = PIPELINES["ltx"].build()
    pipe.transformer = None
    setattr(pipe, component, Refused())
    with pytest.raises(ValueError, match=r"SanaVideoTransformer3DModel .* it has no token pairs"):
        pipe.set_attn_processor(stock.NEARBY)


def test_a_pipeline_without_a_denoiser_names_its_models() -> None:
    pipe = PIPELINES["ltx"].build()
    pipe.transformer = None
    pipe.upsampler = torch.nn.Linear(1, 1)
    message = "LTXPipeline has no denoiser: none of its components .* knows (upsampler)"
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        denoisers(pipe)
    del pipe.upsampler
    with pytest.raises(ValueError, match="it has no models"):
        denoisers(pipe)


def plan_of(pipe: Any, **size: Any) -> Any:
    return diffattn.plan(pipe, "gna", **size)


def test_plans_are_of_the_pipelines_own_sizes() -> None:
    wan = plan_of(MODULAR["wan"].build())
    assert (wan.grid.frames, wan.grid.height, wan.grid.width) == (21, 30, 52)
    assert wan.steps == 50
    flux = plan_of(MODULAR["flux"].build())
    assert (flux.grid.height, flux.grid.width, flux.grid.text_before) == (64, 64, 512)
    qwen = plan_of(MODULAR["qwen-image"].build(), text=7)
    assert (qwen.grid.height, qwen.grid.width, qwen.grid.text_before) == (64, 64, 7)


def test_plans_take_sizes_as_of_other_pipelines() -> None:
    pipe = MODULAR["wan"].build()
    grid = plan_of(pipe, height=64, width=96, num_frames=9).grid
    assert grid == pipeline_grid(pipe, 64, 96, 9)
    with pytest.raises(ValueError, match="height is 70, but this model needs a multiple of 16"):
        plan_of(pipe, height=70, width=96, num_frames=9)


def test_a_cosmos_model_whose_modular_pipeline_makes_pictures() -> None:
    if not hasattr(diffusers, "AnimaModularPipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no AnimaModularPipeline")
    pipe = diffusers.AnimaModularPipeline()
    pipe.update_components(transformer=tiny_families.CASES["cosmos-2"].build())
    # Eight pixels a latent, two latents a token.
    assert pipeline_grid(pipe, 64, 96, 1) == diffattn.TokenGrid(1, 4, 6)
    assert plan_of(pipe, height=64, width=96).grid == diffattn.TokenGrid(1, 4, 6)
    with pytest.raises(ValueError, match="num_frames is 5, but this model makes images: try 1"):
        pipeline_grid(pipe, 64, 96, 5)


def test_minimax_h3_attaches_to_both_of_its_models_and_plans_its_published_size() -> None:
    if not hasattr(diffusers, "MiniMaxH3ModularPipeline"):
        pytest.skip(f"diffusers {diffusers.__version__} has no MiniMaxH3ModularPipeline")
    pipe = diffusers.MiniMaxH3ModularPipeline()
    build = tiny_video_models.minimax_h3
    pipe.update_components(transformer=build(), transformer_ref=build())
    assert list(pipe.set_attn_processor(stock.NEARBY).models) == ["transformer", "transformer_ref"]
    # 124 frames are 37 latent frames: 5 of each 17, and 2 of the last 5.
    plan = plan_of(pipe, height=480, width=832, num_frames=124, text=100)
    assert plan.grid.alone == diffattn.TokenGrid(37, 15, 26)
    assert plan.grid.text_before == 100 + 414  # audio of 124 frames
