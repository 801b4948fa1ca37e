"""The U-Nets of Stable Diffusion 1.5 and XL, and the spatial blocks of U-Nets for videos."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, first_input

# U-Nets for videos of any number of frames, beside AnimateDiff's.
_OF_VIDEOS = ("UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "I2VGenXLUNet")

# Spatial transformers. Modules that attend across the frames of one place are left out.
# FreeNoise's split inference wraps a transformer, whose name then ends in `module`.
_TRANSFORMER = r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+(?:\.module)?"


def _grid(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # (batch, channels, height, width); the frames of a video are samples of the batch
    height, width = first_input(args, kwargs).shape[2:]
    return TokenGrid(1, height, width)


def _sizes(pipe: Any) -> SizeRules:
    """The sizes, with the pixels per token of the largest grid, which the first attention has."""
    blocks = [len(getattr(block, "attentions", ())) for block in pipe.unet.down_blocks]
    halved = next((i for i, count in enumerate(blocks) if count), len(blocks) - 1)
    multiple = pipe.vae_scale_factor * 2**halved
    of_videos = type(pipe.unet).__name__ in _OF_VIDEOS
    if of_videos or "motion_max_seq_length" in pipe.unet.config:
        rules = SizeRules(
            spatial_multiple=multiple, frame_stride=1, frame_offset=1, frames_apart=True
        )
        if of_videos or getattr(pipe, "free_noise_enabled", False):
            return rules  # there are no positions, or frames pass in windows
        frames = pipe.unet.config.motion_max_seq_length
        return rules.up_to(frames, None, "motion_max_seq_length of its U-Net")
    return SizeRules.images(multiple)


UNET = Family(
    name="unet",
    title="Stable Diffusion 1.5 and XL, AnimateDiff, SVD, I2VGen-XL (spatial self-attention)",
    model_classes=("UNet2DConditionModel", "UNetMotionModel", *_OF_VIDEOS),
    sites=re.compile(rf"(?P<layer>{_TRANSFORMER}\.transformer_blocks\.\d+)\.attn1"),
    grid=_grid,
    grid_modules=re.compile(_TRANSFORMER),
    sizes=_sizes,
    images=True,
)
