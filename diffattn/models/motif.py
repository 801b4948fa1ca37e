"""Motif-Video: text and image to video, in dual-stream and single-stream blocks."""

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
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * pipe.transformer_spatial_patch_size,
        frame_stride=pipe.vae_scale_factor_temporal * pipe.transformer_temporal_patch_size,
        frame_offset=1,
    )


MOTIF_VIDEO = Family(
    name="motif-video",
    title="Motif-Video (T2V, I2V)",
    beside="tokens of a picture, dense; in the last blocks the encoder's video, dense",
    model_classes=("MotifVideoTransformer3DModel",),
    sites=re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    # The last single-stream blocks see the tokens of the blocks before in the place of text.
    text="after",
)
