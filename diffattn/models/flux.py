"""Flux and Flux.2: images, in dual-stream and single-stream blocks."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input
from diffattn.models.token_flow import TokenFlow

# The position ids that were read last, by shape, and their grid. Reading waits for the device; a
# pipeline passes the same ids in all its steps.
_read: dict[tuple[int, ...], tuple[weakref.ref[torch.Tensor], TokenGrid]] = {}


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> TokenGrid:
    """The grid of a call on a sequence of tokens, whose rows and columns only `img_ids` has.

    Args:
        position: position of the argument `img_ids`.

    Raises:
        ValueError: if the tokens are no rectangular grid in order.
    """
    ids = argument(args, kwargs, position, "img_ids")
    tokens = first_input(args, kwargs).shape[1]
    shape = tuple(ids.shape)
    seen, grid = _read.get(shape, (None, None))
    if seen is None or seen() is not ids:
        grid = _read_grid(model, ids)
        _read[shape] = weakref.ref(ids), grid
    assert grid is not None
    if grid.tokens != tokens:
        raise ValueError(_no_grid(model, f"{tokens} tokens, but position ids for {grid.tokens}"))
    return grid


def _read_grid(model: torch.nn.Module, ids: torch.Tensor) -> TokenGrid:
    """The grid of position ids (tokens, 3 or more): the second and third are row and column."""
    places = (ids if ids.ndim == 2 else ids[0])[:, 1:3].long().cpu()
    height, width = (int(x) + 1 for x in places.amax(0))
    expected = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    if not torch.equal(places, expected.view(-1, 2)):
        found = f"{len(places)} tokens where its rows and columns make {height} x {width}"
        raise ValueError(_no_grid(model, found))
    return TokenGrid(1, height, width)


def _no_grid(model: torch.nn.Module, found: str) -> str:
    return (
        f"this call of {type(model).__name__} has {found}: reference images (Kontext, Flux.2"
        f" editing) have no place in a rectangular grid; use the pipeline without them, or"
        f" set_attn_processor(None)"
    )


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * 2)


def _has_residuals_or_masks(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    # Residuals of a ControlNet and arguments for attention processors, such as masks of an
    # IP-Adapter, are in the model's own order of tokens.
    names = "joint_attention_kwargs controlnet_block_samples controlnet_single_block_samples"
    positions = (7, 8, 9)
    given = [argument(args, kwargs, *at) for at in zip(positions, names.split(), strict=True)]
    return any(x is not None and len(x) > 0 for x in given)


# Dual-stream blocks come first, in the model and in the numbering.
_SITES = re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn")

FLUX = Family(
    name="flux",
    title="Flux",
    model_classes=("FluxTransformer2DModel",),
    sites=_SITES,
    grid=partial(_grid, position=4),
    sizes=_sizes,
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
    sites=_SITES,
    grid=partial(_grid, position=3),
    sizes=_sizes,
    text="before",
    images=True,
)
