"""HunyuanImage 2.1 and its refiner: text to image, and the image made sharper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, first_input


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of latents (batch, channels, height, width); the refiner's have frames before."""
    latents, patches = first_input(args, kwargs).shape[2:], model.config.patch_size
    sizes = [size // patch for size, patch in zip(latents, patches, strict=True)]
    return TokenGrid(*[1] * (3 - len(sizes)), *sizes)


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size[-1])


HUNYUAN_IMAGE = Family(
    name="hunyuan-image",
    title="HunyuanImage 2.1 and its refiner",
    model_classes=("HunyuanImageTransformer2DModel",),
    # The text refiner has transformer blocks of its own.
    sites=re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    images=True,
    rotary=(3, "image_rotary_emb"),
)
