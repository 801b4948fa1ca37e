"""Flux and Flux.2: images, also from reference images, in dual-stream and single-stream blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument
from diffattn.models.pictures_by_ids import grid_of_ids
from diffattn.models.position_ids import Rectangle
from diffattn.models.token_flow import TokenFlow


def _target(pictures: Sequence[Rectangle]) -> Rectangle:
    """The picture at time 0; VisualCloze counts its rows from 1 and makes the last."""
    return next((picture for picture in pictures if picture.times == (0,)), pictures[-1])


def _flux2_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    mode = argument(args, kwargs, 9, "kv_cache_mode")
    if mode is not None:
        raise ValueError(
            f"this call of {type(model).__name__} has kv_cache_mode={mode!r}, as those of"
            f" Flux2KleinKVPipeline have: its reference images attend to themselves alone, and"
            f" later steps take their keys from a cache; use Flux2KleinPipeline, or"
            f" set_attn_processor(None)"
        )
    return grid_of_ids(model, args, kwargs, position=3)


def sizes_of_packed_latents(pipe: Any) -> SizeRules:
    """The sizes of a pipeline that packs 2 x 2 latents into a token."""
    return SizeRules.images(pipe.vae_scale_factor * 2)


def _has_residuals_or_masks(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    # Residuals of a ControlNet and arguments for attention processors, such as masks of an
    # IP-Adapter, are in the model's own order of tokens.
    names = "joint_attention_kwargs controlnet_block_samples controlnet_single_block_samples"
    positions = (7, 8, 9)
    given = [argument(args, kwargs, *at) for at in zip(positions, names.split(), strict=True)]
    return any(x is not None and len(x) > 0 for x in given)


# Dual-stream blocks come first, in the model and in the numbering.
DUAL_AND_SINGLE = re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn")

FLUX = Family(
    name="flux",
    title="Flux",
    model_classes=("FluxTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=4, target=_target),
    sizes=sizes_of_packed_latents,
    text="before",
    images=True,
    rotary=(3, "image_rotary_emb"),
    flow=TokenFlow(
        model_class="FluxTransformer2DModel",
        arguments=((0, "hidden_states", 1), (4, "img_ids", -2)),
        text=(1, "encoder_hidden_states"),
        interrupted=_has_residuals_or_masks,
    ),
)

FLUX2 = Family(
    name="flux.2",
    title="Flux.2",
    model_classes=("Flux2Transformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=_flux2_grid,
    sizes=sizes_of_packed_latents,
    text="before",
    images=True,
)
