"""Kandinsky 5: text and image to video, without NABLA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input

# Along each axis; diffusers' class has no setting for it.
_POSITIONS = 128


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    if argument(args, kwargs, 7, "sparse_params") is not None:
        raise ValueError(
            f"this call of {type(model).__name__} uses NABLA, the model's own sparse attention,"
            f" which puts tokens in another order: use a checkpoint whose attention_type is"
            f" 'regular', or set_attn_processor(None)"
        )
    # (batch, frames, height, width, channels)
    sizes = zip(first_input(args, kwargs).shape[1:4], model.config.patch_size, strict=True)
    return TokenGrid(*(size // patch for size, patch in sizes))


def _sizes(pipe: Any) -> SizeRules:
    patch_t, patch, _ = pipe.transformer.config.patch_size
    rules = SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * patch,
        frame_stride=pipe.vae_scale_factor_temporal * patch_t,
        frame_offset=1,
    )
    return rules.up_to(_POSITIONS, _POSITIONS, "the table of its rotary position embedding")


KANDINSKY5 = Family(
    name="kandinsky-5",
    title="Kandinsky 5 (without NABLA)",
    model_classes=("Kandinsky5Transformer3DModel",),
    sites=re.compile(r"visual_transformer_blocks\.(?P<layer>\d+)\.self_attention"),
    grid=_grid,
    sizes=_sizes,
)
