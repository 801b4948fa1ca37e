"""CogVideoX: 2b, 5b and 1.5, text, image and video to video; ConsisID."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, argument, first_input
from diffattn.models.token_flow import TokenFlow


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    # (batch, frames, channels, height, width)
    _, frames, _, height, width = first_input(args, kwargs).shape
    patch, patch_t = model.config.patch_size, _frames_per_token(model)
    return TokenGrid(frames // patch_t, height // patch, width // patch)


def _frames_per_token(model: Any) -> int:
    # ConsisID's model has no such setting.
    return getattr(model.config, "patch_size_t", None) or 1


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * config.patch_size,
        frame_stride=pipe.vae_scale_factor_temporal,
        frame_offset=1,
        frames_per_token=_frames_per_token(pipe.transformer),
    )


def _has_attention_arguments(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    # The model passes these arguments to attention processors. A mask among them would be in the
    # model's own order of tokens.
    return bool(argument(args, kwargs, 6, "attention_kwargs"))


COGVIDEOX = Family(
    name="cogvideox",
    title="CogVideoX 2b, 5b and 1.5, ConsisID",
    model_classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=_sizes,
    text="before",
    rotary=(3, "image_rotary_emb"),
    flow=TokenFlow(
        model_class="CogVideoXTransformer3DModel",
        arguments=((5, "image_rotary_emb", 0),),
        outputs={"patch_embed": 1},
        text=(1, "encoder_hidden_states"),
        interrupted=_has_attention_arguments,
    ),
)
