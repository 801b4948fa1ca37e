"""Lumina 2, whose image starts where the prompt ends, and Lumina-Next: text to image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input, image_grid


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call.

    Raises:
        ValueError: if the prompts of the batch differ in length.
    """
    if len(first_input(args, kwargs)) > 1:
        # The model reads these numbers in each call, too.
        lengths = argument(args, kwargs, 3, "encoder_attention_mask").sum(1).tolist()
        if len(set(lengths)) > 1:
            raise ValueError(
                f"this call of {type(model).__name__} has prompts of {lengths} tokens in one batch."
                f" Each image starts where its own prompt ends, so that the images have no grid in"
                f" common: call it once per prompt, or set_attn_processor(None)"
            )
    return image_grid(model, args, kwargs)


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * 2)


LUMINA2 = Family(
    name="lumina-2",
    title="Lumina 2",
    model_classes=("Lumina2Transformer2DModel",),
    # The noise refiner sees the image alone.
    sites=re.compile(r"(?P<layer>(?:noise_refiner|layers)\.\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    images=True,
)

LUMINA_NEXT = Family(
    name="lumina-next",
    title="Lumina-Next",
    model_classes=("LuminaNextDiT2DModel",),
    sites=re.compile(r"layers\.(?P<layer>\d+)\.attn1"),
    grid=image_grid,
    sizes=_sizes,
    images=True,
    tested="model",
)
