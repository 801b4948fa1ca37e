"""Wan 2.1 and 2.2, and models like it: SkyReels-V2, ChronoEdit, AnyFlow, Wan-Animate 1 and 2."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, first_input, latent_grid, sizes_in_the_call
from diffattn.models.token_flow import TokenFlow

_TI2V_5B_CHANNELS = 48


def frames_to_ask_for(pipe: Any, num_frames: int) -> int:
    """The argument `num_frames` for a Wan pipeline that is to make `num_frames` frames.

    The pipelines round the argument to a multiple of the VAE's temporal factor, plus 1, unless
    `num_frames % factor` is 1. With a factor of 1 it never is: they make one frame too many.
    """
    return num_frames - 1 if pipe.vae_scale_factor_temporal == 1 else num_frames


def encode_all_frames(
    encode: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, stride: int
) -> torch.Tensor:
    """Latents of a video by Wan's VAE, whose encoder may leave out frames at the end.

    Args:
        encode: function from pixels to latents.
        pixels: (batch, channels, frames, height, width).
        stride: frames per latent frame, the pipeline's `vae_scale_factor_temporal`.

    Returns:
        (batch, channels, latent frames, rows, columns). The first frame has a latent frame alone.
        Frames at the end that fill no latent frame are left out.
    """
    # The encoder takes one frame and then groups of four, even if the VAE keeps every frame, and
    # leaves out an incomplete group. The encoder is causal: frames added at the end change no
    # latent frame before them.
    after_first = pixels.shape[2] - 1
    missing = -after_first % 4
    latents = encode(torch.cat([pixels, *[pixels[:, :, -1:]] * missing], 2))
    surplus = (after_first + missing) // stride - after_first // stride
    return latents[:, :, : latents.shape[2] - surplus]


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    grid = latent_grid(args, kwargs, model.config.patch_size)
    # Compiled code is not to guard on sizes.
    if not torch.compiler.is_dynamo_compiling():
        _check_positions(model, grid)
    return grid


def _check_positions(model: Any, grid: TokenGrid) -> None:
    """Raise ValueError for a grid longer than the model's table of positions."""
    positions = model.config.rope_max_seq_len
    if max(grid.frames, grid.height, grid.width) > positions:
        raise ValueError(
            f"this call of {type(model).__name__} is over {grid} tokens, but the model has"
            f" positions for {positions} along each axis (its rope_max_seq_len): pass a smaller"
            f" height, width and num_frames to the pipeline"
        )


def _anyflow_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # (batch, frames, channels, height, width)
    frames, _, height, width = first_input(args, kwargs).shape[1:]
    patch_t, patch_h, patch_w = model.config.patch_size
    return TokenGrid(frames // patch_t, height // patch_h, width // patch_w)


def _forcing_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call of SkyReels-V2, whose frames may be made block by block."""
    frames = model.config.num_frame_per_block
    grid = _grid(model, args, kwargs)
    return replace(grid, causal_frames=frames) if frames > 1 else grid


def _animate2_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call of Wan-Animate-2 on a list of latents (channels, frames, rows, columns).

    Raises:
        ValueError: if the latents are of several sizes.
    """
    sizes = {tuple(latents.shape[1:]) for latents in first_input(args, kwargs)}
    if len(sizes) > 1:
        raise ValueError(
            f"this call of {type(model).__name__} has latents of sizes"
            f" {' and '.join(sorted('x'.join(map(str, size)) for size in sizes))}: call it once per"
            f" size, or set_attn_processor(None)"
        )
    pairs = zip(sizes.pop(), model.config.patch_size, strict=True)
    return TokenGrid(*(size // patch for size, patch in pairs))


def _sizes(pipe: Any) -> SizeRules:
    config = _denoiser(pipe).config
    patch_t, patch_h, _ = config.patch_size
    token_pixels = pipe.vae_scale_factor_spatial * patch_h
    rules = SizeRules(
        # The pipelines themselves refuse sizes that are no multiple of 16, for every VAE.
        spatial_multiple=math.lcm(16, token_pixels),
        token_pixels=token_pixels,
        frame_stride=pipe.vae_scale_factor_temporal * patch_t,
        frame_offset=1,
    )
    positions = config.rope_max_seq_len
    return rules.up_to(positions, positions, "rope_max_seq_len of its transformer")


def _denoiser(pipe: Any) -> Any:
    # A pipeline of Wan 2.2 may be loaded with one of its two experts only.
    return pipe.transformer if pipe.transformer is not None else pipe.transformer_2


def _variant(pipe: Any, model: torch.nn.Module) -> str:
    if model.config.in_channels == _TI2V_5B_CHANNELS:  # type: ignore[union-attr]
        return "wan2.2-5b"
    two_experts = pipe is not None and getattr(pipe.config, "boundary_ratio", None) is not None
    return "wan2.2" if two_experts else "wan2.1"


_wan_shaped = partial(
    Family, sites=re.compile(r"blocks\.(?P<layer>\d+)\.attn1"), grid=_grid, sizes=_sizes
)

WAN = _wan_shaped(
    name="wan",
    title="Wan 2.1 and 2.2 (T2V, I2V, TI2V-5B, VACE)",
    beside="VACE's reference pictures, as the first frames of the video",
    model_classes=("WanTransformer3DModel", "WanVACETransformer3DModel"),
    sites=re.compile(r"(?:vace_)?blocks\.(?P<layer>\d+)\.attn1"),
    variants=_variant,
    rotary=(3, "rotary_emb"),
    flow=TokenFlow(
        model_class="WanTransformer3DModel",
        # TI2V-5B has a timestep per token.
        arguments=((1, "timestep", 1),),
        outputs={"patch_embedding": -1, "rope": 1},
    ),
)

SKYREELS_V2 = _wan_shaped(
    name="skyreels-v2",
    title="SkyReels-V2 (diffusion forcing, T2V, I2V)",
    model_classes=("SkyReelsV2Transformer3DModel",),
    grid=_forcing_grid,
    padding="grid",
)

CHRONOEDIT = _wan_shaped(
    name="chronoedit", title="ChronoEdit", model_classes=("ChronoEditTransformer3DModel",)
)

ANYFLOW = _wan_shaped(
    name="anyflow",
    title="AnyFlow (bidirectional)",
    model_classes=("AnyFlowTransformer3DModel",),
    grid=_anyflow_grid,
)

WAN_ANIMATE = _wan_shaped(
    name="wan-animate",
    title="Wan 2.2 Animate",
    beside="the character, as the first frame of the video",
    model_classes=("WanAnimateTransformer3DModel",),
    sizes=sizes_in_the_call(
        "takes its number of frames from the video that drives it and makes it in segments"
    ),
)

WAN_ANIMATE2 = Family(
    name="wan-animate-2",
    title="Wan-Animate-2 (its pass over the driving video)",
    model_classes=("WanAnimate2Transformer3DModel",),
    # Calls that denoise attend under a block mask of the model's own, which stays as it is.
    sites=re.compile(r"blocks\.(?P<layer>\d+)\.self_attn"),
    grid=_animate2_grid,
    sizes=sizes_in_the_call(
        "takes its number of frames from the video that drives it and makes it in segments"
    ),
    tested="model",
)
