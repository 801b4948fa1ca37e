"""Cosmos 3: queries of video and sound, which see the text as well; text to video and pictures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument, last_queries
from diffattn.models.packed import runs


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The grid of a call: the item that has noise, with others as references.

    Raises:
        ValueError: if several items have noise, or none; if the positions of vision tokens do not
            fit the shapes of the items.
    """
    shapes = argument(args, kwargs, 6, "vision_token_shapes")
    noisy = argument(args, kwargs, 10, "vision_noisy_frame_indexes")
    name = type(model).__name__
    targets = [i for i, frames in enumerate(noisy) if frames.numel()]
    if len(targets) != 1:
        raise ValueError(
            f"this call of {name} has noise in {len(targets)} of its {len(shapes)} vision items, by"
            f" vision_noisy_frame_indexes, but one of them is to be the video: call it once per"
            f" video, or set_attn_processor(None)"
        )
    items = [
        Reference(start, *map(int, shape))
        for start, shape in zip(_starts(args, kwargs, shapes, name), shapes, strict=True)
    ]
    video = items.pop(targets[0])
    tokens = argument(args, kwargs, 4, "sequence_length")
    grid = TokenGrid(video.frames, video.height, video.width, video.start, tokens - video.stop)
    return replace(grid, references=tuple(sorted(items, key=lambda item: item.start)))


def _starts(args: Any, kwargs: Mapping[str, Any], shapes: Any, name: str) -> list[int]:
    """The position of the first token of each vision item."""
    label = "vision_sequence_indexes"
    positions = argument(args, kwargs, 7, label)
    found = runs(positions, f"{label} of {name}")
    left, starts = list(found), []
    for shape in shapes:
        tokens = math.prod(shape)
        if not left or len(left[0]) < tokens:
            raise ValueError(
                f"{label} of {name} contradict vision_token_shapes: they place {len(positions)}"
                f" tokens in {len(found)} runs, but the shapes are"
                f" {', '.join('x'.join(map(str, s)) for s in shapes)}"
            )
        starts.append(left[0].start)
        left[0] = left[0][tokens:]
        if not left[0]:
            left.pop(0)
    return starts


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial,
        # Half a patch at the border is filled.
        token_pixels=pipe.vae_scale_factor_spatial * pipe.transformer.config.latent_patch_size,
        frame_stride=pipe.vae_scale_factor_temporal,
        frame_offset=1,
    )


COSMOS3 = Family(
    name="cosmos-3",
    title="Cosmos 3",
    beside="sound, dense; other videos and pictures, as references",
    model_classes=("Cosmos3OmniTransformer",),
    sites=re.compile(r"layers\.(?P<layer>\d+)\.self_attn"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    queries=last_queries,
    tested="model",
)
