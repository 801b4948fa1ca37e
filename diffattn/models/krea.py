"""Krea 2: text to image, in blocks with text and image in one stream."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from diffattn.models.base import Family, SizeRules
from diffattn.models.pictures_by_ids import grid_of_ids
from diffattn.models.token_flow import TokenFlow


def _sizes(pipe: Any) -> SizeRules:
    return SizeRules.images(pipe.vae_scale_factor * pipe.patch_size)


KREA2 = Family(
    name="krea-2",
    title="Krea 2",
    model_classes=("Krea2Transformer2DModel",),
    sites=re.compile(r"transformer_blocks\.(?P<layer>\d+)\.attn"),
    grid=partial(grid_of_ids, position=3, name="position_ids", text=(1, "encoder_hidden_states")),
    sizes=_sizes,
    text="before",
    images=True,
    flow=TokenFlow(
        model_class="Krea2Transformer2DModel",
        arguments=((0, "hidden_states", 1), (3, "position_ids", 0)),
        leave="final_layer.linear",
        text=(1, "encoder_hidden_states"),
    ),
)
