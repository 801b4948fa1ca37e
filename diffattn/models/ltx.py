"""LTX-Video and the video half of LTX-2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input
from diffattn.models.token_flow import TokenFlow


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int) -> TokenGrid:
    """The grid of a call on a sequence of tokens, from the call's numbers of frames, rows, columns.

    Args:
        position: position of the argument `num_frames`; `height` and `width` follow.

    Raises:
        ValueError: if the call has no such numbers, or other tokens in addition.
    """
    names = ("num_frames", "height", "width")
    sizes = [argument(args, kwargs, position + i, name) for i, name in enumerate(names)]
    tokens = first_input(args, kwargs).shape[1]
    if None in sizes:
        raise ValueError(
            f"this call of {type(model).__name__} places its {tokens} tokens by coordinates, not by"
            f" num_frames, height and width, as pipelines with conditioning frames do: such tokens"
            f" have no rectangular grid; use a pipeline without conditions, or"
            f" set_attn_processor(None)"
        )
    patches = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
    grid = TokenGrid(*(size // patch for size, patch in zip(sizes, patches, strict=True)))
    if grid.tokens != tokens:
        raise ValueError(
            f"this call of {type(model).__name__} has {tokens} tokens, but num_frames, height and"
            f" width make {grid} = {grid.tokens}: reference tokens have no place in a rectangular"
            f" grid; use a pipeline without them, or set_attn_processor(None)"
        )
    return grid


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    return SizeRules(
        spatial_multiple=pipe.vae_spatial_compression_ratio * config.patch_size,
        frame_stride=pipe.vae_temporal_compression_ratio * config.patch_size_t,
        frame_offset=1,
    )


LTX = Family(
    name="ltx",
    title="LTX-Video",
    model_classes=("LTXVideoTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=partial(_grid, position=4),
    sizes=_sizes,
    flow=TokenFlow(
        model_class="LTXVideoTransformer3DModel",
        # Image to video has a timestep per token.
        arguments=((0, "hidden_states", 1), (2, "timestep", 1)),
        outputs={"rope": 1},
    ),
)

LTX2 = Family(
    name="ltx-2",
    title="LTX-2 (video self-attention; audio stays dense)",
    model_classes=("LTX2VideoTransformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=partial(_grid, position=10),
    sizes=_sizes,
)
