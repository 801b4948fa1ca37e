"""AuraFlow: text to image, with eight register tokens before the text."""

from __future__ import annotations

import math
import re
from typing import Any

from diffattn.models.base import Family, SizeRules, image_grid


def _sizes(pipe: Any) -> SizeRules:
    config = pipe.transformer.config
    rules = SizeRules.images(pipe.vae_scale_factor * config.patch_size)
    side = math.isqrt(config.pos_embed_max_size)
    return rules.up_to(None, side, "pos_embed_max_size of its transformer")


AURAFLOW = Family(
    name="auraflow",
    title="AuraFlow",
    beside="eight register tokens, dense",
    model_classes=("AuraFlowTransformer2DModel",),
    # Dual-stream blocks come first, in the model and in the numbering.
    sites=re.compile(r"(?P<layer>(?:joint|single)_transformer_blocks\.\d+)\.attn"),
    grid=image_grid,
    sizes=_sizes,
    text="before",
    images=True,
)
