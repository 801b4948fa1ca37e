"""The training recipes of the model families, one module each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffattn.lora.errors import LoraError
from diffattn.lora.recipes.base import Recipe
from diffattn.lora.recipes.cogvideox import cogvideox_recipe
from diffattn.lora.recipes.flux2 import flux2_recipe
from diffattn.lora.recipes.flux_kontext import flux_recipe
from diffattn.lora.recipes.hunyuanvideo import hunyuanvideo_recipe
from diffattn.lora.recipes.ltx import ltx_recipe
from diffattn.lora.recipes.mochi import mochi_recipe
from diffattn.lora.recipes.qwen_image_edit import qwen_image_recipe
from diffattn.lora.recipes.sd3 import sd3_recipe
from diffattn.lora.recipes.unet import unet_recipe
from diffattn.lora.recipes.wan import wan_recipe
from diffattn.models import denoisers, family_of

RECIPES: dict[str, Callable[[Any, str, int | None], Recipe]] = {
    "wan": wan_recipe,
    "hunyuanvideo": hunyuanvideo_recipe,
    "cogvideox": cogvideox_recipe,
    "ltx": ltx_recipe,
    "mochi": mochi_recipe,
    "flux": flux_recipe,
    "flux.2": flux2_recipe,
    "qwen-image": qwen_image_recipe,
    "sd3": sd3_recipe,
    "unet": unet_recipe,
}


def recipe_for(pipe: Any, denoiser: str | None = None, text_length: int | None = None) -> Recipe:
    """The training recipe of a pipeline's denoiser.

    Args:
        pipe: a text-to-video or text-to-image pipeline of diffusers.
        denoiser: the name of the component to train; the pipeline's first denoiser when None.
        text_length: tokens that prompts are padded to; the default of the pipeline's call when
            None.

    Raises:
        LoraError: if the pipeline's family has no recipe (names the families that have), the model
            is conditioned on more than text, the scheduler is missing or of the wrong kind, or
            there is no such denoiser.
    """
    models = denoisers(pipe)
    name = next(iter(models)) if denoiser is None else denoiser
    if name not in models:
        raise LoraError(f"denoiser is {name!r}, but {type(pipe).__name__} has {', '.join(models)}")
    family = family_of(models[name])
    if family.name not in RECIPES:
        raise LoraError(
            f"there is no training recipe for {family.title}; there are recipes for"
            f" {', '.join(RECIPES)}"
        )
    return RECIPES[family.name](pipe, name, text_length)


__all__ = ["RECIPES", "Recipe", "recipe_for"]
