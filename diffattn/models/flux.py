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
    """The grid of a call. With a cache for references, their keys stand between text and target.

    The references of such a call attend to themselves alone and are no part of the pattern.
    """
    mode = argument(args, kwargs, 9, "kv_cache_mode")
    grid = grid_of_ids(model, args, kwargs, position=3)
    if mode is None:
        return grid
    if mode == "cached":
        return grid.alone.beside(before=argument(args, kwargs, 8, "kv_cache").num_ref_tokens)
    return grid.alone.beside(before=grid.text_before)


def _flux2_queries(video: TokenGrid, queries: int, keys: int) -> tuple[slice, ...] | None:
    """The positions of text and target, whose calls have keys of references between them."""
    references = video.text_before
    text = keys - video.tokens
    if not references or text < 0 or keys - queries != references:
        return None
    return slice(0, text), slice(text + references, keys)


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
    queries=_flux2_queries,
    images=True,
)
