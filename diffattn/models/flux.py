"""Flux, Flux.2 and Flux 3: images, also from reference images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input
from diffattn.models.pictures_by_ids import grid_of_ids, grid_of_pictures, pictures_of
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


def flow_of_packed_latents(
    model_class: str,
    ids: int,
    *more: tuple[int, str, int],
    interrupted_by: tuple[tuple[int, str], ...] = (),
) -> TokenFlow:
    """The flow of packed latents and their position ids through blocks like Flux'.

    Args:
        ids: position of the argument `img_ids`.
        more: further arguments with tokens, see `TokenFlow`.
        interrupted_by: arguments in the model's own order of tokens: residuals of a ControlNet, and
            arguments for attention processors, such as masks of an IP-Adapter.
    """
    return TokenFlow(
        model_class=model_class,
        arguments=((0, "hidden_states", 1), (ids, "img_ids", -2), *more),
        text=(1, "encoder_hidden_states"),
        interrupted=partial(_any_given, which=interrupted_by),
    )


def _any_given(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    which: tuple[tuple[int, str], ...],
) -> bool:
    given = [argument(args, kwargs, *place) for place in which]
    return any(x is not None and len(x) > 0 for x in given)


def _flux3_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    count = first_input(args, kwargs).shape[1]
    ids = argument(args, kwargs, 3, "img_ids")
    pictures = list(pictures_of(model, ids, "img_ids", {"hidden_states": count}))
    references = argument(args, kwargs, 5, "image_cond_hidden_states")
    if references is not None:
        ids = argument(args, kwargs, 6, "image_cond_ids")
        counted = {"image_cond_hidden_states": references.shape[1]}
        found = pictures_of(model, ids, "image_cond_ids", counted)
        pictures += [replace(picture, start=picture.start + count) for picture in found]
    return grid_of_pictures(pictures[0], pictures)


def _target_alone(grid: TokenGrid) -> TokenGrid:
    return grid.alone


def _references_alone(grid: TokenGrid) -> TokenGrid | None:
    """The first reference, and the others as references beside it."""
    if not grid.references:
        return None
    first, *others = grid.references
    return TokenGrid(
        1,
        first.height,
        first.width,
        text_after=grid.text_after - first.tokens,
        references=tuple(
            replace(r, start=r.start - first.start, aligned=r.aligned and first.aligned)
            for r in others
        ),
    )


# Dual-stream blocks come first, in the model and in the numbering.
DUAL_AND_SINGLE = re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn")

FLUX = Family(
    name="flux",
    title="Flux",
    beside="reference pictures of Kontext, as references",
    model_classes=("FluxTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=4, target=_target),
    sizes=sizes_of_packed_latents,
    text="before",
    images=True,
    rotary=(3, "image_rotary_emb"),
    flow=flow_of_packed_latents(
        "FluxTransformer2DModel",
        4,
        interrupted_by=(
            (7, "joint_attention_kwargs"),
            (8, "controlnet_block_samples"),
            (9, "controlnet_single_block_samples"),
        ),
    ),
)

FLUX2 = Family(
    name="flux.2",
    title="Flux.2",
    beside="reference pictures, as references; dense where they come from Klein's cache",
    model_classes=("Flux2Transformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=_flux2_grid,
    sizes=sizes_of_packed_latents,
    text="before",
    queries=_flux2_queries,
    images=True,
)

FLUX3 = Family(
    name="flux.3",
    title="Flux 3",
    beside="reference pictures, as references",
    model_classes=("Flux3Transformer2DModel",),
    sites=re.compile(
        r"(?P<layer>single_transformer_blocks\.\d+|mode_blocks\.(?:image|image_cond)\.\d+)\.attn"
    ),
    grid=_flux3_grid,
    sizes=sizes_of_packed_latents,
    text="before",
    parts=(
        (re.compile(r"mode_blocks\.image\..*"), _target_alone),
        (re.compile(r"mode_blocks\.image_cond\..*"), _references_alone),
    ),
    images=True,
    tested="model",
)
