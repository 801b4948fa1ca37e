"""Calls and models without a rectangular grid, and processors that cannot be attached to."""

import copy
import warnings
from typing import Any

import diffusers
import pytest
import stock
import tiny_families as tiny
import torch
from diffusers.models.attention_processor import AttnProcessor, JointAttnProcessor2_0

import diffattn
from diffattn.models import FAMILIES, family_of, pipeline_grid


def call(name: str, **changes: Any) -> None:
    """Run an attached model on the inputs of its case, but for some."""
    case = tiny.CASES[name]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)
    with torch.no_grad():
        model(**(case.inputs() | changes), return_dict=False)


def test_images_of_the_same_number_of_tokens_are_told_apart() -> None:
    case = tiny.CASES["flux"]
    model = case.build()
    recorder = stock.Recording()
    diffattn.set_attn_processor(model, recorder)
    for height, width in ((6, 9), (9, 6), (6, 9), (2, 27)):
        recorder.calls.clear()
        with torch.no_grad():
            model(**(case.inputs() | {"img_ids": tiny.image_ids(height, width)}))
        grid = recorder.calls[-1][0].grid
        assert (grid.frames, grid.height, grid.width) == (1, height, width)


def test_qwen_with_several_shapes_in_a_batch() -> None:
    with pytest.raises(ValueError, match="several shapes in one batch"):
        call("qwen-image", img_shapes=[[(1, 6, 9)], [(1, 9, 6)]])


def test_qwen_shapes_of_older_diffusers() -> None:
    family = family_of(tiny.qwen_image())
    inputs = {"hidden_states": tiny.noise(2, 54, 16), "img_shapes": [(1, 6, 9)] * 2}
    assert family.grid(tiny.qwen_image(), (), inputs) == diffattn.TokenGrid(1, 6, 9)


def test_nabla_is_refused() -> None:
    with pytest.raises(ValueError, match="uses NABLA, the model's own sparse attention"):
        call("kandinsky-5", sparse_params={"to_fractal": True})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AnyFlowFARTransformer3DModel", "come from a cache, under a block mask"),
        ("Kandinsky6SRTransformer3DModel", "its own sparse attention"),
        ("SanaWMTransformer3DModel", "three of four layers are recurrences"),
        ("SanaVideoTransformer3DModel", "self-attention is linear"),
    ],
)
def test_models_without_a_grid_say_why(name: str, reason: str) -> None:
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"{name} has no rectangular token grid.*{reason}"):
        family_of(cls.__new__(cls))


def test_the_number_of_frames_of_wan_animate_is_not_foretold() -> None:
    parts = ("tokenizer", "text_encoder", "vae", "scheduler", "image_encoder", "image_processor")
    model = tiny.CASES["wan-animate"].build()
    pipe = diffusers.WanAnimatePipeline(**dict.fromkeys(parts), transformer=model)
    with pytest.raises(ValueError, match="takes its number of frames from the video that drives"):
        pipeline_grid(pipe, 64, 96, 9)


@pytest.mark.parametrize("name", ["cogvideox-5b", "sd3", "sd1.5"])
def test_fused_projections_say_what_to_do(name: str) -> None:
    case = tiny.CASES[name]
    model = case.build()
    want = model(**case.inputs(), return_dict=False)[0]
    model.fuse_qkv_projections()
    before = copy.copy(model.attn_processors)
    with pytest.raises(ValueError, match=r"has a Fused.*call unfuse_qkv_projections\(\) before"):
        diffattn.set_attn_processor(model, stock.NEARBY)
    assert model.attn_processors == before
    model.unfuse_qkv_projections()
    attachment = diffattn.set_attn_processor(model, diffattn.DenseAttn())
    got = model(**case.inputs(), return_dict=False)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert attachment.sparse_calls == len(case.sites)


@pytest.mark.parametrize("name", ["cogvideox-5b", "sd3", "sd1.5"])
def test_projections_fused_later_are_reported(name: str) -> None:
    case = tiny.CASES[name]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)
    model.fuse_qkv_projections()
    count = len(case.sites)
    message = rf"{count} of {count} .* given a Fused\w+ by fuse_qkv_projections"
    with pytest.warns(UserWarning, match=message):
        model(**case.inputs())


@pytest.mark.parametrize("name", ["flux", "ltx", "skyreels-v2"])
def test_projections_fused_later_where_the_processor_knows_both(name: str) -> None:
    case = tiny.CASES[name]
    model = case.build()
    attachment = diffattn.set_attn_processor(model, stock.NEARBY)
    want = model(**case.inputs(), return_dict=False)[0]
    model.fuse_qkv_projections()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = model(**case.inputs(), return_dict=False)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert attachment.sparse_calls == 2 * len(case.sites)


def test_attention_slicing_enabled_later_is_reported() -> None:
    case = tiny.CASES["sd1.5"]
    model = case.build()
    diffattn.set_attn_processor(model, stock.NEARBY)
    model.set_attention_slice(1)
    with pytest.warns(UserWarning, match="given a SlicedAttnProcessor by enable_attention_slicing"):
        model(**case.inputs())


def test_a_processor_that_cannot_be_attached_leaves_the_model_as_it_was() -> None:
    model = tiny.unet()
    name = tiny.CASES["sd1.5"].sites[-1]
    model.get_submodule(name).set_processor(AttnProcessor())
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=f"{name} has a AttnProcessor, which does not call"):
        diffattn.set_attn_processor(model, stock.NEARBY)
    assert all(model.attn_processors[name] is before[name] for name in before)
    assert diffattn.attach.attached_to(model) is None


def test_sites_that_share_a_processor_get_it_back() -> None:
    model = tiny.CASES["sd3.5"].build()
    shared = JointAttnProcessor2_0()
    model.set_attn_processor(shared)
    diffattn.set_attn_processor(model, {"transformer_blocks.0.attn": stock.NEARBY})
    assert model.transformer_blocks[0].attn.processor is not shared
    assert model.transformer_blocks[0].attn2.processor is shared
    diffattn.set_attn_processor(model, None)
    assert all(processor is shared for processor in model.attn_processors.values())


def test_family_names_and_classes_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    classes = [name for family in FAMILIES for name in family.model_classes]
    assert len(set(classes)) == len(classes)
    # Releases before 0.42 lack the newest.
    known = [name for name in classes if hasattr(diffusers, name)]
    assert len(known) == len(classes) or diffusers.__version__ < "0.42"


def test_recommended_settings_know_the_families_by_these_names() -> None:
    assert {family.name for family in FAMILIES} >= {
        "wan", "hunyuanvideo", "hunyuanvideo-1.5", "mochi", "cogvideox", "ltx", "ltx-2", "allegro",
        "flux", "flux.2", "sd3", "qwen-image", "unet",
    }  # fmt: skip
    mochi = tiny.mochi()
    assert family_of(mochi).variant(None, mochi) == "mochi"
