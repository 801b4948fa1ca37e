"""Stable Diffusion 3 and 3.5: images. 3.5 medium has a second attention over the image alone."""

from __future__ import annotations

import re
from typing import Any

from diffattn.models.base import Family, SizeRules, image_grid


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    rules = SizeRules.images(pipe.vae_scale_factor * config.patch_size)
    return rules.up_to(None, config.pos_embed_max_size, "pos_embed_max_size of its transformer")


SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 and 3.5",
    model_classes=("SD3Transformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn2?"),
    grid=image_grid,
    sizes=_sizes,
    text="after",
    images=True,
)
