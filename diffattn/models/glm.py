"""GLM-Image, CogView 4 and CogView 3 Plus: text to image.

GLM-Image also makes images out of images, whose keys a cache keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, image_grid, last_queries


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: int) -> TokenGrid:
    """The grid of a call.

    Args:
        mask: position of the argument `attention_mask`.

    Raises:
        ValueError: if the call has a mask, which the model adds to the scores.
    """
    if argument(args, kwargs, mask, "attention_mask") is not None:
        raise ValueError(
            f"this call of {type(model).__name__} has an attention_mask. The model makes numbers 0"
            f" and 1 of the mask and adds them to the scores, so that padding is not hidden: leave"
            f" out attention_mask, as the pipeline does, or set_attn_processor(None)"
        )
    return image_grid(model, args, kwargs)


def _glm_sizes(pipe: Any) -> SizeRules:
    # The tokens of the language model are twice as large as those of the transformer.
    patch = pipe.transformer.config.patch_size
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor * patch * 2,
        frame_stride=0,
        frame_offset=1,
        token_pixels=pipe.vae_scale_factor * patch,
    )


def _cogview_sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


def _table_sizes(pipe: Any) -> SizeRules:
    most = pipe.transformer.config.pos_embed_max_size
    return _cogview_sizes(pipe).up_to(None, most, "pos_embed_max_size of its transformer")


_SITES = re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1")

GLM_IMAGE = Family(
    name="glm-image",
    title="GLM-Image",
    model_classes=("GlmImageTransformer2DModel",),
    sites=_SITES,
    grid=partial(_grid, mask=9),
    sizes=_glm_sizes,
    # Keys of condition images stand before the text.
    text="before",
    queries=last_queries,
    images=True,
    tested="model",
)

COGVIEW4 = Family(
    name="cogview-4",
    title="CogView 4",
    model_classes=("CogView4Transformer2DModel",),
    sites=_SITES,
    grid=partial(_grid, mask=8),
    sizes=_cogview_sizes,
    text="before",
    images=True,
)

COGVIEW3PLUS = Family(
    name="cogview-3-plus",
    title="CogView 3 Plus",
    model_classes=("CogView3PlusTransformer2DModel",),
    sites=_SITES,
    grid=image_grid,
    sizes=_table_sizes,
    text="before",
    images=True,
)
