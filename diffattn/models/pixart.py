"""PixArt-alpha and PixArt-Sigma: text to image. Latte: text to video, frame by frame. DiT."""

from __future__ import annotations

import re
from typing import Any

from diffattn.models.base import Family, SizeRules, image_grid

# Latte's blocks between are over time: each place of the picture by itself.
_SITES = re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1")


def _picture_sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


def _frame_sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    rules = SizeRules(
        spatial_multiple=pipe.vae_scale_factor * config.patch_size,
        frame_stride=1,
        frame_offset=1,
        frames_apart=True,
    )
    return rules.up_to(config.video_length, None, "video_length of its transformer")


PIXART = Family(
    name="pixart",
    title="PixArt-alpha and PixArt-Sigma",
    model_classes=("PixArtTransformer2DModel",),
    sites=_SITES,
    grid=image_grid,
    sizes=_picture_sizes,
    padding="bias",
    images=True,
)

LATTE = Family(
    name="latte",
    title="Latte (spatial self-attention)",
    model_classes=("LatteTransformer3DModel",),
    sites=_SITES,
    grid=image_grid,
    sizes=_frame_sizes,
    padding="bias",
    images=True,
)

DIT = Family(
    name="dit",
    title="DiT",
    model_classes=("DiTTransformer2DModel",),
    sites=_SITES,
    grid=image_grid,
    sizes=_picture_sizes,
    padding="bias",
    images=True,
    tested="model",
)
