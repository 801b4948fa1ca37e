"""Chroma: text to image with Flux' blocks, and text padding that a mask hides."""

from __future__ import annotations

from functools import partial

from diffattn.models.base import Family
from diffattn.models.flux import (
    DUAL_AND_SINGLE,
    flow_of_packed_latents,
    sizes_of_packed_latents,
)
from diffattn.models.pictures_by_ids import grid_of_ids

CHROMA = Family(
    name="chroma",
    title="Chroma",
    model_classes=("ChromaTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=3),
    sizes=sizes_of_packed_latents,
    text="before",
    padding="pairs",
    rotary=(3, "image_rotary_emb"),
    images=True,
    flow=flow_of_packed_latents(
        "ChromaTransformer2DModel",
        3,
        (5, "attention_mask", 1),
        interrupted_by=(
            (6, "joint_attention_kwargs"),
            (7, "controlnet_block_samples"),
            (8, "controlnet_single_block_samples"),
        ),
    ),
)
