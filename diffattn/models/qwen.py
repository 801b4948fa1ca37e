"""Qwen-Image and 2.1: text to image, editing of images, and images in layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input, last_queries


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The target, or the layers, and then the images that are edited.

    Raises:
        ValueError: if the samples have images of several shapes, the shapes make more or fewer
            tokens than the input has, or layers differ in size.
    """
    # For each sample a list of image shapes, or (diffusers before 0.37) the shape of one image.
    samples = argument(args, kwargs, 4, "img_shapes")
    shapes = [samples[0]] if isinstance(samples[0][0], int) else samples[0]
    tokens = first_input(args, kwargs).shape[1]
    if any(sample != samples[0] for sample in samples):
        raise ValueError(
            f"this call of {type(model).__name__} has images of several shapes in one batch: call"
            f" it once per shape, or set_attn_processor(None)"
        )
    if sum(map(prod, shapes)) != tokens:
        listed = " and ".join("x".join(map(str, shape)) for shape in shapes)
        raise ValueError(
            f"img_shapes of this call of {type(model).__name__} are {listed}, which make"
            f" {sum(map(prod, shapes))} tokens, but hidden_states has {tokens}: the two arguments"
            f" contradict each other"
        )
    layers = _layers(model, shapes)
    frames, height, width = shapes[0]
    ends = list(accumulate(map(prod, shapes)))
    return TokenGrid(
        frames * layers,
        height,
        width,
        text_after=tokens - ends[layers - 1],
        references=tuple(
            Reference(end - prod(shape), *shape)
            for shape, end in zip(shapes[layers:], ends[layers:], strict=True)
        ),
    )


def _layers(model: Any, shapes: list[tuple[int, int, int]]) -> int:
    """How many images at the front are the layers of one: their tokens share rows and columns."""
    # In models for layers the image that is taken apart stands last.
    if not getattr(model.config, "use_layer3d_rope", False) or len(shapes) < 2:
        return 1
    layers = shapes[:-1]
    if len(set(layers)) > 1:
        raise ValueError(
            f"the layers of this call of {type(model).__name__} are of several sizes,"
            f" {', '.join(map(str, layers))}: layers of one size share rows and columns; pass such"
            f" img_shapes, or set_attn_processor(None)"
        )
    return len(layers)


def _grid21(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The target, which stands last. Images to edit are keys of its call alone, as text is."""
    samples = argument(args, kwargs, 3, "img_shapes")
    if any(list(sample) != list(samples[0]) for sample in samples):
        raise ValueError(
            f"this call of {type(model).__name__} has images of several shapes in one batch: call"
            f" it once per list of shapes, or set_attn_processor(None)"
        )
    return TokenGrid(*samples[0][-1])


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * 2)


def _sizes21(pipe: Any) -> SizeRules:
    # Latents are tokens; the text encoder counts them in squares of four.
    return replace(SizeRules.images(pipe.vae_scale_factor * 2), token_pixels=pipe.vae_scale_factor)


QWEN_IMAGE = Family(
    name="qwen-image",
    title="Qwen-Image",
    beside="reference pictures of Edit, Edit-Plus and Layered, as references",
    model_classes=("QwenImageTransformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    images=True,
)

QWEN_IMAGE21 = Family(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1",
    beside="pictures to edit, dense: keys of the picture's own calls",
    model_classes=("QwenImage21Transformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid21,
    sizes=_sizes21,
    text="before",
    queries=last_queries,
    images=True,
    tested="model",
)
