"""Allegro: text to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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
        frame_offset=0,
    )


ALLEGRO = Family(
    name="allegro",
    title="Allegro",
    model_classes=("AllegroTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
    padding="bias",
)
