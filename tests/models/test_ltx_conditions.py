"""LTX-Video's pipeline with pictures at the start and in the middle of the video."""

from typing import Any

import diffusers
import pytest
import stock
import tiny_families as tiny
import torch
from tiny_case import make
from tiny_pipelines import PipelineCase, _prompts, picture

import diffattn
from diffattn import DenseAttn, TokenGrid
from diffattn.grid import Reference
from diffattn.models import pipeline_grid

SIZE = (32, 64, 9)


def pipeline() -> Any:
    sides, once = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    vae = make(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=sides,
        decoder_block_out_channels=sides,
        layers_per_block=once,
        decoder_layers_per_block=once,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    return diffusers.LTXConditionPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny.ltx(),
    )


def inputs() -> dict[str, Any]:
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    at = (0, 5)
    return _prompts(7, 5) | {
        "conditions": [LTXVideoCondition(image=picture(), frame_index=frame) for frame in at]
    }


@pytest.mark.filterwarnings("ignore:`timesteps` were passed without")
def test_a_picture_in_the_middle_is_a_reference() -> None:
    """The first picture takes the place of the first frame; the other stands before the video."""
    pipe, case = pipeline(), PipelineCase(pipeline, inputs, SIZE)
    want = case.run(pipe)
    recorder = stock.Recording()
    diffattn.set_attn_processor(pipe, recorder)
    torch.testing.assert_close(case.run(pipe), want, atol=1e-5, rtol=1e-4)
    # Latent frames begin at frames 0, 1 and 5.
    reference = Reference(0, 1, 8, 16, times=(2.0,))
    assert {site.grid for site, _ in recorder.calls} == {
        TokenGrid(3, 8, 16, text_before=128, references=(reference,))
    }
    assert pipeline_grid(pipe, *SIZE) == TokenGrid(3, 8, 16)


@pytest.mark.filterwarnings("ignore:`timesteps` were passed without")
def test_every_step_is_sparse() -> None:
    pipe, case = pipeline(), PipelineCase(pipeline, inputs, SIZE)
    want = case.run(pipe)
    dense = diffattn.set_attn_processor(pipe, DenseAttn())
    case.run(pipe, steps=3)
    assert (dense.sparse_calls, dense.dense_calls) == (3 * 2, 0)
    sparse = diffattn.set_attn_processor(pipe, stock.NEARBY)
    assert not torch.allclose(case.run(pipe), want, atol=1e-3)
    assert (sparse.sparse_calls, sparse.dense_calls) == (2 * 2, 0)
    diffattn.set_attn_processor(pipe, None)
    assert torch.equal(case.run(pipe), want)
