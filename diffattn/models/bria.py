"""Bria 3 and Bria Fibo: text to image; Fibo also edits images."""

from __future__ import annotations

from functools import partial
from typing import Any

from diffattn.models.base import Family, SizeRules
from diffattn.models.flux import DUAL_AND_SINGLE
from diffattn.models.pictures_by_ids import grid_of_ids


def _sizes(pipe: Any) -> SizeRules:
    # The factor of these pipelines holds what they pack, too.
    return SizeRules.images(pipe.vae_scale_factor)


BRIA = Family(
    name="bria",
    title="Bria 3",
    model_classes=("BriaTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=4),
    sizes=_sizes,
    text="before",
    rotary=(3, "image_rotary_emb"),
    images=True,
)

BRIA_FIBO = Family(
    name="bria-fibo",
    title="Bria Fibo",
    model_classes=("BriaFiboTransformer2DModel",),
    sites=DUAL_AND_SINGLE,
    grid=partial(grid_of_ids, position=5),
    sizes=_sizes,
    text="before",
    rotary=(3, "image_rotary_emb"),
    images=True,
)
