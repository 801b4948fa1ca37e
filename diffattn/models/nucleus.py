"""Nucleus-Image: text to image, with queries of the image alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input, first_queries


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of packed latents, whose rows and columns only `img_shapes` has.

    Raises:
        ValueError: if the shape has another number of tokens than the latents.
    """
    shapes = argument(args, kwargs, 1, "img_shapes")
    grid = TokenGrid(*(shapes[0] if isinstance(shapes, list) else shapes))
    tokens = first_input(args, kwargs).shape[1]
    if grid.tokens != tokens:
        raise ValueError(
            f"this call of {type(model).__name__} has {tokens} tokens, but img_shapes {shapes} make"
            f" {grid} = {grid.tokens}: pass the shape of one image, in tokens"
        )
    return grid


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * 2)


NUCLEUS_IMAGE = Family(
    name="nucleus-image",
    title="Nucleus-Image",
    model_classes=("NucleusMoEImageTransformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    queries=first_queries,
    images=True,
)
