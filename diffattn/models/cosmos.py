"""Cosmos Predict 1, 2 and 2.5, and Anima: text, image and video to world videos, and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, latent_grid

_LIMIT = "max_size of its transformer"


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # Frames that the video continues, and masks, are latents of the same grid or channels of it.
    return latent_grid(args, kwargs, model.config.patch_size)


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    patch_t, patch, _ = config.patch_size
    if not hasattr(pipe, "vae_scale_factor_temporal"):  # Anima, which makes pictures
        side = min(
            n // step for n, step in zip(config.max_size[1:], config.patch_size[1:], strict=True)
        )
        rules = SizeRules.images(pipe.vae_scale_factor * patch)
        return rules.up_to(None, side, _LIMIT)
    token_pixels = pipe.vae_scale_factor_spatial * patch
    rules = SizeRules(
        # The pipelines themselves refuse sizes that are no multiple of 16, for every VAE.
        spatial_multiple=math.lcm(16, token_pixels),
        token_pixels=token_pixels,
        frame_stride=pipe.vae_scale_factor_temporal * patch_t,
        frame_offset=1,
    )
    frames, *sides = (n // step for n, step in zip(config.max_size, config.patch_size, strict=True))
    if config.extra_pos_embed_type is None:
        # The rotary embedding alone has as many positions along each axis as along the longest.
        frames = sides[0] = sides[1] = max(frames, *sides)
    return rules.up_to(frames, min(sides), _LIMIT)


COSMOS = Family(
    name="cosmos",
    title="Cosmos Predict 1, 2 and 2.5, and Transfer",
    model_classes=("CosmosTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
)
