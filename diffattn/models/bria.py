"""Bria 3, Bria Fibo and Fibo 2: text to image; Fibo and Fibo 2 also edit images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input
from diffattn.models.flux import DUAL_AND_SINGLE, flow_of_packed_latents
from diffattn.models.pictures_by_ids import grid_of_ids


def _sizes(pipe: Any) -> SizeRules:
    # The factor of these pipelines holds what they pack, too.
    return SizeRules.images(pipe.vae_scale_factor)


def _fibo2_grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The target, the images to edit, and the gist tokens that are made of the prompt."""
    images = [first_input(args, kwargs), *(argument(args, kwargs, 4, "context_latents") or ())]
    patch = model.config.patch_size
    (height, width), *sizes = ((x.shape[2] // patch, x.shape[3] // patch) for x in images)
    starts = accumulate((h * w for h, w in sizes), initial=height * width)
    references = tuple(
        Reference(start, 1, h, w) for (h, w), start in zip(sizes, starts, strict=False)
    )
    pictures = TokenGrid(
        1, height, width, 0, sum(r.tokens for r in references), references=references
    )
    counts = _gist_tokens(model, args, kwargs)
    # Padded gist tokens stand last, and else first.
    return pictures.beside(**{"before" if len(set(counts)) == 1 else "after": max(counts)})


def _gist_tokens(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The number of gist tokens of each sample."""
    from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count

    prompts = argument(args, kwargs, 2, "encoder_hidden_states")
    mask = argument(args, kwargs, 3, "encoder_attention_mask")
    lengths = [prompts.shape[2]] if mask is None else mask.sum(1).tolist()
    config = model.config
    return compute_gist_count(
        lengths,
        min_gist=config.min_num_gist_tokens,
        max_gist=config.max_num_gist_tokens,
        gist_step=config.gist_step,
        min_text_len=config.gist_min_text_len,
        max_text_len=config.gist_max_text_len,
    )


def _pictures_alone(grid: TokenGrid) -> TokenGrid:
    """The tokens without the gist."""
    references = tuple(replace(r, start=r.start - grid.text_before) for r in grid.references)
    tokens = sum(r.tokens for r in references)
    return TokenGrid(1, grid.height, grid.width, 0, tokens, references=references)


def _fibo2_sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.transformer.config.patch_size)


BRIA = Family(
    name="bria",
    title="Bria 3",
    model_classes=("BriaTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=4),
    sizes=_sizes,
    text="before",
    rotary=(3, "image_rotary_emb"),
    images=True,
    flow=flow_of_packed_latents(
        "BriaTransformer2DModel",
        4,
        interrupted_by=(
            (7, "attention_kwargs"),
            (9, "controlnet_block_samples"),
            (10, "controlnet_single_block_samples"),
        ),
    ),
)

BRIA_FIBO = Family(
    name="bria-fibo",
    title="Bria Fibo",
    beside="reference pictures of Fibo Edit, as references",
    model_classes=("BriaFiboTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=5),
    sizes=_sizes,
    text="before",
    rotary=(3, "image_rotary_emb"),
    images=True,
    flow=flow_of_packed_latents(
        "BriaFiboTransformer2DModel", 5, interrupted_by=((8, "joint_attention_kwargs"),)
    ),
    tested="model",
)

BRIA_FIBO2 = Family(
    name="bria-fibo-2",
    title="Bria Fibo 2",
    beside="reference pictures, as references",
    model_classes=("BriaFibo2Transformer2DModel",),
    sites=re.compile(r"(?P<layer>(?:noise_refiner|layers)\.\d+)\.attention"),
    grid=_fibo2_grid,
    sizes=_fibo2_sizes,
    text="before",
    parts=((re.compile(r"noise_refiner\..*"), _pictures_alone),),
    images=True,
    tested="model",
)
