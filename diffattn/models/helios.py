"""Helios: video in chunks, which look back at frames of the past."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from diffattn.grid import TokenGrid
from diffattn.models.base import Family, argument, latent_grid, sizes_in_the_call
from diffattn.models.history import Past, behind


def _grid(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenGrid:
    t, h, w = model.config.patch_size
    pasts = (
        Past(
            (9, "latents_history_long"), (6, "indices_latents_history_long"), (4 * t, 4 * h, 4 * w)
        ),
        Past((8, "latents_history_mid"), (5, "indices_latents_history_mid"), (2 * t, 2 * h, 2 * w)),
        Past((7, "latents_history_short"), (4, "indices_latents_history_short"), (t, h, w)),
    )
    video = latent_grid(args, kwargs, (t, h, w))
    return behind(pasts, video, argument(args, kwargs, 3, "indices_hidden_states"), args, kwargs)


HELIOS = Family(
    name="helios",
    title="Helios",
    beside="history at three sizes, as references",
    model_classes=("HeliosTransformer3DModel",),
    sites=re.compile(r"blocks\.(?P<layer>\d+)\.attn1"),
    grid=_grid,
    sizes=sizes_in_the_call("makes its video in chunks, each with frames of the past beside it"),
    tested="model",
)
