"""Mochi 1: text to video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.lora.recipes.base import (
    Recipe,
    common_settings,
    encode_pixels,
    one_by_one,
    per_channel,
)
from diffattn.lora.recipes.noising import LinearQuadratic, Steps


@dataclass(frozen=True, kw_only=True)
class MochiRecipe(Recipe):
    """Mochi's recipe."""

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the VAE may have a mean and a deviation per channel."""
        latents = encode_pixels(pipe, pixels, generator)
        config = pipe.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = (per_channel(x, latents) for x in (config.latents_mean, config.latents_std))
            latents = (latents - mean) / std
        return latents * config.scaling_factor

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The text and the text's mask."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, mask, _, _ = pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_length
            )
            return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        out: Tensor = model(
            hidden_states=noisy.to(self.dtype),
            encoder_hidden_states=conditions["prompt_embeds"].to(self.dtype),
            timestep=self.model_times(times).to(self.dtype),
            encoder_attention_mask=conditions["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return out

    def steps(self, scheduler: Any, size: Sequence[int], shift: float | None) -> Steps:
        """See `Recipe.steps`; the pipeline has steps of its own."""
        return LinearQuadratic() if shift is None else super().steps(scheduler, size, shift)


def mochi_recipe(pipe: Any, denoiser: str, text_length: int | None) -> MochiRecipe:
    """The recipe of a text-to-video pipeline."""
    return MochiRecipe(**common_settings(pipe, "mochi", denoiser, text_length, flow=True))
