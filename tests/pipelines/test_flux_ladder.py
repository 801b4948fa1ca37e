"""Enlarging a picture with a tiny Flux: the schedule, what is attached, and nothing left behind."""

from typing import Any

import golden_files
import numpy as np
import pytest
import tiny_families
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

import diffattn
from diffattn import CLEARAttn, TokenGrid
from diffattn.attach.denoiser import attached_to
from diffattn.pipelines.errors import UserError
from diffattn.pipelines.flux_ladder import upscale_flux

GOLDENS = golden_files.GOLDENS / "clear"


def flux() -> FluxPipeline:
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=1,
        latent_channels=4,
        sample_size=64,
        shift_factor=0.1,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=tiny_families.flux(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def call(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": tiny_families.noise(1, 5, 16),
        "pooled_prompt_embeds": tiny_families.noise(1, 8, seed=1),
        "generator": torch.Generator().manual_seed(2),
    } | changes


def test_each_size_is_denoised_from_the_published_step_on() -> None:
    pipe, seen = flux(), []

    def look(model: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        attached = attached_to(model)
        assert attached is not None
        method = attached.groups[0].chosen
        assert method == CLEARAttn(radius=16, proportional_attention=True, ntk_factor=10)
        timestep, guidance = kwargs["timestep"].item(), kwargs["guidance"].item()
        seen.append((attached.grid, round(timestep, 6), guidance, model.pos_embed.theta))

    hook = pipe.transformer.register_forward_hook(look, with_kwargs=True)
    out = upscale_flux(pipe, picture(), [(96, 128), (176, 256)], **call())
    hook.remove()
    assert out.size == (256, 176)
    # 20 steps, of which 14 are done; shifted by 3, whatever the size.
    sigmas = torch.linspace(1, 1 / 20, 20)[6:]
    shifted = [round(x, 6) for x in (3 * sigmas / (1 + 2 * sigmas)).tolist()]
    for start, grid in ((0, TokenGrid(1, 6, 8)), (14, TokenGrid(1, 11, 16))):
        part = seen[start : start + 14]
        assert {step[0] for step in part} == {grid}
        assert [step[1] for step in part] == pytest.approx(shifted, abs=2e-6)
        assert {step[2:] for step in part} == {(7.5, 100_000)}
    assert len(seen) == 28
    golden = np.load(GOLDENS / "7_scalars.npz")["notebook_sigmas"]
    assert shifted == pytest.approx(golden[6:20].tolist(), abs=2e-6)


def test_the_pipeline_stays_as_it_is() -> None:
    pipe = flux()
    processors, config = dict(pipe.transformer.attn_processors), dict(pipe.scheduler.config)
    upscale_flux(pipe, picture(), [(48, 64)], steps=4, **call())
    assert all(pipe.transformer.attn_processors[k] is v for k, v in processors.items())
    assert dict(pipe.scheduler.config) == config
    assert pipe.transformer.pos_embed.theta == 10_000
    assert not pipe.vae.use_tiling
    with pytest.raises(RuntimeError, match="shape"):
        upscale_flux(pipe, picture(), [(48, 64)], **call(pooled_prompt_embeds=torch.ones(1, 9)))
    assert attached_to(pipe.transformer) is None
    assert not pipe.vae.use_tiling


def test_a_method_of_the_users_is_used() -> None:
    pipe = flux()
    default = np.asarray(upscale_flux(pipe, picture(), [(96, 128)], steps=4, **call()))
    method = CLEARAttn(radius=1)
    given = np.asarray(upscale_flux(pipe, picture(), [(96, 128)], method=method, steps=4, **call()))
    assert (given != default).any()
    attachment = diffattn.set_attn_processor(pipe, method)
    kept = np.asarray(upscale_flux(pipe, picture(), [(96, 128)], steps=4, **call()))
    assert (kept == given).all()
    assert attachment.sparse_calls > 0
    assert attached_to(pipe.transformer) is not None
    with pytest.raises(UserError, match=r"has one attached already: leave it out, or call"):
        upscale_flux(pipe, picture(), [(96, 128)], method=method, **call())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "sizes is empty: give the height and the width"),
        ([(48, 64), (100, 64)], r"height is 100, but .* multiple of 16: try 96 or 112"),
    ],
)
def test_bad_sizes(sizes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        upscale_flux(flux(), picture(), sizes, **call())


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(UserError, match="only Flux can be upscaled like this, not int"):
        upscale_flux(3, picture(), [(48, 64)])
