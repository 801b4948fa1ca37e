"""HunyuanVideo: text to video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.lora.recipes.base import (
    Recipe,
    call_default,
    common_settings,
    encode_pixels,
    one_by_one,
    refuse_conditions,
)


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoRecipe(Recipe):
    """HunyuanVideo's recipe."""

    def encode_clip(self, pipe: Any, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `Recipe.encode_clip`; the VAE has one factor."""
        return encode_pixels(pipe, pixels, generator) * pipe.vae.config.scaling_factor

    def encode_prompt(self, pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
        """The text in the pipeline's template, the mask, and CLIP's pooled embedding."""

        def encode(prompt: str) -> dict[str, Tensor]:
            embeds, pooled, mask = pipe.encode_prompt(prompt, max_sequence_length=self.text_length)
            return {
                "prompt_embeds": embeds,
                "prompt_attention_mask": mask,
                "pooled_prompt_embeds": pooled,
            }

        return one_by_one(prompts, encode)

    def predict(
        self, model: Any, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """See `Recipe.predict`."""
        told = {name: value.to(self.dtype) for name, value in conditions.items()}
        guidance = None
        if self.guidance is not None:
            guidance = noisy.new_full((len(noisy),), self.guidance, dtype=self.dtype) * 1000.0
        out: Tensor = model(
            hidden_states=noisy.to(self.dtype),
            timestep=self.model_times(times).to(self.dtype),
            encoder_hidden_states=told["prompt_embeds"],
            encoder_attention_mask=told["prompt_attention_mask"],
            pooled_projections=told["pooled_prompt_embeds"],
            guidance=guidance,
            return_dict=False,
        )[0]
        return out


def hunyuanvideo_recipe(pipe: Any, denoiser: str, text_length: int | None) -> HunyuanVideoRecipe:
    """The recipe of a text-to-video pipeline."""
    model = getattr(pipe, denoiser)
    config = model.config
    refuse_conditions(
        model, config.in_channels == config.out_channels and config.image_condition_type is None
    )
    return HunyuanVideoRecipe(
        **common_settings(pipe, "hunyuanvideo", denoiser, text_length, flow=True),
        guidance=call_default(pipe, "guidance_scale") if config.guidance_embeds else None,
    )
