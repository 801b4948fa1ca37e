"""HunyuanVideo: text and image to video, 13B."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, latent_grid


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    patch = model.config.patch_size
    return latent_grid(args, kwargs, (model.config.patch_size_t, patch, patch))


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * config.patch_size,
        frame_stride=pipe.vae_scale_factor_temporal * config.patch_size_t,
        frame_offset=1,
    )


def _variant(pipe: Any, model: torch.nn.Module) -> str:
    return "hunyuanvideo"


HUNYUANVIDEO = Family(
    name="hunyuanvideo",
    title="HunyuanVideo (T2V, I2V)",
    model_classes=("HunyuanVideoTransformer3DModel",),
    # The text refiner has transformer blocks of its own.
    sites=re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    variant=_variant,
    text="after",
)
