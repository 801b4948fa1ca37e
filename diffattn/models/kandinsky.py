"""Kandinsky 5, without NABLA, and the video of Kandinsky 6: text and image to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffattn.grid import Reference, TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input

# Along each axis; diffusers' classes have no setting for it.
_POSITIONS = 128


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    if argument(args, kwargs, 7, "sparse_params") is not None:
        raise ValueError(
            f"this call of {type(model).__name__} uses NABLA, the model's own sparse attention,"
            f" which puts tokens in another order: use a checkpoint whose attention_type is"
            f" 'regular', or set_attn_processor(None)"
        )
    return _tokens(model, args, kwargs)


def _tokens(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    """The tokens of latents (batch, frames, height, width, channels)."""
    sizes = zip(first_input(args, kwargs).shape[1:4], model.config.patch_size, strict=True)
    return TokenGrid(*(size // patch for size, patch in sizes))


def _grid_beside_first_frame(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TokenGrid:
    """The grid of a call of Kandinsky 6, whose last frame may be the first one once more, clean.

    That frame has a type of its own. Pipelines pass types in calls with such a frame only.
    """
    tokens = _tokens(model, args, kwargs)
    if argument(args, kwargs, 7, "visual_token_type_ids") is None or tokens.frames == 1:
        return tokens
    video = replace(tokens, frames=tokens.frames - 1, text_after=tokens.frame_tokens)
    first = Reference(video.video.stop, 1, tokens.height, tokens.width, times=(0.0,))
    return replace(video, references=(first,))


def _sizes(pipe: Any) -> SizeRules:
    patch_t, patch, _ = pipe.transformer.config.patch_size
    rules = SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * patch,
        frame_stride=pipe.vae_scale_factor_temporal * patch_t,
        frame_offset=1,
    )
    return rules.up_to(_POSITIONS, _POSITIONS, "the table of its rotary position embedding")


KANDINSKY5 = Family(
    name="kandinsky-5",
    title="Kandinsky 5 (without NABLA)",
    model_classes=("Kandinsky5Transformer3DModel",),
    sites=re.compile(r"visual_transformer_blocks\.(?P<layer>\d+)\.self_attention"),
    grid=_grid,
    sizes=_sizes,
)

KANDINSKY6 = Family(
    name="kandinsky-6",
    title="Kandinsky 6",
    beside="the clean first frame, as a reference; audio apart, dense",
    model_classes=("Kandinsky6Transformer3DModel",),
    sites=re.compile(r"visual_transformer_blocks\.(?P<layer>\d+)\.video_dec_block\.self_attention"),
    grid=_grid_beside_first_frame,
    sizes=_sizes,
)
