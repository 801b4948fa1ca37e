"""HiDream-I1: text to image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input, image_grid


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call; latents that are no square are padded with tokens that all others see.

    Raises:
        ValueError: if packed latents come in several sizes.
    """
    latents = first_input(args, kwargs)
    if latents.ndim == 4:
        grid = image_grid(model, args, kwargs)
        padded = grid.tokens if grid.height == grid.width else model.max_seq
    else:
        sizes = {tuple(map(int, size)) for size in argument(args, kwargs, 6, "img_sizes")}
        if len(sizes) > 1:
            raise ValueError(
                f"this call of {type(model).__name__} has img_sizes {sorted(sizes)} in one batch:"
                f" call it once per size, or set_attn_processor(None)"
            )
        grid, padded = TokenGrid(1, *sizes.pop()), latents.shape[1]
    return grid.beside(after=padded - grid.tokens)


def _sizes(pipe: Any) -> SizeRules:
    # HiDreamImagePipeline brings each size to the number of pixels of its default size first.
    return SizeRules.images(pipe.vae_scale_factor * 2)


HIDREAM = Family(
    name="hidream",
    title="HiDream-I1",
    model_classes=("HiDreamImageTransformer2DModel",),
    sites=re.compile(r"(?P<layer>(?:double|single)_stream_blocks\.\d+)\.block\.attn1"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    images=True,
    tested="model",
)
