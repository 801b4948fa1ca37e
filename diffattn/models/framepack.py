"""FramePack: HunyuanVideo in sections, which look back at frames of the past."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, argument, latent_grid, sizes_in_the_call
from diffattn.models.history import Past, behind

_PASTS = (
    Past((12, "latents_history_4x"), (13, "indices_latents_history_4x"), (4, 8, 8)),
    Past((10, "latents_history_2x"), (11, "indices_latents_history_2x"), (2, 4, 4)),
    Past((8, "latents_clean"), (9, "indices_latents_clean"), (1, 2, 2)),
)


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    patch = model.config.patch_size
    video = latent_grid(args, kwargs, (model.config.patch_size_t, patch, patch))
    return behind(_PASTS, video, argument(args, kwargs, 6, "indices_latents"), args, kwargs)


FRAMEPACK = Family(
    name="framepack",
    title="FramePack",
    beside="history at three sizes, as references; tokens of a picture, dense",
    model_classes=("HunyuanVideoFramepackTransformer3DModel",),
    # The text refiner has transformer blocks of its own.
    sites=re.compile(r"(?P<layer>(?:single_)?transformer_blocks\.\d+)\.attn"),
    grid=_grid,
    sizes=sizes_in_the_call("makes its video in sections, each with frames of the past beside it"),
    text="after",
    tested="model",
)
