"""MiniMax-H3 in the blocks of its modular pipeline, from the layout to the last step."""

from typing import Any

import diffusers
import pytest
import stock
import tiny_video_models as tiny
import torch
from tiny_case import noise

import diffattn
from diffattn import DenseAttn, GNAAttn, TokenGrid
from diffattn.models import pipeline_grid

STEPS = 3


def pipeline() -> Any:
    before = pytest.importorskip("diffusers.modular_pipelines.minimax_h3.before_denoise")
    denoise = pytest.importorskip("diffusers.modular_pipelines.minimax_h3.denoise")
    steps = {
        "anchors": before.MiniMaxH3NoKeyframeAnchorsStep,
        "layout": before.MiniMaxH3PrepareLayoutStep,
        "latents": before.MiniMaxH3PrepareLatentsStep,
        "timesteps": before.MiniMaxH3SetTimestepsStep,
        "denoise": denoise.MiniMaxH3DenoiseStep,
    }

    blocks = diffusers.modular_pipelines.SequentialPipelineBlocks.from_blocks_dict(
        {name: step() for name, step in steps.items()}
    )
    pipe = blocks.init_pipeline()
    schedulers = {name: diffusers.MiniMaxH3Scheduler() for name in ("scheduler", "audio_scheduler")}
    pipe.update_components(
        transformer=tiny.minimax_h3(in_channels=24, audio_in_channels=32), **schedulers
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any) -> torch.Tensor:
    return pipe(
        prompt_embeds=noise(1, 7, 16),
        text_token_tags=torch.ones(7, dtype=torch.long),
        height=64,
        width=96,
        num_frames=124,
        num_inference_steps=STEPS + 1,  # the schedulers make one step less
        generator=torch.Generator().manual_seed(0),
        output="latents",
    )


def test_a_run_is_exact_and_complete() -> None:
    pipe = pipeline()
    want = run(pipe)
    dense = diffattn.set_attn_processor(pipe, DenseAttn())
    torch.testing.assert_close(run(pipe), want, atol=1e-5, rtol=1e-4)
    assert dense.sparse_calls == STEPS * 2
    sparse = diffattn.set_attn_processor(pipe, stock.NEARBY)
    assert not torch.allclose(run(pipe), want, atol=1e-3)
    assert (sparse.sparse_calls, sparse.dense_calls) == (STEPS * 2, 0)
    diffattn.set_attn_processor(pipe, None)
    assert torch.equal(run(pipe), want)


def test_the_grid_is_the_one_foretold_beside_text_and_sound() -> None:
    pipe = pipeline()
    recorder = stock.Recording()
    diffattn.set_attn_processor(pipe, recorder)
    run(pipe)
    grids = {site.grid for site, _ in recorder.calls}
    assert grids == {TokenGrid(37, 2, 3, text_before=7 + 2 * 207)}
    assert {grid.alone for grid in grids} == {pipeline_grid(pipe, 64, 96, 124)}


def test_dense_steps_follow_the_scheduler_of_the_video() -> None:
    pipe = pipeline()
    method = GNAAttn(window=(9, 2, 2), dense_steps=1, dense_layers=0)
    attachment = diffattn.set_attn_processor(pipe, method)
    run(pipe)
    assert (attachment.sparse_calls, attachment.dense_calls) == ((STEPS - 1) * 2, 2)
