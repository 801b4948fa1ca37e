"""Pipelines that edit images: exact, complete, restored, and references where the ids say."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import stock
import tiny_families as tiny
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from tiny_pipelines import PIPELINES, _pipeline, _pooled, _prompts, picture

import diffattn
from diffattn import DenseAttn, TokenGrid
from diffattn.grid import Reference

TEXT, STEPS = 7, 2


def run(pipe: Any, **inputs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        height=96,
        width=144,
        num_inference_steps=STEPS,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        return_dict=False,
        **inputs,
    )[0]


def kontext() -> tuple[Any, Callable[[], torch.Tensor]]:
    pipe = _pipeline(
        "FluxKontextPipeline",
        transformer=tiny.flux(),
        absent=("text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor"),
    )
    pipe.latent_channels = 4
    inputs = _prompts(TEXT, mask=None) | _pooled("pooled_prompt_embeds")
    # Latents in the place of a picture, so that no VAE is needed.
    image = tiny.noise(1, 4, 12, 18)
    return pipe, lambda: run(pipe, image=image, max_area=96 * 144, **inputs)


def klein() -> tuple[Any, Callable[[], torch.Tensor]]:
    pipe = PIPELINES["flux.2"].build()
    inputs = _prompts(TEXT, mask=None) | {"guidance_scale": 1.0}
    images = [picture(96, 144), picture(64, 80, seed=1)]
    return pipe, lambda: run(pipe, image=images, **inputs)


def qwen_edit_plus() -> tuple[Any, Callable[[], torch.Tensor]]:
    vae = tiny.make(
        "AutoencoderKLQwenImage",
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = _pipeline(
        "QwenImageEditPlusPipeline",
        transformer=tiny.CASES["qwen-image-edit-plus"].build(),
        vae=vae,
        absent=("processor",),
    )
    inputs = _prompts(5, mask="prompt_embeds_mask")
    images = [picture(96, 144), picture(64, 80, seed=1)]

    def call() -> torch.Tensor:
        # Their pictures are resized to an area of 1024 x 1024 pixels, and here to a smaller one.
        with mock.patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 96 * 144):
            return run(pipe, image=images, **inputs)

    return pipe, call


ALIGNED, SMALL = Reference(54, 1, 6, 9), Reference(108, 1, 4, 5)
# Qwen's pictures become 96 x 128 pixels: of the area patched above, in multiples of 32.
CASES = {
    "kontext": (kontext, (ALIGNED,)),
    "klein": (klein, (ALIGNED, SMALL)),
    "qwen-edit-plus": (qwen_edit_plus, (Reference(54, 1, 6, 8), Reference(102, 1, 6, 8))),
}


@pytest.mark.parametrize("name", CASES)
def test_editing(name: str) -> None:
    build, references = CASES[name]
    pipe, call = build()
    want = call()
    recorder = stock.Recording()
    pipe.set_attn_processor(recorder)
    torch.testing.assert_close(call(), want, atol=1e-4, rtol=1e-3)
    grids = {site.grid for site, _ in recorder.calls}
    tokens = sum(r.tokens for r in references)
    (grid,) = grids
    text = grid.text_before
    assert grid == TokenGrid(1, 6, 9, 0, tokens, references=references).beside(before=text)
    assert 0 < text <= TEXT

    dense = pipe.set_attn_processor(DenseAttn())
    torch.testing.assert_close(call(), want, atol=1e-4, rtol=1e-3)
    sites = len(diffattn.models.family_of(pipe.transformer).layers(pipe.transformer))
    assert dense.sparse_calls == STEPS * sites
    sparse = pipe.set_attn_processor(stock.NEARBY)
    assert not torch.allclose(call(), want, atol=1e-3)
    assert (sparse.sparse_calls, sparse.dense_calls) == (STEPS * sites, 0)
    pipe.set_attn_processor(None)
    assert torch.equal(call(), want)
