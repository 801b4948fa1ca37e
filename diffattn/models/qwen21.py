"""Qwen-Image 2.1: images, out of text and images whose keys a cache keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, last_queries


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid | None:
    """The grid of a call that takes the keys of text and images before the target from a cache.

    None for the call that fills the cache: it is dense, because text in it attends causally, in
    calls of its own that cannot be given a backend.

    Raises:
        ValueError: for a call without a cache.
    """
    mode = argument(args, kwargs, 8, "kv_cache_mode")
    if mode is None:
        raise ValueError(
            f"this call of {type(model).__name__} has no kv_cache: text in it attends causally and"
            f" images to all that stands before them, in calls that cannot be given a backend. Call"
            f" the pipeline with use_kv_cache=True, its default, or set_attn_processor(None)"
        )
    if mode == "extract":
        return None
    return TokenGrid(*argument(args, kwargs, 3, "img_shapes")[0][-1])


def _sizes(pipe: Any) -> SizeRules:
    # The language model sees 2 x 2 tokens of an image as one.
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor * 2,
        frame_stride=0,
        frame_offset=1,
        token_pixels=pipe.vae_scale_factor,
    )


QWEN_IMAGE21 = Family(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1 (all steps but the first, with its cache)",
    model_classes=("QwenImage21Transformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    queries=last_queries,
    images=True,
    tested="model",
)
