"""Mochi 1: text to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, latent_grid
from diffattn.models.token_flow import TokenFlow


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    patch = model.config.patch_size
    return latent_grid(args, kwargs, (1, patch, patch))


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules(
        spatial_multiple=pipe.vae_spatial_scale_factor * pipe.transformer.config.patch_size,
        frame_stride=pipe.vae_temporal_scale_factor,
        frame_offset=1,
    )


MOCHI = Family(
    name="mochi",
    title="Mochi 1",
    model_classes=("MochiTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    flow=TokenFlow(
        model_class="MochiTransformer3DModel",
        # Patches come out by frame: (batch * frames, rows * columns, channels).
        outputs={"patch_embed": 1, "rope": 0},
        text=(1, "encoder_hidden_states"),
    ),
)
