"""Flux Kontext: a picture from a picture and an instruction."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes.flux import SOURCE, FluxRecipe, flux_settings
from diffattn.lora.recipes.packed import PATCH

_PIPELINE = "FluxKontextPipeline"


@dataclass(frozen=True, kw_only=True)
class FluxKontextRecipe(FluxRecipe):
    """The recipe of Flux Kontext.

    Attributes:
        sizes: columns and rows of the sources that the model was trained on; the pipeline scales
            what is edited to the one of the nearest shape.
    """

    edits: ClassVar[bool] = True
    sizes: tuple[tuple[int, int], ...]

    def source_size(self, height: int, width: int) -> tuple[int, int]:
        """See `Recipe.source_size`."""
        shape = width / height
        _, columns, rows = min((abs(shape - w / h), w, h) for w, h in self.sizes)
        side = self.latent_pixels * PATCH
        return rows // side * side, columns // side * side

    def encode_source(self, pipe: Any, pixels: Tensor, caption: str) -> dict[str, Tensor]:
        """See `Recipe.encode_source`; the text encoders do not see the source."""
        return {**self.encode_prompt(pipe, [caption]), SOURCE: self.encode_clip(pipe, pixels, None)}


def flux_recipe(pipe: Any, denoiser: str, text_length: int | None) -> FluxRecipe:
    """The recipe of a text-to-image pipeline, or of Kontext's."""
    name = type(pipe).__name__
    settings = flux_settings(pipe, denoiser, text_length)
    if name == _PIPELINE:
        known: Any = inspect.getmodule(type(pipe))
        return FluxKontextRecipe(**settings, sizes=tuple(known.PREFERRED_KONTEXT_RESOLUTIONS))
    if "Kontext" in name:
        raise LoraError(f"there is no training recipe for {name}: train its model in {_PIPELINE}")
    return FluxRecipe(**settings)
