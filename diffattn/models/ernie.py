"""ERNIE-Image: text to image."""

from __future__ import annotations

import re
from typing import Any

from diffattn.models.base import Family, SizeRules, image_grid


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


ERNIE_IMAGE = Family(
    name="ernie-image",
    title="ERNIE-Image",
    model_classes=("ErnieImageTransformer2DModel",),
    sites=re.compile(r"layers\.(?P<layer>\d+)\.self_attention"),
    grid=image_grid,
    sizes=_sizes,
    text="after",
    images=True,
)
