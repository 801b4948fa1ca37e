"""Qwen-Image: text to image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # For each sample a list of image shapes, or (diffusers before 0.37) the shape of one image.
    samples = argument(args, kwargs, 4, "img_shapes")
    shapes = [samples[0]] if isinstance(samples[0][0], int) else samples[0]
    tokens = first_input(args, kwargs).shape[1]
    grid = TokenGrid(*shapes[0])
    if any(sample != samples[0] for sample in samples):
        raise ValueError(
            f"this call of {type(model).__name__} has images of several shapes in one batch: call"
            f" it once per shape, or set_attn_processor(None)"
        )
    if len(shapes) > 1 or grid.tokens != tokens:
        raise ValueError(
            f"this call of {type(model).__name__} has {tokens} tokens of {len(shapes)} images, as"
            f" the pipelines for editing and layers have: they have no rectangular grid in common;"
            f" use the pipeline for text to image, or set_attn_processor(None)"
        )
    return grid


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * 2)


QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    model_classes=("QwenImageTransformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    images=True,
)
