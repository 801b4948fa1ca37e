"""U-Nets: of Stable Diffusion 1.5 and XL, DreamLite and Kandinsky 3; spatial blocks of videos'."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, first_input

# Spatial transformers. Motion modules, which attend across the frames of one place, are left out.
# FreeNoise's split inference wraps a transformer, whose name then ends in `module`.
_TRANSFORMER = r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+(?:\.module)?"


def _grid(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # (batch, channels, height, width); the frames of AnimateDiff are samples of the batch
    height, width = first_input(args, kwargs).shape[2:]
    return TokenGrid(1, height, width)


def _multiple(pipe: Any) -> int:
    """Pixels per token of the largest grid, which the first attention has."""
    blocks = [len(getattr(block, "attentions", ())) for block in pipe.unet.down_blocks]
    halved = next((i for i, count in enumerate(blocks) if count), len(blocks) - 1)
    return pipe.vae_scale_factor * 2**halved


def _sizes(pipe: Any) -> SizeRules:
    if "motion_max_seq_length" in pipe.unet.config:
        rules = _frame_sizes(pipe)
        if getattr(pipe, "free_noise_enabled", False):
            return rules  # frames pass in windows
        frames = pipe.unet.config.motion_max_seq_length
        return rules.up_to(frames, None, "motion_max_seq_length of its U-Net")
    return SizeRules.images(_multiple(pipe))


def _frame_sizes(pipe: Any) -> SizeRules:
    return SizeRules(_multiple(pipe), frame_stride=1, frame_offset=1, frames_apart=True)


def _kandinsky3_sizes(pipe: Any) -> SizeRules:
    # Latents of 8 x 8 pixels; the first of its blocks, on whole latents, has no self-attention.
    return SizeRules.images(16)


UNET = Family(
    name="unet",
    title="Stable Diffusion 1.5 and XL, DreamLite, AnimateDiff (spatial self-attention)",
    model_classes=("UNet2DConditionModel", "UNetMotionModel", "DreamLiteUNetModel"),
    sites=re.compile(rf"(?P<layer>{_TRANSFORMER}\.transformer_blocks\.\d+)\.attn1"),
    grid=_grid,
    grid_modules=re.compile(_TRANSFORMER),
    sizes=_sizes,
    images=True,
)

UNET_VIDEO = Family(
    name="unet-video",
    title="Stable Video Diffusion, ModelScope, I2VGen-XL (spatial self-attention)",
    model_classes=("UNetSpatioTemporalConditionModel", "UNet3DConditionModel", "I2VGenXLUNet"),
    sites=UNET.sites,
    grid=_grid,
    grid_modules=UNET.grid_modules,
    sizes=_frame_sizes,
    images=True,
)

# The first attention of a block is over the picture; the others are to the text.
_KANDINSKY3 = r"(?:down|up)_blocks\.\d+\.attentions\.0"

KANDINSKY3 = Family(
    name="kandinsky-3",
    title="Kandinsky 3",
    model_classes=("Kandinsky3UNet",),
    sites=re.compile(rf"(?P<layer>{_KANDINSKY3})\.attention"),
    grid=_grid,
    grid_modules=re.compile(_KANDINSKY3),
    sizes=_kandinsky3_sizes,
    padding="bias",
    images=True,
    tested="model",
)
