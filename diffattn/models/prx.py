"""PRX: text to image, with queries of the image alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, first_input, last_queries


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    height, width = first_input(args, kwargs).shape[2:]
    return TokenGrid(1, height // model.patch_size, width // model.patch_size)


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


PRX = Family(
    name="prx",
    title="PRX",
    model_classes=("PRXTransformer2DModel",),
    sites=re.compile(r"blocks\.(?P<layer>\d+)\.attention"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    queries=last_queries,
    images=True,
)
