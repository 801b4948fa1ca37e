"""HunyuanVideo and HunyuanVideo 1.5: text and image to video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, SizeRules, latent_grid
from diffattn.models.token_flow import TokenFlow


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    patch = model.config.patch_size
    return latent_grid(args, kwargs, (model.config.patch_size_t, patch, patch))


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    return SizeRules(
        spatial_multiple=pipe.vae_scale_factor_spatial * config.patch_size,
        frame_stride=pipe.vae_scale_factor_temporal * config.patch_size_t,
        frame_offset=1,
    )


def _replaces_tokens(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    # Blocks of this kind treat the tokens of the first frame apart, by their place in the sequence.
    return bool(model.config.image_condition_type == "token_replace")


HUNYUANVIDEO = Family(
    name="hunyuanvideo",
    title="HunyuanVideo (T2V, I2V)",
    model_classes=("HunyuanVideoTransformer3DModel",),
    # The text refiner has transformer blocks of its own.
    sites=re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    rotary=(3, "image_rotary_emb"),
    flow=TokenFlow(
        model_class="HunyuanVideoTransformer3DModel",
        outputs={"x_embedder": 1, "rope": 0},
        text=(2, "encoder_hidden_states"),
        interrupted=_replaces_tokens,
    ),
)

HUNYUANVIDEO15 = Family(
    name="hunyuanvideo-1.5",
    title="HunyuanVideo 1.5 (T2V, I2V)",
    beside="tokens of a picture, dense",
    model_classes=("HunyuanVideo15Transformer3DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=_grid,
    sizes=_sizes,
    text="after",
    padding="pairs",
)
