"""GLM-Image: text to image, and to image out of images whose keys a cache keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, image_grid, last_queries


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call.

    Raises:
        ValueError: if the call has a mask, which the model adds to the scores.
    """
    if argument(args, kwargs, 9, "attention_mask") is not None:
        raise ValueError(
            f"this call of {type(model).__name__} has an attention_mask. The model makes numbers 0"
            f" and 1 of the mask and adds them to the scores, so that padding is not hidden: leave"
            f" out attention_mask, as GlmImagePipeline does, or set_attn_processor(None)"
        )
    return image_grid(model, args, kwargs)


def _sizes(pipe: Any) -> SizeRules:
    # The tokens of the language model are twice as large as those of the transformer.
    patch = pipe.transformer.config.patch_size
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor * patch * 2,
        frame_stride=0,
        frame_offset=1,
        token_pixels=pipe.vae_scale_factor * patch,
    )


GLM_IMAGE = Family(
    name="glm-image",
    title="GLM-Image",
    model_classes=("GlmImageTransformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
    # Keys of condition images stand before the text.
    text="before",
    queries=last_queries,
    images=True,
    tested="model",
)
