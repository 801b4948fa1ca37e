"""EasyAnimate 5.1: text, image and control to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, latent_grid


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    patch = model.config.patch_size
    return latent_grid(args, kwargs, (1, patch, patch))


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules(
        spatial_multiple=pipe.vae_spatial_compression_ratio * pipe.transformer.config.patch_size,
        frame_stride=pipe.vae_temporal_compression_ratio,
        frame_offset=1,
    )


EASYANIMATE = Family(
    name="easyanimate",
    title="EasyAnimate 5.1",
    model_classes=("EasyAnimateTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
    text="before",
)
