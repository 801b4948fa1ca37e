"""Ideogram 4: text to image, in one packed sequence: padding, text, image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument
from diffattn.models.position_ids import rectangles

# The role of an image's tokens in the argument `indicator`.
_IMAGE = 2


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call, from the roles and the places of its tokens.

    Raises:
        ValueError: if the samples of the batch, or one sequence, have several pictures at different
            places, or text stands after the picture.
    """
    name = type(model).__name__
    ids, roles = argument(args, kwargs, 3, "position_ids"), argument(args, kwargs, 5, "indicator")
    runs = rectangles(roles, f"indicator of {name}", joined=False, of_tokens=_roles)
    start = sum(run.tokens for run in runs[:-1])
    images = [run for run in runs if run.times == (_IMAGE,)]
    pictures = rectangles(ids, f"position_ids of {name}", joined=False, start=start)
    if images != [runs[-1]] or len(pictures) != 1:
        raise ValueError(
            f"this call of {name} has a sequence that is not text and then one picture, as those of"
            f" its pipeline are: its indicator has {len(images)} runs of image tokens, and the last"
            f" {roles.shape[-1] - start} position_ids make {len(pictures)} pictures. Call it once"
            f" per picture, or set_attn_processor(None)"
        )
    return TokenGrid(1, pictures[0].height, pictures[0].width)


def _roles(indicator: torch.Tensor) -> torch.Tensor:
    """Ids (tokens, 3) in which each run of tokens of one role is a row."""
    first = indicator[0]
    if not torch.equal(indicator == _IMAGE, (first == _IMAGE).expand_as(indicator)):
        raise ValueError(
            "the samples of a batch of Ideogram4Transformer2DModel have their pictures at different"
            " places: pad their texts on the left to one length, as the pipeline does"
        )
    place = torch.arange(len(first), device=first.device)
    return torch.stack([first, torch.zeros_like(first), place], dim=1)


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.patch_size)


IDEOGRAM4 = Family(
    name="ideogram-4",
    title="Ideogram 4",
    model_classes=("Ideogram4Transformer2DModel",),
    sites=re.compile(r"layers\.(?P<layer>\d+)\.attention"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    padding="pairs",
    images=True,
    tested="model",
)
