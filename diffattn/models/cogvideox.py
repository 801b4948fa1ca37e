"""CogVideoX: 2b, 5b and 1.5, text, image and video to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, first_input


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # (batch, frames, channels, height, width), unlike all others
    _, frames, _, height, width = first_input(args, kwargs).shape
    patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
    return TokenGrid(frames // patch_t, height // patch, width // patch)


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * config.patch_size,
        frame_stride=pipe.vae_scale_factor_temporal,
        frame_offset=1,
        frames_per_token=config.patch_size_t or 1,
    )


COGVIDEOX = Family(
    name="cogvideox",
    title="CogVideoX 2b, 5b and 1.5",
    model_classes=("CogVideoXTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
    text="before",
)
