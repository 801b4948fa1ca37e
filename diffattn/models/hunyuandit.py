"""HunyuanDiT: text to image."""

from __future__ import annotations

import re
from typing import Any

from diffattn.models.base import Family, SizeRules, image_grid


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


HUNYUANDIT = Family(
    name="hunyuandit",
    title="HunyuanDiT",
    model_classes=("HunyuanDiT2DModel",),
    sites=re.compile(r"blocks\.(?P<layer>\d+)\.attn1"),
    grid=image_grid,
    sizes=_sizes,
    padding="bias",
    rotary=(5, "image_rotary_emb"),
    images=True,
)
