"""Ovis-Image: text to image."""

from __future__ import annotations

from functools import partial

from diffattn.models.base import Family
from diffattn.models.flux import (
    DUAL_AND_SINGLE,
    flow_of_packed_latents,
    sizes_of_packed_latents,
)
from diffattn.models.pictures_by_ids import grid_of_ids

OVIS_IMAGE = Family(
    name="ovis-image",
    title="Ovis-Image",
    model_classes=("OvisImageTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=3),
    sizes=sizes_of_packed_latents,
    text="before",
    rotary=(3, "image_rotary_emb"),
    images=True,
    flow=flow_of_packed_latents(
        "OvisImageTransformer2DModel", 3, interrupted_by=((5, "joint_attention_kwargs"),)
    ),
)
